"""`routing_from_topk` on the Triton kernels as a torch operator with its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe_kernels.operator import operator
from diffmoe_kernels.ops.router_topk._from_topk import routing_from_topk_bwd, routing_from_topk_fwd
from diffmoe_kernels.routing import Routing, check_rows, empty_fields


@operator("routing_from_topk")
def _routing_from_topk(
    topk_weights: Tensor, topk_ids: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_rows(topk_ids.numel())
    return routing_from_topk_fwd(topk_ids, topk_weights, num_experts)


@_routing_from_topk.register_fake
def _(topk_weights, topk_ids, num_experts):
    return empty_fields(topk_ids.new_empty, topk_ids.numel(), topk_ids.shape[0], num_experts)


@operator("routing_from_topk_backward")
def _routing_from_topk_backward(
    grad_gates: Tensor,
    topk_ids: Tensor,
    token_offsets: Tensor,
    token_rows: Tensor,
    num_experts: int,
    dtype: torch.dtype,
) -> Tensor:
    return routing_from_topk_bwd(grad_gates.contiguous(), topk_ids, token_offsets, token_rows, num_experts, dtype)


@_routing_from_topk_backward.register_fake
def _(grad_gates, topk_ids, token_offsets, token_rows, num_experts, dtype):
    return torch.empty_like(topk_ids, dtype=dtype)


def _save_choices(ctx, inputs, output):
    topk_weights, topk_ids, num_experts = inputs
    _, *maps = output
    ctx.mark_non_differentiable(*maps)
    ctx.save_for_backward(topk_ids, *maps[2:])
    ctx.options = num_experts, topk_weights.dtype


def _backward_of_choices(ctx, grad_gates, *others):
    return _routing_from_topk_backward(grad_gates, *ctx.saved_tensors, *ctx.options)


_routing_from_topk.register_autograd(_backward_of_choices, setup_context=_save_choices)


def routing_from_topk_triton(topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> Routing:
    gates, token_indices, *maps = _routing_from_topk(topk_weights.contiguous(), topk_ids.contiguous(), num_experts)
    return Routing(token_indices, gates, *maps)
