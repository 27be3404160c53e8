"""`router_topk` on the kernels as a torch operator with its gradient; ``backend`` names whose kernels."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from diffmoe_kernels.operator import launchers, operator
from diffmoe_kernels.ops.router_topk.outputs import outputs_of
from diffmoe_kernels.ops.router_topk.reference import RouterTopK
from diffmoe_kernels.routing import Routing, check_rows

kernels = functools.partial(launchers, "router_topk")


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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_rows(router_logits.shape[0] * top_k)
    return kernels(backend).router_topk_fwd(
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
    scores: Tensor,
    topk_ids: Tensor,
    token_rows: Tensor,
    grad_weights: Tensor | None,
    grad_scores: Tensor | None,
    grad_gates: Tensor | None,
    softmax: bool,
    normalize: bool,
    scaling_factor: float,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    grads = (None if grad is None else grad.contiguous() for grad in (grad_weights, grad_scores, grad_gates))
    rest = scores, topk_ids, token_rows, softmax, normalize, scaling_factor, dtype
    return kernels(backend).router_topk_bwd(*grads, *rest)


@_router_topk_backward.register_fake
def _(scores, *others):
    return torch.empty_like(scores, dtype=others[-2])


def _save(ctx, inputs, output):
    router_logits, _, _, softmax, _, _, _, normalize, scaling_factor, backend = inputs
    _, scores, _, topk_ids, *_, token_rows = output
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(scores, topk_ids, token_rows)
    ctx.options = softmax, normalize, scaling_factor, router_logits.dtype, backend


def _backward(ctx, *grads):
    return _router_topk_backward(*ctx.saved_tensors, *grads[:3], *ctx.options)


_router_topk.register_autograd(_backward, setup_context=_save)


def router_topk_on_kernels(
    backend: str,
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
        backend,
    )
    return RouterTopK(Routing(token_indices, gates, *maps), topk_ids, topk_weights, scores)
