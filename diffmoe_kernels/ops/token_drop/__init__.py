"""Capacity-based dynamic token dropping.

Expert choice over a pool of tokens with a fixed capacity (`token_drop`: DiffMoE in training, EC-DiT) or a predicted one
(`token_drop_predicted`: DiffMoE at inference; `capacity_loss` and `capacity_quantile` train the prediction), and the
same bound for token choice (`token_choice_drop`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from diffmoe_kernels.backend import KERNEL_BACKENDS, Backend, Implementation, pytorch_only, run
from diffmoe_kernels.checks import (
    check_choice,
    check_floating,
    check_integer,
    check_same_device,
    check_shape,
    check_sizes,
    check_whole,
)
from diffmoe_kernels.measured import fastest, tokens_class
from diffmoe_kernels.ops.token_drop._library import (
    token_choice_drop_on_kernels,
    token_drop_on_kernels,
    token_drop_predicted_on_kernels,
)
from diffmoe_kernels.ops.token_drop.reference import (
    capacity_loss_reference,
    capacity_quantile_reference,
    token_choice_drop_reference,
    token_drop_predicted_reference,
    token_drop_reference,
)
from diffmoe_kernels.routing import Routing, check_routing
from diffmoe_kernels.triton_support import HAS_TRITON

RULES = ("pool", "token")
MAX_EXPERTS = 256  # of the CUDA kernels
MAX_POOL = 65280 * 256  # tokens of a pool, of whose 256 chunks they keep counts of 16 bits


def token_drop(
    router_scores: Tensor, expert_capacity: int, *, num_pools: int = 1, backend: Backend = "auto"
) -> Routing:
    """Expert choice: each expert takes the ``expert_capacity`` tokens that score highest for it (arXiv:2202.09368).

    Args:
        router_scores: (T, E) floating; the gates are these scores and their gradient flows back here. T tokens may be
            num_pools equal runs (samples), E experts.
        expert_capacity: tokens that each expert takes from each pool, at most T / num_pools.
        num_pools: 1 chooses over the whole batch (DiffMoE), the batch size over each sample by itself (EC-DiT).
        backend: see `diffmoe_kernels.backend`.

    Returns:
        A `Routing` of E * num_pools * expert_capacity rows. Ties go to the lower token index.

    Raises:
        TypeError: scores that are not floating.
        ValueError: scores that are not (T, E), pools that do not divide T, a capacity beyond a pool's tokens.
    """
    _check_scores(router_scores)
    num_tokens = router_scores.shape[0]
    check_whole(num_pools=num_pools)
    if num_pools < 1 or num_tokens % num_pools:
        raise ValueError(f"num_pools: expected a divisor of the {num_tokens} tokens, got {num_pools}")
    _check_capacity("expert_capacity", expert_capacity, num_tokens // num_pools)
    return run("token_drop", backend, _TOKEN_DROP, router_scores, expert_capacity, num_pools)


def token_drop_predicted(
    router_scores: Tensor,
    capacity_logits: Tensor,
    thresholds: Tensor,
    *,
    rule: str = "pool",
    max_capacity: int | None = None,
    backend: Backend = "auto",
) -> tuple[Routing, Tensor]:
    """Expert choice with a predicted capacity, as DiffMoE infers (arXiv:2503.14487, section 3.3).

    A token passes at expert e where sigmoid(capacity_logits[:, e]) > thresholds[e]. The count stays on the device.

    Args:
        router_scores: (T, E) floating.
        capacity_logits: (T, E) floating, the capacity predictor's output.
        thresholds: (E,) floating, in [0, 1].
        rule: "pool": as many tokens as passed, those that score highest (the official rule; a token's result depends on
            its batch). "token": the tokens that passed, each by itself.
        max_capacity: bound on the tokens of an expert; T where None. Past it the lowest-scored are dropped.
        backend: see `diffmoe_kernels.backend`.

    Returns:
        A `Routing` with the bound R = E * max_capacity and the true count in ``group_offsets[-1]``, and the number of
        rows that the bound dropped, () int64. Ties go to the lower token index.

    Raises:
        TypeError: arguments that are not floating.
        ValueError: shapes that do not fit, or a bound beyond T.
    """
    _check_scores(router_scores)
    num_tokens, num_experts = router_scores.shape
    check_floating("capacity_logits", capacity_logits)
    check_floating("thresholds", thresholds)
    check_shape("capacity_logits", capacity_logits, num_tokens, num_experts)
    check_shape("thresholds", thresholds, num_experts)
    check_same_device(router_scores=router_scores, capacity_logits=capacity_logits, thresholds=thresholds)
    check_choice("rule", rule, RULES)
    max_capacity = num_tokens if max_capacity is None else max_capacity
    _check_capacity("max_capacity", max_capacity, num_tokens)
    arguments = (router_scores, capacity_logits, thresholds, max_capacity, rule)
    return run("token_drop_predicted", backend, _PREDICTED, *arguments)


def capacity_loss(capacity_logits: Tensor, routing: Routing, *, backend: Backend = "auto") -> Tensor:
    """The capacity predictor's loss (arXiv:2503.14487): mean binary cross-entropy against the experts' choice.

    Args:
        capacity_logits: (T, E) floating; the gradient flows here alone.
        routing: what the experts chose, of T tokens and E experts.
        backend: see `diffmoe_kernels.backend`.

    Returns:
        () float32 (float64 for float64).

    Raises:
        TypeError: logits that are not floating, or another object than a `Routing`.
        ValueError: logits that are not (T, E) of the routing.
    """
    check_routing(routing)
    check_floating("capacity_logits", capacity_logits)
    check_shape("capacity_logits", capacity_logits, routing.num_tokens, routing.num_experts)
    check_same_device(capacity_logits=capacity_logits, routing=routing.gates)
    return run("capacity_loss", backend, _CAPACITY_LOSS, capacity_logits, routing)


def capacity_quantile(capacity_logits: Tensor, expert_capacity: int, *, backend: Backend = "auto") -> Tensor:
    """The prediction above which an expert's ``expert_capacity`` tokens lie: what its threshold moves towards.

    Args:
        capacity_logits: (T, E) floating.
        expert_capacity: at most T.
        backend: see `diffmoe_kernels.backend`.

    Returns:
        (E,) float32 (float64 for float64): the expert_capacity-th largest sigmoid, 1 where expert_capacity is 0. No
        gradient flows through it.

    Raises:
        TypeError: logits that are not floating.
        ValueError: logits that are not (T, E), or a capacity beyond T.
    """
    check_floating("capacity_logits", capacity_logits)
    check_shape("capacity_logits", capacity_logits, "T", "E")
    _check_capacity("expert_capacity", expert_capacity, capacity_logits.shape[0])
    return run("capacity_quantile", backend, _CAPACITY_QUANTILE, capacity_logits, expert_capacity)


def token_choice_drop(
    topk_ids: Tensor, drop_scores: Tensor, num_experts: int, expert_capacity: int, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Drops the choices past each expert's capacity, the lowest-scored first.

    The bound is that of Switch Transformers (arXiv:2101.03961) and MegaBlocks' dropping layers; those drop by position.

    Args:
        topk_ids: (T, K) signed integer; one outside [0, E) is a slot that is dropped already, and stays as it is.
        drop_scores: (T, K) floating: what ranks an expert's choices, usually topk_weights. No gradient flows to it.
        num_experts: E.
        expert_capacity: choices that an expert keeps, usually int(K * T / E * capacity_factor).
        backend: see `diffmoe_kernels.backend`.

    Returns:
        topk_ids with -1 in the dropped slots, as `Routing.from_topk` takes them, and how many were dropped, () int64.
        Ties keep the lower token index.

    Raises:
        TypeError: ids that are not signed integers or scores that are not floating.
        ValueError: shapes that differ, num_experts < 1, or a negative capacity.
    """
    check_integer("topk_ids", topk_ids)
    if not topk_ids.dtype.is_signed:
        raise TypeError(f"topk_ids: expected a signed dtype, for -1 in the dropped slots, got {topk_ids.dtype}")
    check_floating("drop_scores", drop_scores)
    check_shape("topk_ids", topk_ids, "T", "K")
    check_shape("drop_scores", drop_scores, *topk_ids.shape)
    check_same_device(topk_ids=topk_ids, drop_scores=drop_scores)
    check_sizes(1, num_experts=num_experts)
    check_sizes(0, expert_capacity=expert_capacity)
    return run("token_choice_drop", backend, _TOKEN_CHOICE, topk_ids, drop_scores, num_experts, expert_capacity)


def _check_scores(router_scores: Tensor) -> None:
    check_floating("router_scores", router_scores)
    check_shape("router_scores", router_scores, "T", "E")


def _check_capacity(name: str, capacity: int, most: int) -> None:
    check_whole(**{name: capacity})
    if not 0 <= capacity <= most:
        raise ValueError(f"{name}: expected 0 to {most}, the tokens to choose from, got {capacity}")


def _shape_class(first: Tensor, *args: object) -> str:
    return tokens_class(first.shape[0])


def _why_not(backend: str, *tensors: Tensor, num_experts: int = 0, pool_size: int = 0) -> str | None:
    """The tensors are those that the kernels read as numbers."""
    if backend == "cuda" and num_experts > MAX_EXPERTS:
        return f"the kernels take up to {MAX_EXPERTS} experts, not {num_experts}"
    if backend == "cuda" and pool_size > MAX_POOL:
        return f"the kernels take pools of up to {MAX_POOL} tokens, not {pool_size}"
    return next(filter(None, map(KERNEL_BACKENDS[backend], tensors)), None)


def _why_not_drop(backend: str, scores: Tensor, capacity: int, num_pools: int) -> str | None:
    return _why_not(backend, scores, num_experts=scores.shape[1], pool_size=scores.shape[0] // num_pools)


def _why_not_predicted(backend: str, scores: Tensor, logits: Tensor, thresholds: Tensor, *others: object) -> str | None:
    return _why_not(backend, scores, logits, thresholds, num_experts=scores.shape[1], pool_size=scores.shape[0])


def _why_not_choice(backend: str, topk_ids: Tensor, drop_scores: Tensor, *others: object) -> str | None:
    return _why_not(backend, drop_scores)


def _kernels(op: str, function: Callable[..., Any], why_not: Callable[..., str | None]) -> dict[str, Implementation]:
    """Both functions take the backend's name first."""
    return {
        backend: Implementation(
            partial(function, backend), partial(why_not, backend), fastest(op, backend, _shape_class)
        )
        for backend in KERNEL_BACKENDS
    }


_TOKEN_DROP = _kernels("token_drop", token_drop_on_kernels, _why_not_drop) | pytorch_only(token_drop_reference)
_PREDICTED = _kernels("token_drop_predicted", token_drop_predicted_on_kernels, _why_not_predicted) | pytorch_only(
    token_drop_predicted_reference
)
_TOKEN_CHOICE = _kernels("token_choice_drop", token_choice_drop_on_kernels, _why_not_choice) | pytorch_only(
    token_choice_drop_reference
)
_CAPACITY_LOSS = pytorch_only(capacity_loss_reference)
_CAPACITY_QUANTILE = pytorch_only(capacity_quantile_reference)
if HAS_TRITON:
    from diffmoe_kernels.ops.token_drop._capacity_library import capacity_loss_triton, capacity_quantile_triton

    def _in_triton(op: str, function: Callable[..., Any]) -> dict[str, Implementation]:
        why_not = partial(_why_not, "triton")
        return {
            "triton": Implementation(function, lambda logits, _: why_not(logits), fastest(op, "triton", _shape_class))
        }

    _CAPACITY_LOSS = _in_triton("capacity_loss", capacity_loss_triton) | _CAPACITY_LOSS
    _CAPACITY_QUANTILE = _in_triton("capacity_quantile", capacity_quantile_triton) | _CAPACITY_QUANTILE
