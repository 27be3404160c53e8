"""Choosing and dropping tokens by the extension: csrc/token_drop.cu. The functions are those of `_triton`."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe_kernels.cuda_support import TYPES, address, extension, stream_of
from diffmoe_kernels.routing import empty_fields


def token_drop_fwd(
    scores: Tensor,
    capacity: int,
    num_pools: int = 1,
    logits: Tensor | None = None,
    thresholds: Tensor | None = None,
    by_token: bool = False,
) -> tuple[Tensor, ...]:
    """A `Routing` of (T, E) scores in two launches, gates first; where predicted, the number of dropped rows too.

    With logits and thresholds the capacity is a bound on what they predict, and there is one pool.
    """
    num_tokens, num_experts = scores.shape
    num_rows = num_experts * num_pools * capacity
    predicted = logits is not None
    nothing = num_tokens == 0 or num_experts == 0 or (num_rows == 0 and not predicted)
    make = scores.new_zeros if nothing else scores.new_empty
    routing = empty_fields(make, num_rows, num_tokens, num_experts)
    dropped = make((), dtype=torch.int64) if predicted else None
    outputs = (*routing, dropped) if predicted else routing
    if nothing:
        return outputs
    pool_size = num_tokens // num_pools
    cuts, ties, wanted, counts = (
        scores.new_empty(size, dtype=torch.int32)
        for size in (
            num_pools * num_experts,
            num_pools * num_experts,
            num_experts,
            num_pools * extension.token_drop_chunks(pool_size) * num_experts,
        )
    )
    thresholds = None if thresholds is None else thresholds.float()
    tensors = scores, logits, thresholds, cuts, ties, wanted, counts, *routing, dropped
    types = TYPES[scores.dtype], TYPES[(logits if predicted else scores).dtype]
    sizes = num_pools, pool_size, num_experts, capacity, num_rows
    extension.token_drop_fwd(*map(address, tensors), *sizes, *types, by_token, stream_of(scores))
    return outputs


def token_drop_bwd(
    grad_gates: Tensor, group_offsets: Tensor, token_offsets: Tensor, token_rows: Tensor, dtype: torch.dtype
) -> Tensor:
    """(R,) gradient of the gates -> (T, E) of the scores, 0 where an expert did not take the token."""
    num_tokens, num_experts = token_offsets.shape[0] - 1, group_offsets.shape[0]
    grad_scores = grad_gates.new_empty(num_tokens, num_experts, dtype=dtype)
    tensors = grad_gates, group_offsets, token_offsets, token_rows, grad_scores
    extension.token_drop_bwd(*map(address, tensors), num_tokens, num_experts, TYPES[dtype], stream_of(grad_gates))
    return grad_scores


def token_choice_drop_fwd(topk_ids: Tensor, scores: Tensor, num_experts: int, capacity: int) -> tuple[Tensor, Tensor]:
    """(T, K) ids with -1 in the slots past each expert's best ``capacity``, and how many those are, () int64."""
    ids = topk_ids if topk_ids.dtype in (torch.int32, torch.int64) else topk_ids.int()
    kept, num_dropped = ids.clone(), ids.new_empty(num_experts, dtype=torch.int64)
    tensors = map(address, (ids, scores, kept, num_dropped))
    wide = ids.dtype == torch.int64
    extension.token_choice_drop_fwd(
        *tensors, ids.numel(), num_experts, capacity, wide, TYPES[scores.dtype], stream_of(scores)
    )
    return kept.to(topk_ids.dtype), num_dropped.sum()
