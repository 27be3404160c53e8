"""`permute` and `unpermute` on the kernels as torch operators with their gradients; ``backend`` names whose kernels."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from diffmoe_kernels.operator import launchers, operator
from diffmoe_kernels.routing import Routing, for_kernels

kernels = functools.partial(launchers, "permute")


@operator("permute")
def _permute(
    x: Tensor,
    token_indices: Tensor,
    group_offsets: Tensor,
    token_offsets: Tensor,
    token_rows: Tensor,
    backend: str,
) -> Tensor:
    return kernels(backend).permute_fwd(x, token_indices, group_offsets)


@_permute.register_fake
def _(x, token_indices, group_offsets, token_offsets, token_rows, backend):
    return x.new_empty(token_indices.shape[0], x.shape[1])


@operator("permute_backward")
def _permute_backward(grad_rows: Tensor, token_offsets: Tensor, token_rows: Tensor, backend: str) -> Tensor:
    return kernels(backend).unpermute_fwd(grad_rows.contiguous(), None, token_offsets, token_rows)


@_permute_backward.register_fake
def _(grad_rows, token_offsets, token_rows, backend):
    return grad_rows.new_empty(token_offsets.shape[0] - 1, grad_rows.shape[1])


def _save_for_permute(ctx, inputs, output):
    ctx.save_for_backward(*inputs[3:5])
    ctx.backend = inputs[5]


def _backward_of_permute(ctx, grad_rows):
    return _permute_backward(grad_rows, *ctx.saved_tensors, ctx.backend)


_permute.register_autograd(_backward_of_permute, setup_context=_save_for_permute)


@operator("unpermute")
def _unpermute(
    rows: Tensor,
    gates: Tensor,
    token_indices: Tensor,
    group_offsets: Tensor,
    token_offsets: Tensor,
    token_rows: Tensor,
    backend: str,
) -> Tensor:
    return kernels(backend).unpermute_fwd(rows, gates, token_offsets, token_rows)


@_unpermute.register_fake
def _(rows, gates, token_indices, group_offsets, token_offsets, token_rows, backend):
    return rows.new_empty(token_offsets.shape[0] - 1, rows.shape[1])


@operator("unpermute_backward")
def _unpermute_backward(
    grad_out: Tensor, rows: Tensor, gates: Tensor, token_indices: Tensor, group_offsets: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return kernels(backend).unpermute_bwd(grad_out.contiguous(), rows, gates, token_indices, group_offsets)


@_unpermute_backward.register_fake
def _(grad_out, rows, gates, token_indices, group_offsets, backend):
    return torch.empty_like(rows), torch.empty_like(gates)


def _save_for_unpermute(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.backend = inputs[6]


def _backward_of_unpermute(ctx, grad_out):
    return _unpermute_backward(grad_out, *ctx.saved_tensors, ctx.backend)


_unpermute.register_autograd(_backward_of_unpermute, setup_context=_save_for_unpermute)


def permute_on_kernels(backend: str, x: Tensor, routing: Routing) -> Tensor:
    routing = for_kernels(routing)
    maps = routing.token_indices, routing.group_offsets, routing.token_offsets, routing.token_rows
    return _permute(x.contiguous(), *maps, backend)


def unpermute_on_kernels(backend: str, rows: Tensor, routing: Routing) -> Tensor:
    routing = for_kernels(routing)
    maps = routing.token_indices, routing.group_offsets, routing.token_offsets, routing.token_rows
    return _unpermute(rows.contiguous(), routing.gates, *maps, backend)
