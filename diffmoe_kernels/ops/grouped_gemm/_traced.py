"""`grouped_gemm` as one operator, where torch.compile can't trace how it is computed.

It traces `grouped_mm` in bfloat16 only, and the definition asks for the groups' sizes, which are values. What runs
inside is what runs eagerly. On the meta device there are no values either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe_kernels.operator import empty_for_none, operator
from diffmoe_kernels.ops.grouped_gemm.reference import grouped_gemm_reference


def has_no_values(x: Tensor) -> bool:
    """Whether x is traced or on the meta device."""
    return torch.compiler.is_compiling() or x.is_meta


def traceable_reference(x: Tensor, w: Tensor, offs: Tensor | None, bias: Tensor | None) -> Tensor:
    """`grouped_gemm_reference`, in one graph with what surrounds it."""
    if offs is None or not has_no_values(x):
        return grouped_gemm_reference(x, w, offs, bias)
    return products(x, w, offs, bias, True)


def _computed(x: Tensor, w: Tensor, offs: Tensor, bias: Tensor | None, by_definition: bool) -> Tensor:
    """One of the three forms with groups, of an operand of 2 dimensions and one of 2 or 3."""
    from diffmoe_kernels.ops.grouped_gemm import _torch

    by_definition = by_definition or _torch.why_not(x, w, offs, bias) is not None  # as gradients of odd sizes
    compute = grouped_gemm_reference if by_definition else _torch.grouped_gemm_torch
    return compute(x, w, offs, bias).contiguous()


@operator("group_products")
def products(x: Tensor, w: Tensor, offs: Tensor, bias: Tensor | None, by_definition: bool) -> Tensor:
    """`grouped_gemm` with groups: 0 where none reaches. Not by definition it is computed by `grouped_mm`."""
    return _computed(x, w, offs, bias, by_definition)


@products.register_fake
def _(x, w, offs, bias, by_definition):
    groups = offs.shape if x.dim() == w.dim() else ()
    return x.new_empty(*groups, x.shape[-2], w.shape[-1])


@operator("group_products_backward")
def _products_backward(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    offs: Tensor,
    needs_x: bool,
    needs_w: bool,
    needs_bias: bool,
    by_definition: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to x, w and the bias (E, N), empty where not needed; each is one of the forms again."""
    grad_x = _computed(grad, w.mT, offs, None, by_definition) if needs_x else None
    grad_w = _computed(x.mT, grad, offs, None, by_definition) if needs_w else None
    grad_bias = None
    if needs_bias:
        group = torch.searchsorted(offs, torch.arange(len(grad), device=offs.device, dtype=offs.dtype), right=True)
        grad_bias = grad.new_zeros(len(offs) + 1, grad.shape[1]).index_add(0, group, grad)[:-1].clone()
    return empty_for_none(grad, grad_x, grad_w, grad_bias)


@_products_backward.register_fake
def _(grad, x, w, offs, needs_x, needs_w, needs_bias, by_definition):
    shapes = x.shape, w.shape, (*offs.shape, grad.shape[-1])
    needs = needs_x, needs_w, needs_bias
    return tuple(grad.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))


def _save(ctx, inputs, output):
    x, w, offs, _, ctx.by_definition = inputs
    ctx.save_for_backward(x, w, offs)


def _backward(ctx, grad):
    needs_x, needs_w, _, needs_bias, _ = ctx.needs_input_grad
    found = _products_backward(grad, *ctx.saved_tensors, needs_x, needs_w, needs_bias, ctx.by_definition)
    return found[0], found[1], None, found[2]


products.register_autograd(_backward, setup_context=_save)
