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
    Settings,
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

LOG2E = tl.constexpr(1.4426950408889634)
# Finite, so that where a block's scores are all -inf their weights are 0, not NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _attend_to(
    q, k, v, tokens, num_tokens, highest, total, result,
    PRECISION: tl.constexpr, TAIL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The softmax's maximum, its sum (BLOCK_M,) and the weighted values of a block of queries, after these keys."""
    scores = multiply_heads(q, k, PRECISION, TAIL)
    if not WHOLE:
        scores = tl.where((tokens < num_tokens)[None, :], scores, -float("inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp2(scores - new_highest[:, None])
    shrink = tl.exp2(highest - new_highest)
    total = total * shrink + tl.sum(weights, 1)
    result = add_weighted(scale_head(result, shrink[:, None], TAIL), weights.to(q[0].dtype), v, PRECISION, TAIL)
    return new_highest, total, result


# qkv (B, N, H + 2 Hkv, d), cos, sin (N - prefix, d / 2), q_*, k_* (d,) -> out (B, N, H, d), lse (B, H, N): log2 of the
# sum of exp2 of the scores times log2(e). KEPT: blocks of keys that stay in shared memory, all of them, or 0
@triton.jit
def _forward_kernel(
    qkv,
    cos,
    sin,
    q_weight,
    q_bias,
    k_weight,
    k_bias,
    out,
    lse,
    num_tokens,
    scale,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    NUM_PREFIX: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
    ROPE: tl.constexpr,
    NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    KEEPS_LSE: tl.constexpr,
    KEPT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head = NUM_HEADS + head // (NUM_HEADS // NUM_KV_HEADS)
    stride: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * D
    qkv += sample * num_tokens * stride
    q_head, k_head, v_head = qkv + head * D, qkv + kv_head * D, qkv + (kv_head + NUM_KV_HEADS) * D
    kept_keys = keep_prepared(
        k_head, num_tokens, stride, cos, sin, k_weight, k_bias, eps, 1.0,
        ROPE, NORM, HAS_WEIGHT, HAS_BIAS, D, HALF, TAIL, NUM_PREFIX, WHOLE, KEPT, BLOCK_N,
    )  # fmt: skip
    kept_values = keep_head(v_head, num_tokens, stride, D, HALF, TAIL, WHOLE, KEPT, BLOCK_N)
    # What does not vary in it, descriptors of all that is kept, would not fit in registers.
    for block in tl.range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_M), tl.num_programs(0), disable_licm=True):
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        q = load_prepared(
            q_head, rows, num_tokens, stride, cos, sin, q_weight, q_bias, eps, scale * LOG2E,
            ROPE, NORM, HAS_WEIGHT, HAS_BIAS, D, HALF, TAIL, NUM_PREFIX, WHOLE,
        )  # fmt: skip
        highest = tl.full((BLOCK_M,), LOWEST, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        result = zeros_like_head(BLOCK_M, HALF, TAIL)
        if KEPT > 0:
            for i in tl.static_range(KEPT):
                highest, total, result = _attend_to(
                    q, kept_keys[i], kept_values[i], tl.arange(0, BLOCK_N), num_tokens - i * BLOCK_N,
                    highest, total, result, PRECISION, TAIL, WHOLE or i < KEPT - 1,
                )  # fmt: skip
        else:
            for start in range(0, num_tokens, BLOCK_N):
                tokens = start + tl.arange(0, BLOCK_N)
                k = load_prepared(
                    k_head, tokens, num_tokens, stride, cos, sin, k_weight, k_bias, eps, 1.0,
                    ROPE, NORM, HAS_WEIGHT, HAS_BIAS, D, HALF, TAIL, NUM_PREFIX, WHOLE,
                )  # fmt: skip
                v = load_head(v_head, tokens, num_tokens, stride, D, HALF, TAIL, WHOLE)
                highest, total, result = _attend_to(
                    q, k, v, tokens, num_tokens, highest, total, result, PRECISION, TAIL, WHOLE
                )
        inverse = (1.0 / total)[:, None]
        at = out + (sample * num_tokens * NUM_HEADS + head) * D
        store_head(at, rows, num_tokens, NUM_HEADS * D, scale_head(result, inverse, TAIL), D, HALF, TAIL, WHOLE)
        if KEEPS_LSE:
            at = lse + (sample * NUM_HEADS + head) * num_tokens + rows
            tl.store(at, highest + tl.log2(total), mask=rows < num_tokens)


def attend(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    norms: tuple[Tensor | None, ...],
    settings: Settings,
    *,
    keep_lse: bool,
) -> tuple[Tensor, Tensor]:
    """(B, N, H + 2 Hkv, d) -> out (B, N, H, d), and the scores' log-sum-exp (B, H, N), or (0,) where it is not kept.

    norms: q_weight, q_bias, k_weight, k_bias, each (d,) or None.
    """
    batch, num_tokens, _, head_dim = qkv.shape
    out = qkv.new_empty(batch, num_tokens, settings.num_heads, head_dim)
    lse = qkv.new_empty((batch, settings.num_heads, num_tokens) if keep_lse else (0,), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    constants = settings.constants(qkv, norms)
    tables = tuple(qkv if one is None else one for one in (cos, sin, *norms))

    def launch(tile: AttentionTile) -> None:
        programs = programs_of_head(tile, triton.cdiv(num_tokens, tile.m), settings.num_heads * batch, qkv)
        _forward_kernel[(programs, settings.num_heads, batch)](
            qkv,
            *tables,
            out,
            lse,
            num_tokens,
            settings.scale,
            settings.norm_eps,
            **constants,
            KEEPS_LSE=keep_lse,
            **tile.options,
            WHOLE=tile.divides(num_tokens),
        )

    launch(best_attention_tile("forward", launch, qkv, constants, keep_lse))
    return out, lse
