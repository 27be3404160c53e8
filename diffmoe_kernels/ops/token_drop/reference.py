"""The definition of the `token_drop` ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe_kernels.checks import at_least_float32
from diffmoe_kernels.routing import Routing


def token_drop_reference(router_scores: Tensor, expert_capacity: int, num_pools: int) -> Routing:
    """(T, E) scores -> each expert's best ``expert_capacity`` tokens of each of ``num_pools`` equal pools."""
    num_tokens, num_experts = router_scores.shape
    pools = at_least_float32(router_scores).unflatten(0, (num_pools, num_tokens // num_pools))  # (P, S, E)
    best = _largest_first(pools.detach(), dim=1)[:, :expert_capacity]  # (P, C, E)
    tokens = best.sort(dim=1).values
    gates = pools.gather(1, tokens)
    first = torch.arange(num_pools, device=best.device) * (num_tokens // num_pools)  # (P,)
    tokens = (tokens + first.view(-1, 1, 1)).permute(2, 0, 1).flatten(1)  # (E, P * C)
    return Routing.from_expert_choice(tokens, gates.permute(2, 0, 1).flatten(1), num_tokens)


def token_drop_predicted_reference(
    router_scores: Tensor, capacity_logits: Tensor, thresholds: Tensor, max_capacity: int, rule: str
) -> tuple[Routing, Tensor]:
    """(T, E) scores and capacity predictions -> routing of a predicted count per expert, number of rows dropped."""
    num_tokens = router_scores.shape[0]
    scores = at_least_float32(router_scores).t()  # (E, T)
    passed = (at_least_float32(capacity_logits).sigmoid() > thresholds).t()  # (E, T)
    wanted = passed.sum(1)  # (E,)
    counts = wanted.clamp(max=max_capacity)
    best = _largest_first(scores.detach(), dim=1)  # (E, T)
    if rule == "token":  # those that passed come first, and there are at least as many as places
        best = best.gather(1, _largest_first(passed.gather(1, best).int(), dim=1))
    best = best[:, :max_capacity]  # (E, C)
    chosen = torch.arange(max_capacity, device=best.device) < counts.unsqueeze(1)
    tokens = best.where(chosen, num_tokens).sort(dim=1).values  # the chosen first, ascending
    tokens = tokens.clamp(max=max(num_tokens - 1, 0))
    return Routing.from_expert_choice(tokens, scores.gather(1, tokens), num_tokens, counts), (wanted - counts).sum()


def capacity_loss_reference(capacity_logits: Tensor, routing: Routing) -> Tensor:
    """() mean over tokens and experts of the binary cross-entropy of the predictions against who was chosen."""
    logits = at_least_float32(capacity_logits)  # (T, E)
    rows = routing.row_is_valid
    chosen = logits[routing.token_indices.long(), routing.row_experts.clamp(max=logits.shape[1] - 1)]  # (R,)
    # BCE with logits z and target y is softplus(z) - y z, and y is 1 at the routed rows alone.
    return (F.softplus(logits).sum() - chosen.where(rows, 0).sum()) / max(logits.numel(), 1)


def capacity_quantile_reference(capacity_logits: Tensor, expert_capacity: int) -> Tensor:
    """(T, E) -> (E,): the ``expert_capacity``-th largest prediction of each expert; 1 where none is to pass."""
    probabilities = at_least_float32(capacity_logits.detach()).sigmoid()
    if expert_capacity == 0:
        return probabilities.new_ones(probabilities.shape[1])
    return probabilities.topk(expert_capacity, dim=0).values[-1]


def token_choice_drop_reference(
    topk_ids: Tensor, drop_scores: Tensor, num_experts: int, expert_capacity: int
) -> tuple[Tensor, Tensor]:
    """(T, K) choices -> the same with -1 past each expert's best ``expert_capacity``, and how many that are."""
    experts = topk_ids.reshape(-1).long()
    experts = experts.where((experts >= 0) & (experts < num_experts), num_experts)
    by_score = drop_scores.detach().reshape(-1).argsort(descending=True, stable=True)
    order = by_score[experts[by_score].argsort(stable=True)]  # by expert, the best first
    sizes = torch.zeros(num_experts + 1, dtype=torch.int64, device=order.device)
    sizes.scatter_add_(0, experts, torch.ones_like(experts))
    start = (sizes.cumsum(0) - sizes)[experts[order]]
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device) - start)
    dropped = (rank >= expert_capacity) & (experts < num_experts)
    return topk_ids.masked_fill(dropped.view_as(topk_ids), -1), dropped.sum()


def _largest_first(values: Tensor, dim: int) -> Tensor:
    """Indices that order ``values`` from the largest, ties by the lower index."""
    return values.sort(dim=dim, descending=True, stable=True).indices
