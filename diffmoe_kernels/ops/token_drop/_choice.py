"""`token_choice_drop` in Triton: the choices sorted by expert, then each expert's own cut by a radix select.

A dense (T, E) tensor of keys for `_select.py` would be E / K times as large, take more launches and hold no expert that
a token names twice. Here three launches sort, one copies the ids, and one program an expert cuts: over its capacity it
reads its scores five times, else never.

T tokens, E experts, K slots a token, R = T * K. Shapes of a kernel's pointers stand above it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmoe_kernels.ops.router_topk._from_topk import routing_from_topk_fwd
from diffmoe_kernels.ops.token_drop._select import settle_digit
from diffmoe_kernels.triton_order import LOWEST, order_key
from diffmoe_kernels.triton_support import next_power_of_2

CHUNK = 8192  # scores of a step: an expert's share of T = 65536, K = 5 over E = 48 is one


# scores (R,) by expert -> uint32 keys that order as they do
@triton.jit
def _load_keys(scores, rows, mask):
    key = order_key(tl.load(scores + rows, mask=mask, other=0.0))
    return (key ^ LOWEST).to(tl.uint32, bitcast=True)


# scores (R,) and slots (R,) by expert, group_offsets (E,) -> kept_ids (R,): -1 where dropped, num_dropped ()
@triton.jit
def _token_choice_drop_kernel(
    scores,
    slots,
    group_offsets,
    kept_ids,
    num_dropped,
    capacity,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):
    expert = tl.program_id(0)
    if expert == 0:
        experts = tl.arange(0, BLOCK_E)
        end = tl.load(group_offsets + experts, mask=experts < E, other=0)
        start = tl.load(group_offsets + experts - 1, mask=(experts < E) & (experts > 0), other=0)
        tl.store(num_dropped, tl.sum(tl.maximum(end - start - capacity, 0).to(tl.int64), 0))
    begin = tl.load(group_offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(group_offsets + expert)
    if end - begin > capacity:
        cut = tl.full((), 0, tl.uint32)  # of the last key that is kept, the digits found so far
        rank = tl.full((), 0, tl.int32) + capacity  # of that key among those that share them
        for step in range(4):
            shift = 24 - 8 * step
            counts = tl.zeros((256,), tl.int32)
            for first in range(begin, end, CHUNK):
                rows = first + tl.arange(0, CHUNK)
                digit = (_load_keys(scores, rows, rows < end) ^ cut) >> shift  # 256 or more where they differ
                counts += tl.histogram((digit & 255).to(tl.int32), 256, mask=(rows < end) & (digit < 256))
            digit, rank = settle_digit(counts, rank)
            cut ^= digit.to(tl.uint32) << shift

        equal_before = tl.full((), 0, tl.int32)
        for first in range(begin, end, CHUNK):
            rows = first + tl.arange(0, CHUNK)
            keys = _load_keys(scores, rows, rows < end)
            is_equal = ((rows < end) & (keys == cut)).to(tl.int32)
            is_late = equal_before + tl.cumsum(is_equal, 0) > rank  # among its equals, which ascend by slot
            dropped = (rows < end) & ((keys < cut) | ((keys == cut) & is_late))
            slot = tl.load(slots + rows, mask=dropped, other=0)
            tl.store(kept_ids + slot, -1, mask=dropped)
            equal_before += tl.sum(is_equal, 0)


def token_choice_drop_fwd(topk_ids: Tensor, scores: Tensor, num_experts: int, capacity: int) -> tuple[Tensor, Tensor]:
    """(T, K) ids with -1 in the slots past each expert's best ``capacity``, and how many those are, () int64."""
    kept_ids = topk_ids.clone()
    num_dropped = topk_ids.new_empty((), dtype=torch.int64)
    if topk_ids.numel() == 0:
        return kept_ids, num_dropped.zero_()
    # Each slot as a token of its own: the tokens of rows are slots then.
    by_expert, slots, group_offsets, *_ = routing_from_topk_fwd(topk_ids.view(-1, 1), scores.view(-1, 1), num_experts)
    _token_choice_drop_kernel[(num_experts,)](
        by_expert,
        slots,
        group_offsets,
        kept_ids,
        num_dropped,
        min(capacity, topk_ids.numel()),
        num_experts,
        next_power_of_2(num_experts),
        CHUNK,
        num_warps=16,
    )
    return kept_ids, num_dropped
