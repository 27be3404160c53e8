"""What the kernels write, uninitialised; the operator's fake kernel returns it."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe_kernels.routing import empty_fields


def outputs_of(router_logits: Tensor, top_k: int) -> tuple[Tensor, ...]:
    """topk_weights (T, K), router_scores (T, E), gates (R,), topk_ids (T, K) and the other fields of the `Routing`."""
    num_tokens, num_experts = router_logits.shape
    make = router_logits.new_empty
    weights, scores = (make(num_tokens, columns, dtype=torch.float32) for columns in (top_k, num_experts))
    gates, *maps = empty_fields(make, num_tokens * top_k, num_tokens, num_experts)
    return weights, scores, gates, make(num_tokens, top_k, dtype=torch.int32), *maps
