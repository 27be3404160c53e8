"""Token choice: each token takes its top-k experts, by its logits or by choices that are given."""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor

from diffmoe_kernels.backend import KERNEL_BACKENDS, Backend, Implementation, pytorch_only, run
from diffmoe_kernels.checks import (
    check_choice,
    check_finite,
    check_floating,
    check_integer,
    check_same_device,
    check_shape,
    check_sizes,
    check_whole,
)
from diffmoe_kernels.measured import fastest, tokens_class
from diffmoe_kernels.ops.router_topk._library import router_topk_on_kernels
from diffmoe_kernels.ops.router_topk.reference import RouterTopK, router_topk_reference
from diffmoe_kernels.ops.router_topk.tiles import MAX_EXPERTS
from diffmoe_kernels.routing import Routing
from diffmoe_kernels.triton_support import HAS_TRITON, why_not_triton

SCORE_FUNCTIONS = ("sigmoid", "softmax")


def router_topk(
    router_logits: Tensor,
    top_k: int,
    *,
    expert_bias: Tensor | None = None,
    score_function: str = "sigmoid",
    num_groups: int = 1,
    top_groups: int = 1,
    masked_group_fill: float = -math.inf,
    normalize_weights: bool = True,
    scaling_factor: float = 1.0,
    backend: Backend = "auto",
) -> RouterTopK:
    """Scores experts and picks the top-k of each token, as DeepSeek-V3 does (arXiv:2412.19437, eq. 12 to 16).

    Arithmetic is float32 (float64 for float64 logits), under autocast too. Ties go to the lower expert index.

    Args:
        router_logits: (T, E) floating.
        top_k: K, experts per token.
        expert_bias: (E,) floating, added to the scores for the choice only, never to the weights.
        score_function: "sigmoid", or "softmax" over the experts.
        num_groups: the E experts are num_groups equal runs; a group's score is the sum of its two best biased scores.
        top_groups: how many groups a token may choose experts from.
        masked_group_fill: the score that experts of the other groups get. -inf rules them out; the official DSMoE
            code fills 0.0, so that a masked expert wins over negative biased scores.
        normalize_weights: divide each token's K weights by their sum, if K > 1.
        scaling_factor: multiplies the weights at the end.
        backend: see `diffmoe_kernels.backend`.

    Returns:
        A `RouterTopK`: choices, weights, scores and the `Routing` of them.

    Raises:
        TypeError: logits or bias that are not floating, or counts that are not integers.
        ValueError: shapes that do not fit, top_k beyond the experts that may be chosen, groups that do not divide E.
    """
    check_floating("router_logits", router_logits)
    check_shape("router_logits", router_logits, "T", "E")
    num_experts = router_logits.shape[1]
    check_floating("expert_bias", expert_bias, optional=True)
    check_shape("expert_bias", expert_bias, num_experts)
    check_same_device(router_logits=router_logits, expert_bias=expert_bias)
    check_router(num_experts, top_k, score_function, num_groups, top_groups, masked_group_fill)
    check_finite(scaling_factor=scaling_factor)
    return run(
        "router_topk",
        backend,
        _IMPLEMENTATIONS,
        router_logits,
        top_k,
        expert_bias=expert_bias,
        score_function=score_function,
        num_groups=num_groups,
        top_groups=top_groups,
        masked_group_fill=masked_group_fill,
        normalize_weights=normalize_weights,
        scaling_factor=scaling_factor,
    )


def routing_from_topk(
    topk_ids: Tensor, topk_weights: Tensor, num_experts: int, *, backend: Backend = "auto"
) -> Routing:
    """`Routing.from_topk`, its definition, with a choice of backend: for routers of one's own.

    Args:
        topk_ids: (T, K) integer, the experts of each token, unchecked; an id outside [0, E) is a dropped slot.
        topk_weights: (T, K) floating, the weight of each slot; the gradient of ``gates`` flows back to it.
        num_experts: E.
        backend: see `diffmoe_kernels.backend`.

    Returns:
        A record of R = T * K rows.

    Raises:
        TypeError: ids or a num_experts that are not integers, or weights that are not floating.
        ValueError: shapes that differ or are not (T, K), different devices, or num_experts < 1.
    """
    check_integer("topk_ids", topk_ids)
    check_floating("topk_weights", topk_weights)
    check_shape("topk_ids", topk_ids, "T", "K")
    check_shape("topk_weights", topk_weights, *topk_ids.shape)
    check_same_device(topk_ids=topk_ids, topk_weights=topk_weights)
    check_sizes(1, num_experts=num_experts)
    return run("routing_from_topk", backend, _FROM_TOPK, topk_ids, topk_weights, num_experts)


def check_router(
    num_experts: int,
    top_k: int,
    score_function: str,
    num_groups: int,
    top_groups: int,
    masked_group_fill: float,
) -> None:
    """Raises ValueError where a token-choice router of these sizes can't choose ``top_k``, TypeError for what is no
    integer."""
    check_whole(num_experts=num_experts, top_k=top_k, num_groups=num_groups, top_groups=top_groups)
    check_choice("score_function", score_function, SCORE_FUNCTIONS)
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k: expected 1 to num_experts = {num_experts}, got {top_k}")
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups: expected a divisor of num_experts = {num_experts}, got {num_groups}")
    if not 1 <= top_groups <= num_groups:
        raise ValueError(f"top_groups: expected 1 to num_groups = {num_groups}, got {top_groups}")
    eligible = top_groups * (num_experts // num_groups)
    if masked_group_fill == -math.inf and top_k > eligible:
        raise ValueError(
            f"top_k: {top_groups} of {num_groups} groups hold {eligible} experts, fewer than top_k = {top_k}; "
            "raise top_groups or lower num_groups"
        )


def _why_not(backend: str, router_logits: Tensor, top_k: int, **options: object) -> str | None:
    if router_logits.shape[1] > MAX_EXPERTS:
        return f"the kernels take up to {MAX_EXPERTS} experts, not {router_logits.shape[1]}"
    return KERNEL_BACKENDS[backend](router_logits)


def _shape_class(first: Tensor, *args: object, **options: object) -> str:
    return tokens_class(first.shape[0])


_IMPLEMENTATIONS = {
    backend: Implementation(
        partial(router_topk_on_kernels, backend),
        partial(_why_not, backend),
        fastest("router_topk", backend, _shape_class),
    )
    for backend in KERNEL_BACKENDS
} | pytorch_only(router_topk_reference)
_FROM_TOPK = pytorch_only(Routing.from_topk)
if HAS_TRITON:
    from diffmoe_kernels.ops.router_topk._from_topk_library import routing_from_topk_triton

    def _why_not_from_topk(topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> str | None:
        return why_not_triton(topk_weights)

    _KERNEL = Implementation(
        routing_from_topk_triton, _why_not_from_topk, fastest("routing_from_topk", "triton", _shape_class)
    )
    _FROM_TOPK = {"triton": _KERNEL, **_FROM_TOPK}
