"""What the kernels write, uninitialised; the operators' fake kernels return it."""

from __future__ import annotations

import torch
from torch import Tensor


def outputs_of(router_logits: Tensor, top_k: int) -> tuple[Tensor, ...]:
    """What `route` returns, uninitialised."""
    num_tokens, num_experts = router_logits.shape

    def integers(*shape: int) -> Tensor:
        return router_logits.new_empty(shape, dtype=torch.int32)

    def floats(*shape: int) -> Tensor:
        return router_logits.new_empty(shape, dtype=torch.float32)

    return (
        floats(num_tokens, top_k),
        floats(num_tokens, num_experts),
        floats(num_tokens * top_k),
        integers(num_tokens, top_k),
        integers(num_tokens * top_k),
        integers(num_experts),
        integers(num_tokens + 1),
        integers(num_tokens * top_k),
    )


def maps_like(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `sort_choices` returns, uninitialised."""
    num_tokens, top_k = topk_ids.shape
    return (
        topk_ids.new_empty(num_tokens * top_k, dtype=torch.float32),
        topk_ids.new_empty(num_tokens * top_k, dtype=torch.int32),
        topk_ids.new_empty(num_experts, dtype=torch.int32),
        topk_ids.new_empty(num_tokens + 1, dtype=torch.int32),
        topk_ids.new_empty(num_tokens * top_k, dtype=torch.int32),
    )
