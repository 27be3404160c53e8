"""`routing_from_topk` in Triton: `router_topk`'s counting sort, of choices that are given.

T tokens, E experts, K slots a token, R = T * K, B blocks of 32 slots. Shapes of a kernel's pointers stand above it. A
bit of a mask is a slot, not a token, so that a token may name an expert twice. There is one more list than experts, the
last, of all kept slots: a slot's rank among those is its place in `token_rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmoe_kernels.ops.router_topk._triton import rank_in_list, scan
from diffmoe_kernels.ops.router_topk.tiles import BLOCK_T
from diffmoe_kernels.routing import empty_fields
from diffmoe_kernels.triton_support import cdiv, next_power_of_2

BLOCK = BLOCK_T  # slots, a bit of a mask each
MAX_LISTS = 64  # of a program of `_routing_from_topk_mask_kernel`
TILE = 16384  # of its elements (slots x lists), 128 a thread, each a comparison that nothing keeps
MAX_BLOCKS = 16  # of its blocks
PLACE = 512  # slots of a program of `_routing_from_topk_place_kernel`: 640 programs at T = 65536, K = 5


@triton.jit
def _load_ids(topk_ids, slots, mask, E: tl.constexpr):
    """Ids of any integer dtype as int32, and whether they are kept; 0 where they are not."""
    ids = tl.load(topk_ids + slots, mask=mask, other=0).to(tl.int64)
    kept = mask & (ids >= 0) & (ids < E)
    return tl.where(kept, ids, 0).to(tl.int32), kept


# topk_ids (R,) -> masks (E + 1, B)
@triton.jit
def _routing_from_topk_mask_kernel(
    topk_ids,
    masks,
    num_slots,
    num_blocks,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    LISTS: tl.constexpr,
):
    blocks = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    lists = tl.program_id(1) * LISTS + tl.arange(0, LISTS)
    places = tl.arange(0, BLOCK)  # the tile's first dimension, so that a thread sums a mask by itself
    slots = blocks[None, :] * BLOCK + places[:, None]
    ids, kept = _load_ids(topk_ids, slots, slots < num_slots, E)
    is_member = kept[:, :, None] & ((ids[:, :, None] == lists[None, None, :]) | (lists == E)[None, None, :])
    bits = tl.full((BLOCK,), 1, tl.uint32) << places.to(tl.uint32)
    members = tl.sum(tl.where(is_member, bits[:, None, None], 0), 0)  # (BLOCKS, LISTS)
    at = lists[None, :].to(tl.int64) * num_blocks + blocks[:, None]
    in_masks = (blocks < num_blocks)[:, None] & (lists <= E)[None, :]
    tl.store(masks + at, members.to(tl.int32, bitcast=True), mask=in_masks)


# topk_ids (R,), topk_weights (R,), masks (E + 1, B), begins (E + 1, B), totals (E + 1,)
# -> gates (R,), token_indices (R,), group_offsets (E,), token_offsets (T + 1,), token_rows (R,)
@triton.jit
def _routing_from_topk_place_kernel(
    topk_ids,
    topk_weights,
    masks,
    begins,
    totals,
    gates,
    token_indices,
    group_offsets,
    token_offsets,
    token_rows,
    num_slots,
    num_blocks,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    PLACE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    experts = tl.arange(0, BLOCK_E)
    total = tl.load(totals + experts, mask=experts < E, other=0)
    ends = tl.cumsum(total, 0)
    count = tl.load(totals + E)
    if tl.program_id(0) == 0:
        tl.store(group_offsets + experts, ends, mask=experts < E)
        tl.store(token_offsets + num_slots // K, count)

    slots = tl.program_id(0) * PLACE + tl.arange(0, PLACE)
    inside = slots < num_slots
    tokens = slots // K
    ids, kept = _load_ids(topk_ids, slots, inside, E)
    rows = tl.gather(ends - total, ids, 0) + rank_in_list(masks, begins, ids, slots, num_blocks, kept, BLOCK)
    places = rank_in_list(masks, begins, tl.full((PLACE,), E, tl.int32), slots, num_blocks, inside, BLOCK)
    tl.store(token_offsets + tokens, places, mask=inside & (slots % K == 0))
    tl.store(token_rows + places, rows, mask=kept)
    tl.store(token_indices + rows, tokens, mask=kept)
    tl.store(gates + rows, tl.load(topk_weights + slots, mask=kept, other=0.0).to(tl.float32), mask=kept)

    past = inside & (slots >= count)
    tl.store(token_rows + slots, 0, mask=past)
    tl.store(token_indices + slots, 0, mask=past)
    tl.store(gates + slots, 0.0, mask=past)


# grad_gates (R,), topk_ids (T, K), token_offsets (T + 1,), token_rows (R,) -> grad_weights (T, K)
@triton.jit
def _routing_from_topk_bwd_kernel(
    grad_gates,
    topk_ids,
    token_offsets,
    token_rows,
    grad_weights,
    num_tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    PLACE_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tokens = tl.program_id(0) * PLACE_T + tl.arange(0, PLACE_T)
    k = tl.arange(0, BLOCK_K)
    mask = (tokens < num_tokens)[:, None] & (k < K)[None, :]
    slots = tokens[:, None] * K + k[None, :]
    _, kept = _load_ids(topk_ids, slots, mask, E)
    first = tl.load(token_offsets + tokens, mask=tokens < num_tokens, other=0)
    places = first[:, None] + tl.cumsum(kept.to(tl.int32), 1) - kept.to(tl.int32)
    rows = tl.load(token_rows + places, mask=kept, other=0)
    grad = tl.load(grad_gates + rows, mask=kept, other=0.0)
    tl.store(grad_weights + slots, grad.to(grad_weights.dtype.element_ty), mask=mask)


def routing_from_topk_fwd(
    topk_ids: Tensor, topk_weights: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sorts (T, K) choices by expert in three launches.

    Returns:
        gates, token_indices, group_offsets, token_offsets, token_rows, as `Routing` has them.
    """
    maps = empty_fields(topk_ids.new_empty, topk_ids.numel(), topk_ids.shape[0], num_experts)
    num_slots, top_k = topk_ids.numel(), topk_ids.shape[1]
    if num_slots == 0:
        for tensor in maps[2:4]:
            tensor.zero_()
        return maps
    num_blocks = cdiv(num_slots, BLOCK)
    masks = maps[1].new_empty(num_experts + 1, num_blocks)
    lists = min(next_power_of_2(num_experts + 1), MAX_LISTS)
    blocks = min(TILE // (BLOCK * lists), MAX_BLOCKS)
    grid = cdiv(num_blocks, blocks), cdiv(num_experts + 1, lists)
    _routing_from_topk_mask_kernel[grid](topk_ids, masks, num_slots, num_blocks, num_experts, BLOCK, blocks, lists)
    begins, totals = scan(masks)
    _routing_from_topk_place_kernel[(cdiv(num_slots, PLACE),)](
        topk_ids,
        topk_weights,
        masks,
        begins,
        totals,
        *maps,
        num_slots,
        num_blocks,
        num_experts,
        top_k,
        BLOCK,
        PLACE,
        next_power_of_2(num_experts),
    )
    return maps


def routing_from_topk_bwd(
    grad_gates: Tensor,
    topk_ids: Tensor,
    token_offsets: Tensor,
    token_rows: Tensor,
    num_experts: int,
    dtype: torch.dtype,
) -> Tensor:
    """(R,) gradient of the gates -> (T, K) of the weights, 0 for dropped slots; one launch."""
    grad_weights = torch.empty_like(topk_ids, dtype=dtype)
    if topk_ids.numel() == 0:
        return grad_weights
    num_tokens, top_k = topk_ids.shape
    width = next_power_of_2(top_k)
    place_t = max(PLACE // width, 1)
    _routing_from_topk_bwd_kernel[(cdiv(num_tokens, place_t),)](
        grad_gates,
        topk_ids,
        token_offsets,
        token_rows,
        grad_weights,
        num_tokens,
        num_experts,
        top_k,
        place_t,
        width,
    )
    return grad_weights
