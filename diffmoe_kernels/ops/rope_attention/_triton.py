"""`rope_attention` in Triton, forward: norm and rotation on the way in, no q, k or scores in memory.

B samples, N tokens, H query heads on Hkv key and value heads, d = head_dim. A program takes blocks of queries of one
head, each through all keys with the softmax's maximum and sum carried along (arXiv:2205.14135). Where all keys and
values of a head fit in shared memory they stay there, prepared once; else each block of queries fetches them again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmoe_kernels.ops.rope_attention._prepare import (
    Norm,
    Settings,
    Table,
    add_weighted,
    keep_head,
    keep_prepared,
    load_head,
    load_prepared,
    multiply_heads,
    scale_head,
    store_head,
    zeros_like_head,
)
from diffmoe_kernels.ops.rope_attention.tiles import AttentionTile, best_attention_tile, programs_of_head
from diffmoe_kernels.triton_support import cdiv

LOG2E = tl.constexpr(1.4426950408889634)
# Finite, so that where a block's scores are all -inf their weights are 0, not NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _attend_to(q, k, v, tokens, num_tokens, highest, total, result, PRECISION: tl.constexpr, WHOLE: tl.constexpr):
    """The softmax's maximum, its sum (BLOCK_M,) and the weighted values of a block of queries, after these keys."""
    scores = multiply_heads(q, k, PRECISION)
    if not WHOLE:
        scores = tl.where((tokens < num_tokens)[None, :], scores, -float("inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp2(scores - new_highest[:, None])
    shrink = tl.exp2(highest - new_highest)
    total = total * shrink + tl.sum(weights, 1)
    result = add_weighted(scale_head(result, shrink[:, None]), weights.to(q[0].dtype), v, PRECISION)
    return new_highest, total, result


# qkv (B, N, H + 2 Hkv, d), a `Table`, two of `Norm` -> out (B, N, H, d), lse (B, H, N) unless it is None: log2 of the
# sum of exp2 of the scores times log2(e). KEPT: blocks of keys that stay in shared memory, all of them, or 0
@triton.jit
def _rope_attention_fwd_kernel(
    qkv,
    table,
    q_norm,
    k_norm,
    out,
    lse,
    num_tokens,
    scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    NUM_PREFIX: tl.constexpr,
    LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    KEPT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head = NUM_HEADS + head // (NUM_HEADS // NUM_KV_HEADS)
    D: tl.constexpr = LAYOUT.d
    stride: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * D
    qkv += sample * num_tokens * stride
    q_head, k_head, v_head = qkv + head * D, qkv + kv_head * D, qkv + (kv_head + NUM_KV_HEADS) * D
    kept_keys = keep_prepared(k_head, num_tokens, stride, table, k_norm, 1.0, LAYOUT, NUM_PREFIX, WHOLE, KEPT, BLOCK_N)
    kept_values = keep_head(v_head, num_tokens, stride, LAYOUT, WHOLE, KEPT, BLOCK_N)
    # What does not vary in it, descriptors of all that is kept, would not fit in registers.
    for block in tl.range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_M), tl.num_programs(0), disable_licm=True):
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        q = load_prepared(q_head, rows, num_tokens, stride, table, q_norm, scale * LOG2E, LAYOUT, NUM_PREFIX, WHOLE)
        highest = tl.full((BLOCK_M,), LOWEST, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        result = zeros_like_head(BLOCK_M, LAYOUT)
        if KEPT > 0:
            for i in tl.static_range(KEPT):
                highest, total, result = _attend_to(
                    q, kept_keys[i], kept_values[i], tl.arange(0, BLOCK_N), num_tokens - i * BLOCK_N,
                    highest, total, result, PRECISION, WHOLE or i < KEPT - 1,
                )  # fmt: skip
        else:
            for start in range(0, num_tokens, BLOCK_N):
                tokens = start + tl.arange(0, BLOCK_N)
                k = load_prepared(k_head, tokens, num_tokens, stride, table, k_norm, 1.0, LAYOUT, NUM_PREFIX, WHOLE)
                v = load_head(v_head, tokens, num_tokens, stride, LAYOUT, WHOLE)
                highest, total, result = _attend_to(
                    q, k, v, tokens, num_tokens, highest, total, result, PRECISION, WHOLE
                )
        inverse = (1.0 / total)[:, None]
        at = out + (sample * num_tokens * NUM_HEADS + head) * D
        store_head(at, rows, num_tokens, NUM_HEADS * D, scale_head(result, inverse), LAYOUT, WHOLE)
        if lse is not None:
            at = lse + (sample * NUM_HEADS + head) * num_tokens + rows
            tl.store(at, highest + tl.log2(total), mask=rows < num_tokens)


def rope_attention_fwd(
    qkv: Tensor,
    table: Table,
    q_norm: Norm,
    k_norm: Norm,
    settings: Settings,
    *,
    keep_lse: bool,
) -> tuple[Tensor, Tensor]:
    """(B, N, H + 2 Hkv, d) -> out (B, N, H, d), and the scores' log-sum-exp (B, H, N), or (0,) where it is not kept."""
    batch, num_tokens, _, head_dim = qkv.shape
    out = qkv.new_empty(batch, num_tokens, settings.num_heads, head_dim)
    lse = qkv.new_empty((batch, settings.num_heads, num_tokens) if keep_lse else (0,), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    constants = settings.constants(qkv)

    def launch(tile: AttentionTile) -> None:
        programs = programs_of_head(tile, cdiv(num_tokens, tile.m), settings.num_heads * batch, qkv)
        _rope_attention_fwd_kernel[(programs, settings.num_heads, batch)](
            qkv,
            table,
            q_norm,
            k_norm,
            out,
            lse if keep_lse else None,
            num_tokens,
            settings.scale,
            **constants,
            **tile.options,
            WHOLE=tile.divides(num_tokens),
        )

    has = [one is not None for one in q_norm.vectors]  # k's norm has the same
    launch(best_attention_tile("forward", launch, qkv, constants, *has, keep_lse))
    return out, lse
