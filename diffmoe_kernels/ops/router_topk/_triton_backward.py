"""The backward of `router_topk` in Triton: one launch. T tokens, E experts, K = top_k, R = T * K rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmoe_kernels.ops.router_topk.tiles import BLOCK_T, TILE
from diffmoe_kernels.triton_support import cdiv, next_power_of_2


@triton.jit
def _grad_of_slots(grad_weights, grad_gates, token_rows, slots, mask):
    """Gradient of these slots' weights. Without drops token_rows holds every slot's row."""
    grad = tl.zeros(slots.shape, tl.float32)
    if grad_weights is not None:
        grad += tl.load(grad_weights + slots, mask=mask, other=0.0)
    if grad_gates is not None:
        grad += tl.load(grad_gates + tl.load(token_rows + slots, mask=mask, other=0), mask=mask, other=0.0)
    return grad


# grad_weights (T, K), grad_scores (T, E), grad_gates (R,), None where there is none, scores (T, E), topk_ids (T, K),
# token_rows (R,) -> grad_logits (T, E)
@triton.jit
def _router_topk_bwd_kernel(
    grad_weights,
    grad_scores,
    grad_gates,
    scores,
    topk_ids,
    token_rows,
    grad_logits,
    num_tokens,
    scaling_factor,
    E: tl.constexpr,
    K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TILE_T: tl.constexpr,
    C: tl.constexpr,
    V: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64) * TILE_T
    tokens = tl.arange(0, TILE_T)
    inside = begin + tokens < num_tokens
    experts = tl.arange(0, C)[:, None, None] * V + tl.arange(0, V)[None, None, :]  # (C, 1, V)
    mask = inside[None, :, None] & (experts < E)
    at = begin * E + (tokens[None, :, None] * E + experts)
    score = tl.load(scores + at, mask=mask, other=0.0)
    grad = tl.zeros((C, TILE_T, V), tl.float32)
    if grad_scores is not None:
        grad += tl.load(grad_scores + at, mask=mask, other=0.0)
    if grad_weights is not None or grad_gates is not None:
        slots = begin * K + tokens * K
        mean = tl.zeros((TILE_T,), tl.float32)
        inverse = tl.full((TILE_T,), 1.0, tl.float32)
        if NORMALIZE:
            total = tl.zeros((TILE_T,), tl.float32)
            for k in range(K):  # unrolled it would compile for minutes where K is large
                expert = tl.load(topk_ids + slots + k, mask=inside, other=0)
                weight = tl.load(scores + begin * E + (tokens * E + expert), mask=inside, other=0.0)
                total += weight
                mean += weight * _grad_of_slots(grad_weights, grad_gates, token_rows, slots + k, inside)
            inverse = 1.0 / (total + 1e-20)
            mean *= inverse
        for k in range(K):
            expert = tl.load(topk_ids + slots + k, mask=inside, other=0)
            grad_slot = _grad_of_slots(grad_weights, grad_gates, token_rows, slots + k, inside)
            grad_slot = (grad_slot - mean) * inverse * scaling_factor
            grad = tl.where(experts == expert[None, :, None], grad + grad_slot[None, :, None], grad)
    if SOFTMAX:
        slope = score
        grad -= tl.sum(tl.sum(grad * score, 2), 0)[None, :, None]
    else:
        slope = (1.0 - score) * score
    tl.store(grad_logits + at, (grad * slope).to(grad_logits.dtype.element_ty), mask=mask)


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
    num_tokens, num_experts = scores.shape
    if num_tokens == 0:
        return grad_logits
    width = next_power_of_2(num_experts)
    vector = min(16 // scores.element_size(), width)
    tile_t = min(BLOCK_T, TILE // width)
    _router_topk_bwd_kernel[(cdiv(num_tokens, tile_t),)](
        grad_weights,
        grad_scores,
        grad_gates,
        scores,
        topk_ids,
        token_rows,
        grad_logits,
        num_tokens,
        scaling_factor,
        num_experts,
        topk_ids.shape[1],
        softmax,
        normalize and topk_ids.shape[1] > 1,
        tile_t,
        width // vector,
        vector,
        num_warps=1,
    )
    return grad_logits
