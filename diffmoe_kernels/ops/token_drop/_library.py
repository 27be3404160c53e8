"""The `token_drop` ops on the Triton kernels as torch operators, with their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe_kernels.operator import operator
from diffmoe_kernels.ops.token_drop import _capacity, _choice, _triton
from diffmoe_kernels.routing import Routing, for_kernels

# The fields of a Routing, but the gates first: opcheck adds to the first output, which so must be floating.
Maps = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@operator("token_drop")
def _token_drop(scores: Tensor, expert_capacity: int, num_pools: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _triton.route(scores, expert_capacity, num_pools)


@_token_drop.register_fake
def _(scores, expert_capacity, num_pools):
    return _maps_like(scores, scores.shape[1] * num_pools * expert_capacity)


@operator("token_drop_predicted")
def _token_drop_predicted(
    scores: Tensor, logits: Tensor, thresholds: Tensor, max_capacity: int, by_token: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _triton.route(scores, max_capacity, 1, logits, thresholds, by_token)


@_token_drop_predicted.register_fake
def _(scores, logits, thresholds, max_capacity, by_token):
    return *_maps_like(scores, scores.shape[1] * max_capacity), scores.new_empty((), dtype=torch.int64)


@operator("token_drop_backward")
def _token_drop_backward(
    grad_gates: Tensor, group_offsets: Tensor, token_offsets: Tensor, token_rows: Tensor, dtype: torch.dtype
) -> Tensor:
    return _triton.spread_gates(grad_gates.contiguous(), group_offsets, token_offsets, token_rows, dtype)


@_token_drop_backward.register_fake
def _(grad_gates, group_offsets, token_offsets, token_rows, dtype):
    return grad_gates.new_empty(token_offsets.shape[0] - 1, group_offsets.shape[0], dtype=dtype)


def _save_maps(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:5])
    ctx.dtype, ctx.num_others = inputs[0].dtype, len(inputs) - 1


def _backward_of_gates(ctx, grad_gates, *others):
    grad = None if grad_gates is None else _token_drop_backward(grad_gates, *ctx.saved_tensors, ctx.dtype)
    return grad, *[None] * ctx.num_others


_token_drop.register_autograd(_backward_of_gates, setup_context=_save_maps)
_token_drop_predicted.register_autograd(_backward_of_gates, setup_context=_save_maps)


@operator("capacity_loss")
def _capacity_loss(logits: Tensor, group_offsets: Tensor, token_offsets: Tensor, token_rows: Tensor) -> Tensor:
    return _capacity.cross_entropy(logits, group_offsets, token_offsets, token_rows)


@_capacity_loss.register_fake
def _(logits, group_offsets, token_offsets, token_rows):
    return logits.new_empty((), dtype=torch.float32)


@operator("capacity_loss_backward")
def _capacity_loss_backward(
    grad: Tensor, logits: Tensor, group_offsets: Tensor, token_offsets: Tensor, token_rows: Tensor
) -> Tensor:
    return _capacity.cross_entropy_backward(grad, logits, group_offsets, token_offsets, token_rows)


@_capacity_loss_backward.register_fake
def _(grad, logits, group_offsets, token_offsets, token_rows):
    return torch.empty_like(logits)


def _save_inputs(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward_of_loss(ctx, grad):
    return None if grad is None else _capacity_loss_backward(grad, *ctx.saved_tensors), None, None, None


_capacity_loss.register_autograd(_backward_of_loss, setup_context=_save_inputs)


@operator("capacity_quantile")
def _capacity_quantile(logits: Tensor, expert_capacity: int) -> Tensor:
    return _capacity.kth_prediction(logits, expert_capacity)


@_capacity_quantile.register_fake
def _(logits, expert_capacity):
    return logits.new_empty(logits.shape[1], dtype=torch.float32)


@operator("token_choice_drop")
def _token_choice_drop(
    topk_ids: Tensor, scores: Tensor, num_experts: int, expert_capacity: int
) -> tuple[Tensor, Tensor]:
    return _choice.drop_choices(topk_ids, scores, num_experts, expert_capacity)


@_token_choice_drop.register_fake
def _(topk_ids, scores, num_experts, expert_capacity):
    return torch.empty_like(topk_ids), topk_ids.new_empty((), dtype=torch.int64)


def token_drop_triton(router_scores: Tensor, expert_capacity: int, num_pools: int) -> Routing:
    gates, token_indices, *offsets = _token_drop(router_scores.contiguous(), expert_capacity, num_pools)
    return Routing(token_indices, gates, *offsets)


def token_drop_predicted_triton(
    router_scores: Tensor, capacity_logits: Tensor, thresholds: Tensor, max_capacity: int, rule: str
) -> tuple[Routing, Tensor]:
    predictions = capacity_logits.detach().contiguous(), thresholds.detach().contiguous()
    gates, token_indices, *offsets, dropped = _token_drop_predicted(
        router_scores.contiguous(), *predictions, max_capacity, rule == "token"
    )
    return Routing(token_indices, gates, *offsets), dropped


def capacity_loss_triton(capacity_logits: Tensor, routing: Routing) -> Tensor:
    routing = for_kernels(routing)
    maps = routing.group_offsets, routing.token_offsets, routing.token_rows
    return _capacity_loss(capacity_logits.contiguous(), *maps)


def capacity_quantile_triton(capacity_logits: Tensor, expert_capacity: int) -> Tensor:
    return _capacity_quantile(capacity_logits.detach().contiguous(), expert_capacity)


def token_choice_drop_triton(
    topk_ids: Tensor, drop_scores: Tensor, num_experts: int, expert_capacity: int
) -> tuple[Tensor, Tensor]:
    return _token_choice_drop(topk_ids.contiguous(), drop_scores.detach().contiguous(), num_experts, expert_capacity)


def _maps_like(scores: Tensor, num_rows: int) -> Maps:
    num_tokens, num_experts = scores.shape
    return (
        scores.new_empty(num_rows, dtype=torch.float32),
        scores.new_empty(num_rows, dtype=torch.int32),
        scores.new_empty(num_experts, dtype=torch.int32),
        scores.new_empty(num_tokens + 1, dtype=torch.int32),
        scores.new_empty(num_rows, dtype=torch.int32),
    )
