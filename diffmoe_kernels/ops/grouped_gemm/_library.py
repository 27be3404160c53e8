"""`grouped_gemm` on the Triton kernels as torch operators: rows by their group's matrix, and sums of outer products."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe_kernels.operator import empty_for_none, operator
from diffmoe_kernels.ops.grouped_gemm._triton import multiply_rows
from diffmoe_kernels.ops.grouped_gemm._triton_sum_rows import sum_rows
from diffmoe_kernels.ops.grouped_gemm._triton_weight_grad import weight_grad
from diffmoe_kernels.triton_support import why_not_products


@operator("group_rows")
def _rows(x: Tensor, w: Tensor, offs: Tensor, bias: Tensor | None) -> Tensor:
    """(R, K), (E, K, N), (E,), (E, N) -> (R, N), 0 past the last group."""
    return multiply_rows(x, w, offs, bias=bias, clears_rest=True)


@_rows.register_fake
def _(x, w, offs, bias):
    return x.new_empty(x.shape[0], w.shape[2])


@operator("group_outer")
def _outer(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """(R, M), (R, N), (E,) -> (E, M, N): each group's sum of a^T b over its rows."""
    return weight_grad(a, b, offs, dtype=a.dtype)


@_outer.register_fake
def _(a, b, offs):
    return a.new_empty(offs.shape[0], a.shape[1], b.shape[1])


@operator("group_rows_backward")
def _rows_backward(
    grad: Tensor, x: Tensor, w: Tensor, offs: Tensor, needs_x: bool, needs_w: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to x (R, K), w as (E, N, K) and the bias (E, N), empty where not needed."""
    grad_x = _rows(grad, w.mT, offs, None) if needs_x else None
    grad_w = weight_grad(grad, x, offs, dtype=grad.dtype) if needs_w else None
    return empty_for_none(grad, grad_x, grad_w, sum_rows(grad, offs, dtype=grad.dtype) if needs_bias else None)


@_rows_backward.register_fake
def _(grad, x, w, offs, needs_x, needs_w, needs_bias):
    num_groups, depth, num_columns = w.shape
    shapes = x.shape, (num_groups, num_columns, depth), (num_groups, num_columns)
    needs = needs_x, needs_w, needs_bias
    return tuple(grad.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))


@operator("group_outer_backward")
def _outer_backward(
    grad: Tensor, a: Tensor, b: Tensor, offs: Tensor, needs_a: bool, needs_b: bool
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to a (R, M) and b (R, N), empty where not needed."""
    grad_a = _rows(b, grad.mT, offs, None) if needs_a else None
    return empty_for_none(grad, grad_a, _rows(a, grad, offs, None) if needs_b else None)


@_outer_backward.register_fake
def _(grad, a, b, offs, needs_a, needs_b):
    return grad.new_empty(a.shape if needs_a else 0), grad.new_empty(b.shape if needs_b else 0)


def _save_rows(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])


def _backward_of_rows(ctx, grad):
    needs_x, needs_w, _, needs_bias = ctx.needs_input_grad
    grad_x, grad_w, grad_bias = _rows_backward(grad, *ctx.saved_tensors, needs_x, needs_w, needs_bias)
    return grad_x, grad_w.mT if needs_w else None, None, grad_bias


_rows.register_autograd(_backward_of_rows, setup_context=_save_rows)


def _save_outer(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_of_outer(ctx, grad):
    return _outer_backward(grad, *ctx.saved_tensors, *ctx.needs_input_grad[:2])


_outer.register_autograd(_backward_of_outer, setup_context=_save_outer)


def grouped_gemm_triton(x: Tensor, w: Tensor, offs: Tensor | None, bias: Tensor | None) -> Tensor:
    if offs is None:
        return torch.bmm(x, w)  # equal groups
    offs = offs.contiguous()
    if (x.dim(), w.dim()) == (2, 3):
        return _rows(x, w, offs, bias if bias is None else bias.contiguous())
    if (x.dim(), w.dim()) == (2, 2):
        return _outer(x.mT, w, offs)
    return _rows(w.mT, x.mT, offs, None).mT  # groups on the columns: the transposed product


def why_not(x: Tensor, w: Tensor, offs: Tensor | None, bias: Tensor | None) -> str | None:
    return why_not_products(x)
