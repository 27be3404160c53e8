"""`router_topk` by the extension: csrc/router_topk.cu. The functions are those of `_triton`."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe_kernels.cuda_support import TYPES, address, extension, stream_of
from diffmoe_kernels.ops.router_topk.outputs import outputs_of


def router_topk_fwd(
    router_logits: Tensor,
    expert_bias: Tensor | None,
    top_k: int,
    softmax: bool,
    num_groups: int,
    top_groups: int,
    masked_group_fill: float,
    normalize: bool,
    scaling_factor: float,
) -> tuple[Tensor, ...]:
    """Routes (T, E) logits in two launches.

    Returns:
        topk_weights, router_scores, gates, topk_ids, token_indices, group_offsets, token_offsets, token_rows, as
        `RouterTopK` and `Routing` have them.
    """
    outputs = outputs_of(router_logits, top_k)
    topk_weights, scores, gates, topk_ids, token_indices, group_offsets, token_offsets, token_rows = outputs
    num_tokens, num_experts = router_logits.shape
    if num_tokens == 0:
        group_offsets.zero_()
        token_offsets.zero_()
        return outputs
    bias = None if expert_bias is None else expert_bias.float()
    counts = topk_ids.new_empty(extension.router_chunks(num_tokens), num_experts)
    record = topk_weights, token_indices, gates, group_offsets, token_offsets, token_rows
    extension.router_topk_fwd(
        *map(address, (router_logits, bias, scores, topk_ids, counts, *record)),
        num_tokens,
        num_experts,
        top_k,
        TYPES[router_logits.dtype],
        softmax,
        num_groups,
        top_groups,
        masked_group_fill,
        normalize and top_k > 1,
        scaling_factor,
        stream_of(router_logits),
    )
    return outputs


def router_topk_bwd(
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
    """Gradient of `router_topk_fwd` by its logits (T, E), in one launch."""
    grad_logits = torch.empty_like(scores, dtype=dtype)
    top_k = topk_ids.shape[1]
    extension.router_topk_bwd(
        *map(address, (grad_weights, grad_scores, grad_gates, scores, topk_ids, token_rows, grad_logits)),
        *scores.shape,
        top_k,
        TYPES[dtype],
        softmax,
        normalize and top_k > 1,
        scaling_factor,
        stream_of(scores),
    )
    return grad_logits
