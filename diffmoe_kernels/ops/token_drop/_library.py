"""What chooses and drops tokens, on the kernels, as torch operators; ``backend`` names whose kernels."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from diffmoe_kernels.operator import launchers, operator
from diffmoe_kernels.routing import Routing, check_rows, empty_fields

kernels = functools.partial(launchers, "token_drop")


@operator("token_drop")
def _token_drop(
    scores: Tensor, expert_capacity: int, num_pools: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_rows(scores.shape[1] * num_pools * expert_capacity)
    return kernels(backend).token_drop_fwd(scores, expert_capacity, num_pools)


@_token_drop.register_fake
def _(scores, expert_capacity, num_pools, backend):
    return empty_fields(scores.new_empty, scores.shape[1] * num_pools * expert_capacity, *scores.shape)


@operator("token_drop_predicted")
def _token_drop_predicted(
    scores: Tensor, logits: Tensor, thresholds: Tensor, max_capacity: int, by_token: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_rows(scores.shape[1] * max_capacity)
    return kernels(backend).token_drop_fwd(scores, max_capacity, 1, logits, thresholds, by_token)


@_token_drop_predicted.register_fake
def _(scores, logits, thresholds, max_capacity, by_token, backend):
    routing = empty_fields(scores.new_empty, scores.shape[1] * max_capacity, *scores.shape)
    return *routing, scores.new_empty((), dtype=torch.int64)


@operator("token_drop_backward")
def _token_drop_backward(
    grad_gates: Tensor,
    group_offsets: Tensor,
    token_offsets: Tensor,
    token_rows: Tensor,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return kernels(backend).token_drop_bwd(grad_gates.contiguous(), group_offsets, token_offsets, token_rows, dtype)


@_token_drop_backward.register_fake
def _(grad_gates, group_offsets, token_offsets, token_rows, dtype, backend):
    return grad_gates.new_empty(token_offsets.shape[0] - 1, group_offsets.shape[0], dtype=dtype)


def _save_maps(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:5])
    ctx.options = inputs[0].dtype, inputs[-1]


def _backward_of_gates(ctx, grad_gates, *others):
    return _token_drop_backward(grad_gates, *ctx.saved_tensors, *ctx.options)


_token_drop.register_autograd(_backward_of_gates, setup_context=_save_maps)
_token_drop_predicted.register_autograd(_backward_of_gates, setup_context=_save_maps)


@operator("token_choice_drop")
def _token_choice_drop(
    topk_ids: Tensor, scores: Tensor, num_experts: int, expert_capacity: int, backend: str
) -> tuple[Tensor, Tensor]:
    check_rows(topk_ids.numel())
    return kernels(backend).token_choice_drop_fwd(topk_ids, scores, num_experts, expert_capacity)


@_token_choice_drop.register_fake
def _(topk_ids, scores, num_experts, expert_capacity, backend):
    return torch.empty_like(topk_ids), topk_ids.new_empty((), dtype=torch.int64)


def token_drop_on_kernels(backend: str, router_scores: Tensor, expert_capacity: int, num_pools: int) -> Routing:
    gates, token_indices, *offsets = _token_drop(router_scores.contiguous(), expert_capacity, num_pools, backend)
    return Routing(token_indices, gates, *offsets)


def token_drop_predicted_on_kernels(
    backend: str,
    router_scores: Tensor,
    capacity_logits: Tensor,
    thresholds: Tensor,
    max_capacity: int,
    rule: str,
) -> tuple[Routing, Tensor]:
    predictions = capacity_logits.detach().contiguous(), thresholds.detach().contiguous()
    gates, token_indices, *offsets, dropped = _token_drop_predicted(
        router_scores.contiguous(), *predictions, max_capacity, rule == "token", backend
    )
    return Routing(token_indices, gates, *offsets), dropped


def token_choice_drop_on_kernels(
    backend: str, topk_ids: Tensor, drop_scores: Tensor, num_experts: int, expert_capacity: int
) -> tuple[Tensor, Tensor]:
    choices = topk_ids.contiguous(), drop_scores.detach().contiguous()
    return _token_choice_drop(*choices, num_experts, expert_capacity, backend)
