"""`token_drop` and `token_drop_predicted` in Triton, but for the selection: from cuts to a routing, and its gradient.

No atomics, the same bits every run. T tokens in P pools of S, E experts, R rows. Shapes of a kernel's pointers stand
above it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmoe_kernels.ops.token_drop._choice import token_choice_drop_fwd
from diffmoe_kernels.ops.token_drop._select import TILE, load_keys, select, tile_of

__all__ = ["token_choice_drop_fwd", "token_drop_fwd", "token_drop_bwd"]
from diffmoe_kernels.routing import empty_fields
from diffmoe_kernels.triton_support import cdiv


# scores (T, E), logits (T, E), thresholds (E,), cut, ties (P, E), wanted (E,), counts (P, B, E)
# -> gates (R,), token_indices (R,), group_offsets (E,), token_offsets (T + 1,), token_rows (R,), dropped ()
# None: wanted and dropped without a prediction, logits and thresholds where none must be passed to be chosen
@triton.jit
def _token_drop_place_kernel(
    scores,
    logits,
    thresholds,
    cut,
    ties,
    wanted,
    counts,
    gates,
    token_indices,
    group_offsets,
    token_offsets,
    token_rows,
    dropped,
    num_tokens,
    pool_size,
    num_pools,
    capacity,
    num_blocks,
    num_rows,
    rows_per_program,
    NUM_EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    program = tl.program_id(0)
    pool, block = (program // num_blocks).to(tl.int64), program % num_blocks
    experts = tl.arange(0, BLOCK_E)
    in_experts = experts < NUM_EXPERTS
    last_key = tl.load(cut + pool * NUM_EXPERTS + experts, mask=in_experts, other=0)
    quota = tl.load(ties + pool * NUM_EXPERTS + experts, mask=in_experts, other=0)

    threshold = 0.0
    if thresholds is not None:
        threshold = tl.load(thresholds + experts, mask=in_experts, other=0.0).to(tl.float32)[None, :]

    # Where each expert's rows begin, and this pool's among them.
    if wanted is not None:
        passed = tl.load(wanted + experts, mask=in_experts, other=0)
        size = tl.minimum(passed, capacity)
        if program == 0:
            tl.store(dropped, tl.sum((passed - size).to(tl.int64), 0))
    else:
        size = tl.where(in_experts, capacity * num_pools, 0)
    end = tl.cumsum(size, 0)
    total = tl.sum(size, 0)
    if program == 0:
        tl.store(group_offsets + experts, end, mask=in_experts)
        tl.store(token_offsets + num_tokens, total)
    start = end - size + (pool * capacity).to(tl.int32)

    # What the pool's earlier blocks hold.
    above, equal = tl.zeros((BLOCK_E,), tl.int32), tl.zeros((BLOCK_E,), tl.int32)
    for first in range(0, block, BLOCK_B):
        earlier = first + tl.arange(0, BLOCK_B)
        packed = tl.load(
            counts + (pool * num_blocks + earlier)[:, None] * NUM_EXPERTS + experts[None, :],
            mask=(earlier < block)[:, None] & in_experts[None, :],
            other=0,
        )
        above += tl.sum(packed & 0xFFFF, 0)
        equal += tl.sum(packed >> 16, 0)
    slots = (pool * capacity * NUM_EXPERTS).to(tl.int32) + tl.sum(above + tl.minimum(equal, quota), 0)

    for step in range(0, BLOCK, BLOCK_T):
        first = block * BLOCK + step
        within = tl.arange(0, BLOCK_T)
        in_pool = first + within < pool_size
        start_token = pool * pool_size + first
        at = within[:, None] * NUM_EXPERTS + experts[None, :]
        mask = in_pool[:, None] & in_experts[None, :]
        score, key, _ = load_keys(scores, logits, threshold, start_token * NUM_EXPERTS, at, mask, True)
        is_above, is_equal = mask & (key > last_key[None, :]), mask & (key == last_key[None, :])
        # Both counts of earlier tokens in one scan; a tile has fewer than 65536.
        packed = is_above.to(tl.int32) + is_equal.to(tl.int32) * 65536
        earlier = tl.cumsum(packed, 0) - packed
        equal_before = equal[None, :] + (earlier >> 16)
        chosen = is_above | (is_equal & (equal_before < quota[None, :]))
        row = (start + above)[None, :] + (earlier & 0xFFFF) + tl.minimum(equal_before, quota[None, :])
        tl.store(token_indices + row, (start_token + within).to(tl.int32)[:, None] + tl.zeros_like(row), mask=chosen)
        tl.store(gates + row, score, mask=chosen)

        taken = chosen.to(tl.int32)
        of_token = tl.sum(taken, 1)
        slot = slots + tl.cumsum(of_token, 0) - of_token
        tl.store(token_offsets + start_token + within, slot, mask=in_pool)
        tl.store(token_rows + slot[:, None] + tl.cumsum(taken, 1) - taken, row, mask=chosen)
        slots += tl.sum(of_token, 0)
        above += tl.sum(is_above.to(tl.int32), 0)
        equal += tl.sum(is_equal.to(tl.int32), 0)

    if wanted is not None:  # zeros past the true count
        first_row = program.to(tl.int64) * rows_per_program
        for step in range(0, rows_per_program, BLOCK_T * BLOCK_E):
            within = step + tl.arange(0, BLOCK_T * BLOCK_E)
            rows = first_row + within
            past = (within < rows_per_program) & (rows >= total) & (rows < num_rows)
            tl.store(token_indices + rows, 0, mask=past)
            tl.store(gates + rows, 0.0, mask=past)
            tl.store(token_rows + rows, 0, mask=past)


# group_offsets (E,), token_offsets (T + 1,) -> each token's first and past-the-last slot, each expert's rows
@triton.jit
def bounds(group_offsets, token_offsets, tokens, experts, num_tokens, NUM_EXPERTS: tl.constexpr):
    in_range, in_experts = tokens < num_tokens, experts < NUM_EXPERTS
    begin = tl.load(token_offsets + tokens, mask=in_range, other=0)
    stop = tl.load(token_offsets + tokens + 1, mask=in_range, other=0)
    start = tl.load(group_offsets + experts - 1, mask=in_experts & (experts > 0), other=0)
    end = tl.load(group_offsets + experts, mask=in_experts, other=0)
    return begin, stop, start, end


# grad_gates (R,), group_offsets (E,), token_offsets (T + 1,), token_rows (R,) -> grad_scores (T, E)
@triton.jit
def _token_drop_bwd_kernel(
    grad_gates,
    group_offsets,
    token_offsets,
    token_rows,
    grad_scores,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    begin, stop, start, end = bounds(group_offsets, token_offsets, tokens, experts, num_tokens, NUM_EXPERTS)
    grad = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for slot in range(0, tl.max(stop - begin, 0)):
        has_row = begin + slot < stop
        row = tl.load(token_rows + begin + slot, mask=has_row, other=-1)
        value = tl.load(grad_gates + row, mask=has_row, other=0.0)
        is_here = (row[:, None] >= start[None, :]) & (row[:, None] < end[None, :])
        grad += tl.where(is_here, value[:, None], 0.0)
    at = tokens[:, None] * NUM_EXPERTS + experts[None, :]
    mask = (tokens < num_tokens)[:, None] & (experts < NUM_EXPERTS)[None, :]
    tl.store(grad_scores + at, grad.to(grad_scores.dtype.element_ty), mask=mask)


def token_drop_fwd(
    scores: Tensor,
    capacity: int,
    num_pools: int = 1,
    logits: Tensor | None = None,
    thresholds: Tensor | None = None,
    by_token: bool = False,
) -> tuple[Tensor, ...]:
    """A `Routing` of (T, E) scores, gates first; where predicted, the number of dropped rows, () int64, too.

    With logits and thresholds the capacity is a bound on what they predict, and there is one pool.
    """
    num_tokens, num_experts = scores.shape
    num_rows = num_experts * num_pools * capacity
    predicted = logits is not None
    nothing = num_tokens == 0 or (num_rows == 0 and not predicted)
    make = scores.new_zeros if nothing else scores.new_empty
    routing = empty_fields(make, num_rows, num_tokens, num_experts)
    if predicted:
        routing = *routing, make((), dtype=torch.int64)
    if nothing:
        return routing
    chosen = select(scores, capacity, num_pools, logits, thresholds, by_token)
    block_t, block_e = tile_of(num_experts, num_tokens // num_pools)
    num_blocks = chosen.counts.shape[1]
    programs = num_pools * num_blocks
    _token_drop_place_kernel[(programs,)](
        scores,
        logits if by_token else None,
        thresholds if by_token else None,
        chosen.cut,
        chosen.ties,
        chosen.wanted,
        chosen.counts,
        *(routing if predicted else (*routing, None)),
        num_tokens,
        num_tokens // num_pools,
        num_pools,
        capacity,
        num_blocks,
        num_rows,
        cdiv(num_rows, programs),
        num_experts,
        chosen.block,
        block_t,
        block_e,
        max(TILE // block_e, 1),
        num_warps=4 if block_e > 128 else 8,  # with 8 there one compiler spills
    )
    return routing


def token_drop_bwd(
    grad_gates: Tensor, group_offsets: Tensor, token_offsets: Tensor, token_rows: Tensor, dtype: torch.dtype
) -> Tensor:
    """(R,) gradient of the gates -> (T, E) of the scores, 0 where an expert did not take the token."""
    num_tokens, num_experts = token_offsets.shape[0] - 1, group_offsets.shape[0]
    grad_scores = grad_gates.new_empty(num_tokens, num_experts, dtype=dtype)
    if grad_scores.numel() == 0 or grad_gates.numel() == 0:
        return grad_scores.zero_()
    tile = tile_of(num_experts, num_tokens)
    _token_drop_bwd_kernel[(cdiv(num_tokens, tile[0]),)](
        grad_gates, group_offsets, token_offsets, token_rows, grad_scores, num_tokens, num_experts, *tile
    )
    return grad_scores
