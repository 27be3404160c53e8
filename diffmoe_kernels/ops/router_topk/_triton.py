"""`router_topk` in Triton: a counting sort in three launches, no atomics, the same bits every run.

T tokens, E experts, K = top_k, R = T * K rows, B blocks of 32 tokens. Shapes of a kernel's pointers stand above it.

1. `_router_topk_choose_kernel` scores a block's tokens and chooses their experts: per expert a mask of 32 bits.
2. `_router_topk_scan_kernel` counts those bits and sums them: where each block begins among its expert's rows.
3. `_router_topk_place_kernel` adds where each expert begins and the bits of earlier tokens; it writes the weights and
   the record.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmoe_kernels.ops.router_topk._triton_backward import router_topk_bwd
from diffmoe_kernels.ops.router_topk.outputs import outputs_of
from diffmoe_kernels.ops.router_topk.tiles import BLOCK_T, NARROW, PLACE_SLOTS, PLACE_T, SCAN, TILE
from diffmoe_kernels.triton_order import LOWEST, number_of, order_key
from diffmoe_kernels.triton_support import cdiv, next_power_of_2

__all__ = ["rank_in_list", "router_topk_fwd", "router_topk_bwd", "scan"]


@triton.jit
def _exp(x):
    """CUDA's expf, step by step: with `tl.exp`, off by |x| / 2 ulp, near ties would not fall as in PyTorch."""
    shifted = tl.clamp(tl.fma(x, 0.0057249800302088261, 0.5), 0.0, 1.0)
    whole = tl.fma(shifted, 252.0, -0.49998) + 12582913.0  # rounded down; 1.5 * 2^23 + 1 leaves it in the low bits
    rest = tl.fma(x, 1.925963033500011e-08, tl.fma(x, 1.4426950216293335, 12583039.0 - whole))
    return tl.exp2(rest) * (whole.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _divide(x, y, inverse):
    """x / y, rounded correctly but for the rarest cases, from 1 / y up to 2 ulp off; y may be infinite."""
    quotient = x * inverse
    return tl.where(y < 1e37, tl.fma(tl.fma(-y, quotient, x), inverse, quotient), quotient)


@triton.jit
def _bits(mask):
    """How many bits of a uint32 are set."""
    mask = mask - ((mask >> 1) & 0x55555555)
    mask = (mask & 0x33333333) + ((mask >> 2) & 0x33333333)
    mask = (mask + (mask >> 4)) & 0x0F0F0F0F
    mask += mask >> 8
    return ((mask + (mask >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def _sum_of_row(tile):
    """(G, C, T, V) -> (T,)"""
    return tl.sum(tl.sum(tl.sum(tile, 3), 1), 0)


# logits (T, E), bias (E,) or None -> scores (T, E), topk_ids (T, K), masks (E, B)
@triton.jit
def _router_topk_choose_kernel(
    logits,
    bias,
    scores,
    topk_ids,
    masks,
    num_tokens,
    num_blocks,
    fill,
    E: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TILE_T: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    V: tl.constexpr,
):
    S: tl.constexpr = E // GROUPS
    groups = tl.arange(0, G)
    members = tl.arange(0, C)[:, None] * V + tl.arange(0, V)[None, :]
    experts = groups[:, None, None] * S + members[None, :, :]
    real = (groups < GROUPS)[:, None, None] & (members < S)[None, :, :]
    places = experts[:, :, None, :]
    block = tl.program_id(0)
    begin = block.to(tl.int64) * BLOCK_T
    block_masks = tl.zeros((G, C, V), tl.uint32)
    for start in range(0, BLOCK_T, TILE_T):
        tokens = start + tl.arange(0, TILE_T)
        inside = begin + tokens < num_tokens
        mask = inside[None, None, :, None] & real[:, :, None, :]
        at = tokens[None, None, :, None] * E + places
        x = tl.load(logits + begin * E + at, mask=mask, other=0.0).to(tl.float32)
        if SOFTMAX:
            x = tl.where(real[:, :, None, :], x, -float("inf"))
            x = _exp(x - tl.max(tl.max(tl.max(x, 3), 1), 0)[None, None, :, None])
            total = _sum_of_row(x)
            score = _divide(x, total[None, None, :, None], (1.0 / total)[None, None, :, None])
        else:
            x = 1.0 + _exp(-x)
            score = _divide(1.0, x, 1.0 / x)
        tl.store(scores + begin * E + at, score, mask=mask)

        if bias is not None:
            score += tl.load(bias + experts, mask=real, other=0.0).to(tl.float32)[:, :, None, :]
        keys = tl.where(real[:, :, None, :], order_key(score), LOWEST)
        if GROUPS > 1:
            best = tl.max(tl.max(keys, 3), 1)  # (G, T)
            total = number_of(best)
            if S > 1:
                is_best = keys == best[:, None, :, None]
                first = tl.min(tl.min(tl.where(is_best, members[None, :, None, :], S), 3), 1)
                others = tl.where(members[None, :, None, :] == first[:, None, :, None], LOWEST, keys)
                total += number_of(tl.max(tl.max(others, 3), 1))
            group_keys = tl.where((groups < GROUPS)[:, None], order_key(total), LOWEST)
            for _ in range(TOP_GROUPS):
                is_next = group_keys == tl.max(group_keys, 0)[None, :]
                group = tl.min(tl.where(is_next, groups[:, None], G), 0)
                group_keys = tl.where(groups[:, None] == group[None, :], LOWEST, group_keys)
            masked = (group_keys != LOWEST)[:, None, :, None] & real[:, :, None, :]
            keys = tl.where(masked, order_key(tl.full((G, C, TILE_T, V), fill, tl.float32)), keys)

        for slot in range(K):
            is_largest = keys == tl.max(tl.max(tl.max(keys, 3), 1), 0)[None, None, :, None]
            chosen = tl.min(tl.min(tl.min(tl.where(is_largest, places, E), 3), 1), 0)
            keys = tl.where((places == chosen[None, None, :, None]) & real[:, :, None, :], LOWEST, keys)
            tl.store(topk_ids + begin * K + (tokens * K + slot), chosen, mask=inside)
        bits = tl.full((TILE_T,), 1, tl.uint32) << tokens.to(tl.uint32)
        block_masks += tl.sum(tl.where(mask & (keys == LOWEST), bits[None, None, :, None], 0), 2)
    tl.store(masks + experts * num_blocks + block, block_masks.to(tl.int32, bitcast=True), mask=real)


# masks (L, B), of each list, here an expert's tokens, its members -> begins (L, B): how many are in its earlier blocks,
# totals (L,): how many in all
@triton.jit
def _router_topk_scan_kernel(masks, begins, totals, num_blocks, BLOCK: tl.constexpr):
    own = tl.program_id(0)
    total = tl.zeros((), tl.int32)
    for start in range(0, num_blocks, BLOCK):
        blocks = start + tl.arange(0, BLOCK)
        inside = blocks < num_blocks
        at = own.to(tl.int64) * num_blocks + blocks
        count = _bits(tl.load(masks + at, mask=inside, other=0).to(tl.uint32, bitcast=True))
        tl.store(begins + at, total + tl.cumsum(count, 0) - count, mask=inside)
        total += tl.sum(count, 0)
    tl.store(totals + own, total)


@triton.jit
def rank_in_list(masks, begins, lists, places, num_blocks, mask, BLOCK: tl.constexpr):
    """How many members of a list come before a place: those in earlier blocks, and the earlier bits of its own."""
    at = lists.to(tl.int64) * num_blocks + places // BLOCK
    earlier = (tl.full(places.shape, 1, tl.uint32) << (places % BLOCK).to(tl.uint32)) - 1
    members = tl.load(masks + at, mask=mask, other=0).to(tl.uint32, bitcast=True)
    return tl.load(begins + at, mask=mask, other=0) + _bits(members & earlier)


# scores (T, E), topk_ids (T, K), masks (E, B), begins (E, B), totals (E,) -> topk_weights (T, K), token_indices (R,),
# gates (R,), group_offsets (E,), token_offsets (T + 1,), token_rows (R,)
@triton.jit
def _router_topk_place_kernel(
    scores,
    topk_ids,
    masks,
    begins,
    totals,
    topk_weights,
    token_indices,
    gates,
    group_offsets,
    token_offsets,
    token_rows,
    num_tokens,
    num_blocks,
    scaling_factor,
    E: tl.constexpr,
    K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PLACE_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    experts = tl.arange(0, BLOCK_E)
    total = tl.load(totals + experts, mask=experts < E, other=0)
    ends = tl.cumsum(total, 0)
    if tl.program_id(0) == 0:
        tl.store(group_offsets + experts, ends, mask=experts < E)
        tl.store(token_offsets, 0)

    tokens = tl.program_id(0) * PLACE_T + tl.arange(0, PLACE_T)
    inside = tokens < num_tokens
    tl.store(token_offsets + 1 + tokens, (tokens + 1) * K, mask=inside)

    k = tl.arange(0, BLOCK_K)
    mask = inside[:, None] & (k < K)[None, :]
    slots = tokens[:, None] * K + k[None, :]
    ids = tl.load(topk_ids + slots, mask=mask, other=0)
    weight = tl.load(scores + tokens.to(tl.int64)[:, None] * E + ids, mask=mask, other=0.0)
    if NORMALIZE:
        divisor = tl.sum(weight, 1) + 1e-20
        weight = tl.div_rn(weight, tl.broadcast_to(divisor[:, None], weight.shape))
    weight *= scaling_factor

    begin_of_expert = tl.gather(ends - total, tl.reshape(ids, (PLACE_T * BLOCK_K,)), 0)
    rows = rank_in_list(masks, begins, ids, tokens[:, None], num_blocks, mask, BLOCK_T)
    rows += tl.reshape(begin_of_expert, (PLACE_T, BLOCK_K))
    tl.store(topk_weights + slots, weight, mask=mask)
    tl.store(token_rows + slots, rows, mask=mask)
    tl.store(token_indices + rows, tl.broadcast_to(tokens[:, None], rows.shape), mask=mask)
    tl.store(gates + rows, weight, mask=mask)


def scan(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Launches `_router_topk_scan_kernel` on (lists, B) masks and returns (lists, B) begins and (lists,) totals."""
    num_lists, num_blocks = masks.shape
    begins, totals = torch.empty_like(masks), masks.new_empty(num_lists)
    _router_topk_scan_kernel[(num_lists,)](
        masks, begins, totals, num_blocks, min(next_power_of_2(num_blocks), SCAN), num_warps=8
    )
    return begins, totals


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
    """Routes (T, E) logits in three launches.

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
    num_blocks = cdiv(num_tokens, BLOCK_T)
    masks = group_offsets.new_empty(num_experts, num_blocks)
    if top_groups == num_groups:
        num_groups = top_groups = 1
    width = next_power_of_2(num_experts // num_groups)
    vector = min(16 // router_logits.element_size(), width)
    groups = next_power_of_2(num_groups)
    _router_topk_choose_kernel[(num_blocks,)](
        router_logits,
        expert_bias,
        scores,
        topk_ids,
        masks,
        num_tokens,
        num_blocks,
        masked_group_fill,
        num_experts,
        top_k,
        num_groups,
        top_groups,
        softmax,
        BLOCK_T,
        BLOCK_T if groups * width <= NARROW else max(TILE // (groups * width), 1),
        groups,
        width // vector,
        vector,
        num_warps=1,
    )
    begins, totals = scan(masks)
    block_k = next_power_of_2(top_k)
    place_t = min(PLACE_T, PLACE_SLOTS // block_k)
    _router_topk_place_kernel[(cdiv(num_tokens, place_t),)](
        scores,
        topk_ids,
        masks,
        begins,
        totals,
        topk_weights,
        token_indices,
        gates,
        group_offsets,
        token_offsets,
        token_rows,
        num_tokens,
        num_blocks,
        scaling_factor,
        num_experts,
        top_k,
        normalize and top_k > 1,
        BLOCK_T,
        place_t,
        next_power_of_2(num_experts),
        block_k,
    )
    return outputs
