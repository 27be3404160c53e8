"""Which scores are an expert's best, in Triton: a radix select on integers that order as the scores do.

T tokens in P pools of S, E experts. A segment is one expert's scores in one pool. Each has a cut: keys above it are
chosen, and of those equal to it the first few, `ties`, in token order. A segment that fits in a program's registers is
cut bit by bit in one launch. A longer one is divided among programs and cut digit by digit in five: each reads what the
one before counted, in partial counts that every program adds in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmoe_kernels.triton_order import HIGHEST, LOWEST, order_key
from diffmoe_kernels.triton_support import cdiv, next_power_of_2

IN_REGISTERS = 16384  # keys of a program: 16 of each of 1024 threads
CHUNK = 4096  # keys of a program's step where a segment is longer
MAX_PARTS = 16  # programs of a segment; each reads the counts of all
TILE = 2048  # elements (tokens x experts) that a program of the later kernels holds
MAX_BLOCKS = 256  # of a pool; each program of the last kernel reads the counts of those before


@dataclass(frozen=True)
class Selection:
    """What `select` found.

    cut, ties: (P, E) int32. wanted: (E,) int32, tokens that passed, where the count is predicted. counts: (P, B, E)
    int32, in each block of ``block`` tokens how many keys are above the cut, and 65536 times how many are equal to it.
    """

    cut: Tensor
    ties: Tensor
    wanted: Tensor | None
    counts: Tensor
    block: int


@triton.jit
def sigmoid(logits):
    """As torch computes it, 1 / (1 + exp(-x)) with a division that rounds once; exp may differ in the last bits."""
    decay = tl.exp(-logits.to(tl.float32))
    return tl.math.div_rn(tl.full(decay.shape, 1.0, tl.float32), 1.0 + decay)


@triton.jit
def load_keys(scores, logits, threshold, first, at, mask, BY_TOKEN: tl.constexpr):
    """Scores, their keys, and whether they passed the threshold; LOWEST for what can't be chosen.

    first: the tile's first element, int64; at: int32 from there; threshold: of each expert, or of the one; logits: None
    where all pass.
    """
    score = tl.load(scores + first + at, mask=mask, other=0.0).to(tl.float32)
    passed = mask
    if logits is not None:
        passed &= sigmoid(tl.load(logits + first + at, mask=mask, other=0.0)) > threshold
    eligible = passed if BY_TOKEN else mask
    return score, tl.where(eligible, order_key(score), LOWEST), passed


# keys (S, E), rank (E,) -> (E,) the rank-th largest; HIGHEST, or under it NaN, where rank is 0
@triton.jit
def _kth_largest(keys, rank):
    found = tl.zeros_like(rank) + LOWEST
    is_open = tl.full(rank.shape, 1, tl.int32)
    bit = 31
    searching = 1
    while searching > 0:
        trial = found ^ (1 << bit)
        count = tl.sum((keys >= trial[None, :]).to(tl.int32), 0)
        found = tl.where(count >= rank, trial, found)
        # Once as many are at or above as are wanted, the least of them is the one.
        is_open = tl.where(count == rank, 0, is_open)
        bit -= 1
        searching = tl.where(bit >= 0, tl.max(is_open, 0), 0)
    return tl.min(tl.where(keys >= found[None, :], keys, HIGHEST), 0)


# scores (T, E), logits (T, E), thresholds (E,) -> cut (P, E), ties (P, E), wanted (E,), counts (P, B, E). Without a
# prediction logits, thresholds and wanted are None, here and below num_passed too
@triton.jit
def _token_drop_cut_kernel(
    scores,
    logits,
    thresholds,
    cut,
    ties,
    wanted,
    counts,
    pool_size,
    capacity,
    num_blocks,
    NUM_EXPERTS: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    pool = tl.program_id(0).to(tl.int64)
    experts = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    tokens = tl.arange(0, BLOCK_S)
    in_experts = experts < NUM_EXPERTS
    mask = (tokens < pool_size)[:, None] & in_experts[None, :]
    first = pool * pool_size * NUM_EXPERTS
    at = tokens[:, None] * NUM_EXPERTS + experts[None, :]
    threshold = 0.0
    if thresholds is not None:
        threshold = tl.load(thresholds + experts, mask=in_experts, other=0.0).to(tl.float32)[None, :]
    _, keys, passed = load_keys(scores, logits, threshold, first, at, mask, BY_TOKEN)
    rank = tl.zeros((BLOCK_E,), tl.int32) + capacity
    if wanted is not None:
        num_passed = tl.sum(passed.to(tl.int32), 0)
        tl.store(wanted + experts, num_passed, mask=in_experts)
        rank = tl.minimum(num_passed, rank)
    rank = tl.where(in_experts, rank, 0)  # columns past the last expert are settled at once
    key = _kth_largest(keys, rank)
    above, equal = (keys > key[None, :]).to(tl.int32), (keys == key[None, :]).to(tl.int32)
    tl.store(cut + pool * NUM_EXPERTS + experts, key, mask=in_experts)
    tl.store(ties + pool * NUM_EXPERTS + experts, rank - tl.sum(above, 0), mask=in_experts)
    packed = tl.sum(tl.reshape(above + equal * 65536, (BLOCK_S // BLOCK, BLOCK, BLOCK_E)), 1)
    block = tl.arange(0, BLOCK_S // BLOCK)
    tl.store(
        counts + (pool * num_blocks + block)[:, None] * NUM_EXPERTS + experts[None, :],
        packed,
        mask=(block < num_blocks)[:, None] & in_experts[None, :],
    )


# scores (T, E), logits (T, E), thresholds (E,)
# -> keys (E, T), histograms (P * E, PARTS, 256), num_passed (P * E, PARTS)
@triton.jit
def _token_drop_first_digit_kernel(
    scores,
    logits,
    thresholds,
    keys,
    histograms,
    num_passed,
    num_tokens,
    pool_size,
    num_chunks,
    NUM_EXPERTS: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    expert, part, pool = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    threshold = 0.0
    if thresholds is not None:
        threshold = tl.load(thresholds + expert).to(tl.float32)
    counts = tl.zeros((256,), tl.int32)
    passed_here = 0
    for chunk in range(0, num_chunks):
        first, tokens = (part * num_chunks + chunk) * CHUNK, tl.arange(0, CHUNK)
        mask = first + tokens < pool_size
        start = pool * pool_size + first
        _, key, passed = load_keys(
            scores, logits, threshold, start * NUM_EXPERTS + expert, tokens * NUM_EXPERTS, mask, BY_TOKEN
        )
        tl.store(keys + expert.to(tl.int64) * num_tokens + start + tokens, key, mask=mask)
        counts += tl.histogram(((key ^ LOWEST) >> 24) & 255, 256, mask=mask)
        passed_here += tl.sum(passed.to(tl.int32), 0)
    place = (pool * NUM_EXPERTS + expert) * PARTS + part
    tl.store(histograms + place * 256 + tl.arange(0, 256), counts)
    if num_passed is not None:
        tl.store(num_passed + place, passed_here)


# count (256,) of each digit -> that of the rank-th largest, its rank among those with the same
@triton.jit
def settle_digit(count, rank):
    at_or_above = tl.sum(count, 0) - tl.cumsum(count, 0) + count
    digit = tl.sum((at_or_above >= rank).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(tl.arange(0, 256) == digit, at_or_above - count, 0), 0)
    return digit, rank - above


# histograms (P * E, PARTS, 256); cut, rank: what earlier digits fixed -> the cut with this digit, rank among its equals
@triton.jit
def _settle_next(histograms, segment, cut, rank, SHIFT: tl.constexpr, PARTS: tl.constexpr):
    digits = tl.arange(0, 256)
    parts = segment * PARTS + tl.arange(0, PARTS)
    count = tl.sum(tl.load(histograms + parts[:, None] * 256 + digits[None, :]), 0)
    digit, rank = settle_digit(count, rank)
    return cut ^ (digit << SHIFT), rank


# keys (E, T), histograms (4, P * E, PARTS, 256), num_passed (P * E, PARTS), cuts, ranks (5, P * E)
# STEP 1 to 3 -> histograms[STEP] of the keys that agree with the cut so far
# STEP 4 -> cuts[4], ranks[4], counts (P, B, E), wanted (E,)
@triton.jit
def _token_drop_next_digit_kernel(
    keys,
    histograms,
    num_passed,
    cuts,
    ranks,
    wanted,
    counts,
    num_tokens,
    pool_size,
    capacity,
    num_chunks,
    num_blocks,
    num_segments,
    NUM_EXPERTS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    expert, part, pool = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    segment = pool * NUM_EXPERTS + expert
    if STEP == 1:
        cut = tl.full((), LOWEST, tl.int32)
        rank = tl.full((), 0, tl.int32) + capacity
        if num_passed is not None:
            passed = tl.sum(tl.load(num_passed + segment * PARTS + tl.arange(0, PARTS)), 0)
            rank = tl.minimum(passed, rank)
            tl.store(wanted + expert, passed, mask=part == 0)
    else:
        cut = tl.load(cuts + (STEP - 1) * num_segments + segment)
        rank = tl.load(ranks + (STEP - 1) * num_segments + segment)
    before = histograms + (STEP - 1) * num_segments * (PARTS * 256)
    cut, rank = _settle_next(before, segment, cut, rank, 32 - 8 * STEP, PARTS)
    tl.store(cuts + STEP * num_segments + segment, cut, mask=part == 0)
    tl.store(ranks + STEP * num_segments + segment, rank, mask=part == 0)

    digit_counts = tl.zeros((256,), tl.int32)
    for chunk in range(0, num_chunks):
        first = part * num_chunks + chunk
        tokens = first * CHUNK + tl.arange(0, CHUNK)
        mask = tokens < pool_size
        key = tl.load(keys + expert.to(tl.int64) * num_tokens + pool * pool_size + tokens, mask=mask, other=LOWEST)
        if STEP < 4:
            agrees = mask & (((key ^ cut) >> (32 - 8 * STEP)) == 0)
            digit_counts += tl.histogram((key >> (24 - 8 * STEP)) & 255, 256, mask=agrees)
        else:
            packed = (key > cut).to(tl.int32) + (key == cut).to(tl.int32) * 65536
            in_block = tl.sum(tl.reshape(packed, (CHUNK // BLOCK, BLOCK)), 1)
            block = first * (CHUNK // BLOCK) + tl.arange(0, CHUNK // BLOCK)
            at = (pool * num_blocks + block) * NUM_EXPERTS + expert
            tl.store(counts + at, in_block, mask=block < num_blocks)
    if STEP < 4:
        at = ((STEP * num_segments + segment) * PARTS + part) * 256 + tl.arange(0, 256)
        tl.store(histograms + at, digit_counts)


def tile_of(num_experts: int, num_tokens: int) -> tuple[int, int]:
    """Tokens and experts, powers of 2, of a tile of at most TILE elements of a (num_tokens, num_experts) tensor."""
    width = next_power_of_2(num_experts)
    return max(min(TILE // width, next_power_of_2(num_tokens)), 1), width


def select(
    scores: Tensor,
    capacity: int,
    num_pools: int = 1,
    logits: Tensor | None = None,
    thresholds: Tensor | None = None,
    by_token: bool = False,
) -> Selection:
    """Cuts each segment of (T, E) scores, T > 0.

    capacity: how many a segment takes; with (T, E) logits and (E,) thresholds no more than that, of one pool. by_token:
    takes none but those that passed.
    """
    num_tokens, num_experts = scores.shape
    pool_size = num_tokens // num_pools
    predicted = logits is not None
    in_registers = pool_size <= IN_REGISTERS
    block = max(tile_of(num_experts, pool_size)[0], next_power_of_2(cdiv(pool_size, MAX_BLOCKS)))
    block = block if in_registers else min(block, CHUNK)
    num_blocks = cdiv(pool_size, block)
    counts = scores.new_empty(num_pools, num_blocks, num_experts, dtype=torch.int32)
    wanted = scores.new_empty(num_experts, dtype=torch.int32) if predicted else None
    if in_registers:
        cut, ties = (scores.new_empty(num_pools, num_experts, dtype=torch.int32) for _ in range(2))
        height = next_power_of_2(pool_size)
        width = min(max(IN_REGISTERS // height, 1), next_power_of_2(num_experts), 16)
        _token_drop_cut_kernel[(num_pools, cdiv(num_experts, width))](
            scores,
            logits,
            thresholds,
            cut,
            ties,
            wanted,
            counts,
            pool_size,
            capacity,
            num_blocks,
            num_experts,
            by_token,
            block,
            height,
            width,
            num_warps=min(max(height * width // 512, 1), 32),
        )
        return Selection(cut, ties, wanted, counts, block)

    num_segments = num_pools * num_experts
    parts = min(next_power_of_2(cdiv(pool_size, CHUNK)), MAX_PARTS)
    num_chunks = cdiv(pool_size, CHUNK * parts)
    grid = (num_experts, parts, num_pools)
    keys = scores.new_empty(num_experts, num_tokens, dtype=torch.int32)
    histograms = scores.new_empty(4, num_segments, parts, 256, dtype=torch.int32)
    num_passed = scores.new_empty(num_segments, parts, dtype=torch.int32) if predicted else None
    cuts, ranks = (scores.new_empty(5, num_pools, num_experts, dtype=torch.int32) for _ in range(2))
    _token_drop_first_digit_kernel[grid](
        scores,
        logits,
        thresholds,
        keys,
        histograms,
        num_passed,
        num_tokens,
        pool_size,
        num_chunks,
        num_experts,
        by_token,
        parts,
        CHUNK,
        num_warps=16,  # with 8 one compiler spills
    )
    for step in range(1, 5):
        _token_drop_next_digit_kernel[grid](
            keys,
            histograms,
            num_passed,
            cuts,
            ranks,
            wanted,
            counts,
            num_tokens,
            pool_size,
            capacity,
            num_chunks,
            num_blocks,
            num_segments,
            num_experts,
            step,
            block,
            parts,
            CHUNK,
            num_warps=8,
        )
    return Selection(cuts[4], ranks[4], wanted, counts, block)
