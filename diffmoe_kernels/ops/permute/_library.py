"""`permute` and `unpermute` on the Triton kernels as torch operators, with their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe_kernels.operator import operator
from diffmoe_kernels.ops.permute._triton import gather, gather_sum, unpermute_backward
from diffmoe_kernels.routing import Routing, for_kernels


@operator("permute")
def _permute(
    x: Tensor, token_indices: Tensor, group_offsets: Tensor, token_offsets: Tensor, token_rows: Tensor
) -> Tensor:
    return gather(x, token_indices, group_offsets)


@_permute.register_fake
def _(x, token_indices, group_offsets, token_offsets, token_rows):
    return x.new_empty(token_indices.shape[0], x.shape[1])


@operator("permute_backward")
def _permute_backward(grad_rows: Tensor, token_offsets: Tensor, token_rows: Tensor) -> Tensor:
    return gather_sum(grad_rows.contiguous(), None, token_offsets, token_rows)


@_permute_backward.register_fake
def _(grad_rows, token_offsets, token_rows):
    return grad_rows.new_empty(token_offsets.shape[0] - 1, grad_rows.shape[1])


def _save_for_permute(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[3:])


def _backward_of_permute(ctx, grad_rows):
    grad_x = None if grad_rows is None else _permute_backward(grad_rows, *ctx.saved_tensors)
    return grad_x, None, None, None, None


_permute.register_autograd(_backward_of_permute, setup_context=_save_for_permute)


@operator("unpermute")
def _unpermute(
    rows: Tensor, gates: Tensor, token_indices: Tensor, group_offsets: Tensor, token_offsets: Tensor, token_rows: Tensor
) -> Tensor:
    return gather_sum(rows, gates, token_offsets, token_rows)


@_unpermute.register_fake
def _(rows, gates, token_indices, group_offsets, token_offsets, token_rows):
    return rows.new_empty(token_offsets.shape[0] - 1, rows.shape[1])


@operator("unpermute_backward")
def _unpermute_backward(
    grad_out: Tensor, rows: Tensor, gates: Tensor, token_indices: Tensor, group_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    return unpermute_backward(grad_out.contiguous(), rows, gates, token_indices, group_offsets)


@_unpermute_backward.register_fake
def _(grad_out, rows, gates, token_indices, group_offsets):
    return torch.empty_like(rows), torch.empty_like(gates)


def _save_for_unpermute(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4])


def _backward_of_unpermute(ctx, grad_out):
    if grad_out is None:
        return None, None, None, None, None, None
    return *_unpermute_backward(grad_out, *ctx.saved_tensors), None, None, None, None


_unpermute.register_autograd(_backward_of_unpermute, setup_context=_save_for_unpermute)


def permute_triton(x: Tensor, routing: Routing) -> Tensor:
    routing = for_kernels(routing)
    maps = routing.token_indices, routing.group_offsets, routing.token_offsets, routing.token_rows
    return _permute(x.contiguous(), *maps)


def unpermute_triton(rows: Tensor, routing: Routing) -> Tensor:
    routing = for_kernels(routing)
    maps = routing.token_indices, routing.group_offsets, routing.token_offsets, routing.token_rows
    return _unpermute(rows.contiguous(), routing.gates, *maps)
