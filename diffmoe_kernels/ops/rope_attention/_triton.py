"""`rope_attention` in Triton, forward: norm and rotation on the way in, no q, k or scores in memory.

B samples, N tokens, H query heads on Hkv key and value heads, d = head_dim. A program takes a block of queries of one
head through all keys, with the softmax's maximum and sum carried along (arXiv:2205.14135).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmoe_kernels.ops.rope_attention._prepare import Settings, load_prepared
from diffmoe_kernels.ops.rope_attention.tiles import pick_tile

LOG2E = tl.constexpr(1.4426950408889634)


# qkv (B, N, H + 2 Hkv, d), cos, sin (N - prefix, d / 2), q_*, k_* (d,) -> out (B, N, H, d), lse (B, H, N): log2 of the
# sum of exp2 of the scores times log2(e)
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
    num_prefix,
    scale,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    ROPE: tl.constexpr,
    NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEPS_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head = NUM_HEADS + head // (NUM_HEADS // NUM_KV_HEADS)
    stride: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * D
    kind = qkv.dtype.element_ty
    qkv += sample * num_tokens * stride
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q1, q2 = load_prepared(
        qkv + head * D, rows, num_tokens, stride, cos, sin, num_prefix, q_weight, q_bias, eps,
        ROPE, NORM, HAS_WEIGHT, HAS_BIAS, D, HALF,
    )  # fmt: skip
    q1, q2 = (q1 * (scale * LOG2E)).to(kind), (q2 * (scale * LOG2E)).to(kind)
    column = tl.arange(0, 2 * HALF)
    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    result = tl.zeros((BLOCK_M, 2 * HALF), tl.float32)
    for start in range(0, num_tokens, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        inside = tokens < num_tokens
        k1, k2 = load_prepared(
            qkv + kv_head * D, tokens, num_tokens, stride, cos, sin, num_prefix, k_weight, k_bias, eps,
            ROPE, NORM, HAS_WEIGHT, HAS_BIAS, D, HALF,
        )  # fmt: skip
        scores = tl.dot(q1, tl.trans(k1.to(kind)), input_precision=PRECISION)
        scores = tl.dot(q2, tl.trans(k2.to(kind)), scores, input_precision=PRECISION)
        scores = tl.where(inside[None, :], scores, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(weights, 1)
        value_at = qkv + (kv_head + NUM_KV_HEADS) * D + tokens.to(tl.int64)[:, None] * stride + column[None, :]
        values = tl.load(value_at, mask=inside[:, None] & (column < D)[None, :], other=0.0)
        result = tl.dot(weights.to(kind), values, result * shrink[:, None], input_precision=PRECISION)
        highest = new_highest
    in_rows = rows < num_tokens
    at = out + ((sample * num_tokens + rows)[:, None] * NUM_HEADS + head) * D + column[None, :]
    tl.store(at, (result / total[:, None]).to(kind), mask=in_rows[:, None] & (column < D)[None, :])
    if KEEPS_LSE:
        tl.store(lse + (sample * NUM_HEADS + head) * num_tokens + rows, highest + tl.log2(total), mask=in_rows)


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
    tile = pick_tile("forward", qkv.dtype, head_dim, settings.norm)
    grid = (triton.cdiv(num_tokens, tile.m), settings.num_heads, batch)
    _forward_kernel[grid](
        qkv,
        *(qkv if one is None else one for one in (cos, sin, *norms)),
        out,
        lse,
        num_tokens,
        settings.num_prefix_tokens,
        settings.scale,
        settings.norm_eps,
        **settings.constants(qkv, norms),
        KEEPS_LSE=keep_lse,
        **tile.options,
    )
    return out, lse
