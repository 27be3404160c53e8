"""`capacity_loss` and `capacity_quantile` on the Triton kernels as torch operators, with the loss's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe_kernels.operator import operator
from diffmoe_kernels.ops.token_drop import _capacity
from diffmoe_kernels.routing import Routing, for_kernels


@operator("capacity_loss")
def _capacity_loss(logits: Tensor, group_offsets: Tensor, token_offsets: Tensor, token_rows: Tensor) -> Tensor:
    return _capacity.capacity_loss_fwd(logits, group_offsets, token_offsets, token_rows)


@_capacity_loss.register_fake
def _(logits, group_offsets, token_offsets, token_rows):
    return logits.new_empty((), dtype=torch.float32)


@operator("capacity_loss_backward")
def _capacity_loss_backward(
    grad: Tensor, logits: Tensor, group_offsets: Tensor, token_offsets: Tensor, token_rows: Tensor
) -> Tensor:
    return _capacity.capacity_loss_bwd(grad, logits, group_offsets, token_offsets, token_rows)


@_capacity_loss_backward.register_fake
def _(grad, logits, group_offsets, token_offsets, token_rows):
    return torch.empty_like(logits)


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_of_loss(ctx, grad):
    return _capacity_loss_backward(grad, *ctx.saved_tensors)


_capacity_loss.register_autograd(_backward_of_loss, setup_context=_save_inputs)


@operator("capacity_quantile")
def _capacity_quantile(logits: Tensor, expert_capacity: int) -> Tensor:
    return _capacity.capacity_quantile_fwd(logits, expert_capacity)


@_capacity_quantile.register_fake
def _(logits, expert_capacity):
    return logits.new_empty(logits.shape[1], dtype=torch.float32)


def capacity_loss_triton(capacity_logits: Tensor, routing: Routing) -> Tensor:
    routing = for_kernels(routing)
    maps = routing.group_offsets, routing.token_offsets, routing.token_rows
    return _capacity_loss(capacity_logits.contiguous(), *maps)


def capacity_quantile_triton(capacity_logits: Tensor, expert_capacity: int) -> Tensor:
    return _capacity_quantile(capacity_logits.detach().contiguous(), expert_capacity)
