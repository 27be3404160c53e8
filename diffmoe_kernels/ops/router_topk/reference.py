"""The definition of `router_topk`, and the record that it returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffmoe_kernels.checks import at_least_float32
from diffmoe_kernels.routing import Routing


class RouterTopK(NamedTuple):
    """What `router_topk` returns. T tokens, E experts, K = top_k.

    Attributes:
        routing: the record that the experts take, of T * K rows.
        topk_ids: (T, K) int32, the chosen experts, the best first.
        topk_weights: (T, K) float32 (float64 for float64 logits), differentiable.
        router_scores: (T, E) of the same dtype, differentiable: sigmoid or softmax of the logits.
    """

    routing: Routing
    topk_ids: Tensor
    topk_weights: Tensor
    router_scores: Tensor


def router_topk_reference(
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
    """(T, E) logits -> `RouterTopK`."""
    logits = at_least_float32(router_logits)
    scores = logits.sigmoid() if score_function == "sigmoid" else logits.softmax(-1)  # (T, E)

    # The bias decides who is chosen, never how much a choice weighs.
    selection = scores.detach() if expert_bias is None else scores.detach() + expert_bias.to(scores)
    if top_groups < num_groups:
        group_size = selection.shape[1] // num_groups
        grouped = selection.unflatten(1, (num_groups, group_size))  # (T, G, E/G)
        group_scores = grouped.topk(min(2, group_size), dim=-1).values.sum(-1)  # (T, G)
        masked = torch.ones_like(group_scores, dtype=torch.bool)
        masked.scatter_(1, largest_first(group_scores, top_groups), False)
        selection = grouped.masked_fill(masked.unsqueeze(-1), masked_group_fill).flatten(1)

    topk_ids = largest_first(selection, top_k)
    topk_weights = scores.gather(1, topk_ids)  # (T, K)
    if normalize_weights and top_k > 1:
        topk_weights = topk_weights / (topk_weights.sum(-1, keepdim=True) + 1e-20)
    topk_ids, topk_weights = topk_ids.int(), topk_weights * scaling_factor
    return RouterTopK(Routing.from_topk(topk_ids, topk_weights, scores.shape[1]), topk_ids, topk_weights, scores)


def largest_first(values: Tensor, count: int) -> Tensor:
    """(T, E) -> (T, count) int64: the indices of the largest, ties in favour of the lower index."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]
