"""The differentiable operators around the kernels of `router_topk` and `routing_from_topk`."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe_kernels.operator import operator
from diffmoe_kernels.ops.router_topk._from_topk import maps_like, sort_choices, sort_choices_backward
from diffmoe_kernels.ops.router_topk._triton import outputs_of, route
from diffmoe_kernels.ops.router_topk._triton_backward import route_backward
from diffmoe_kernels.ops.router_topk.reference import RouterTopK
from diffmoe_kernels.routing import Routing


@operator("router_topk")
def _router_topk(
    router_logits: Tensor,
    expert_bias: Tensor | None,
    top_k: int,
    softmax: bool,
    num_groups: int,
    top_groups: int,
    masked_group_fill: float,
    normalize: bool,
    scaling_factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return route(
        router_logits,
        expert_bias,
        top_k,
        softmax,
        num_groups,
        top_groups,
        masked_group_fill,
        normalize,
        scaling_factor,
    )


@_router_topk.register_fake
def _(router_logits, expert_bias, top_k, *options):
    return outputs_of(router_logits, top_k)


@operator("router_topk_backward")
def _router_topk_backward(
    grad_weights: Tensor | None,
    grad_scores: Tensor | None,
    grad_gates: Tensor | None,
    scores: Tensor,
    topk_ids: Tensor,
    token_rows: Tensor,
    softmax: bool,
    normalize: bool,
    scaling_factor: float,
    dtype: torch.dtype,
) -> Tensor:
    grads = (None if grad is None else grad.contiguous() for grad in (grad_weights, grad_scores, grad_gates))
    return route_backward(*grads, scores, topk_ids, token_rows, softmax, normalize, scaling_factor, dtype)


@_router_topk_backward.register_fake
def _(grad_weights, grad_scores, grad_gates, scores, topk_ids, token_rows, softmax, normalize, scaling_factor, dtype):
    return torch.empty_like(scores, dtype=dtype)


def _save(ctx, inputs, output):
    router_logits, _, _, softmax, _, _, _, normalize, scaling_factor = inputs
    _, scores, _, topk_ids, *_, token_rows = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(scores, topk_ids, token_rows)
    ctx.options = softmax, normalize, scaling_factor, router_logits.dtype


def _backward(ctx, *grads):
    grad_logits = None
    if any(grad is not None for grad in grads[:3]):
        grad_logits = _router_topk_backward(*grads[:3], *ctx.saved_tensors, *ctx.options)
    return grad_logits, *(None,) * 8


_router_topk.register_autograd(_backward, setup_context=_save)


def router_topk_triton(
    router_logits: Tensor,
    top_k: int,
    *,
    expert_bias: Tensor | None,
    score_function: str,
    num_groups: int,
    top_groups: int,
    masked_group_fill: float,
    normalize_weights: bool,
    scaling_factor: float,
) -> RouterTopK:
    topk_weights, scores, gates, topk_ids, token_indices, *maps = _router_topk(
        router_logits.contiguous(),
        None if expert_bias is None else expert_bias.detach().contiguous(),
        top_k,
        score_function == "softmax",
        num_groups,
        top_groups,
        masked_group_fill,
        normalize_weights,
        scaling_factor,
    )
    return RouterTopK(Routing(token_indices, gates, *maps), topk_ids, topk_weights, scores)


@operator("routing_from_topk")
def _routing_from_topk(
    topk_weights: Tensor, topk_ids: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return sort_choices(topk_ids, topk_weights, num_experts)


@_routing_from_topk.register_fake
def _(topk_weights, topk_ids, num_experts):
    return maps_like(topk_ids, num_experts)


@operator("routing_from_topk_backward")
def _routing_from_topk_backward(
    grad_gates: Tensor,
    topk_ids: Tensor,
    token_offsets: Tensor,
    token_rows: Tensor,
    num_experts: int,
    dtype: torch.dtype,
) -> Tensor:
    return sort_choices_backward(grad_gates.contiguous(), topk_ids, token_offsets, token_rows, num_experts, dtype)


@_routing_from_topk_backward.register_fake
def _(grad_gates, topk_ids, token_offsets, token_rows, num_experts, dtype):
    return torch.empty_like(topk_ids, dtype=dtype)


def _save_choices(ctx, inputs, output):
    topk_weights, topk_ids, num_experts = inputs
    _, *maps = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*maps)
    ctx.save_for_backward(topk_ids, *maps[2:])
    ctx.options = num_experts, topk_weights.dtype


def _backward_of_choices(ctx, grad_gates, *others):
    grad = None if grad_gates is None else _routing_from_topk_backward(grad_gates, *ctx.saved_tensors, *ctx.options)
    return grad, None, None


_routing_from_topk.register_autograd(_backward_of_choices, setup_context=_save_choices)


def routing_from_topk_triton(topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> Routing:
    gates, token_indices, *maps = _routing_from_topk(topk_weights.contiguous(), topk_ids.contiguous(), num_experts)
    return Routing(token_indices, gates, *maps)
