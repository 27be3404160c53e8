"""`rope_attention` in Triton, backward, in two kernels without atomics: by q, then by k and v.

B samples, N tokens, H query heads on Hkv key and value heads, d = head_dim. Both compute the scores again from the
packed projection and the saved log-sum-exp. The first also leaves delta, each query's <grad, out>, to the second.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmoe_kernels.ops.rope_attention._prepare import Settings, load_prepared, store_prepared_backward
from diffmoe_kernels.ops.rope_attention._triton import LOG2E
from diffmoe_kernels.ops.rope_attention.tiles import pick_tile


# qkv (B, N, H + 2 Hkv, d), out, grad (B, N, H, d), lse (B, H, N) -> the queries of grad_qkv, delta (B, H, N),
# by_weight, by_bias (B, H, blocks of N, d): parts of the gradients of q's norm
@triton.jit
def _query_backward_kernel(
    qkv,
    cos,
    sin,
    q_weight,
    q_bias,
    k_weight,
    k_bias,
    out,
    grad,
    lse,
    grad_qkv,
    delta,
    by_weight,
    by_bias,
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
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head = NUM_HEADS + head // (NUM_HEADS // NUM_KV_HEADS)
    stride: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * D
    kind = qkv.dtype.element_ty
    qkv += sample * num_tokens * stride
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < num_tokens
    q1, q2 = load_prepared(
        qkv + head * D, rows, num_tokens, stride, cos, sin, num_prefix, q_weight, q_bias, eps,
        ROPE, NORM, HAS_WEIGHT, HAS_BIAS, D, HALF,
    )  # fmt: skip
    q1, q2 = (q1 * (scale * LOG2E)).to(kind), (q2 * (scale * LOG2E)).to(kind)
    column = tl.arange(0, 2 * HALF)
    at = ((sample * num_tokens + rows)[:, None] * NUM_HEADS + head) * D + column[None, :]
    in_heads = in_rows[:, None] & (column < D)[None, :]
    grads = tl.load(grad + at, mask=in_heads, other=0.0)
    outs = tl.load(out + at, mask=in_heads, other=0.0)
    by_sum = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    of_head = (sample * NUM_HEADS + head) * num_tokens
    tl.store(delta + of_head + rows, by_sum, mask=in_rows)
    log_sum = tl.load(lse + of_head + rows, mask=in_rows, other=0.0)
    grad_q1 = tl.zeros((BLOCK_M, HALF), tl.float32)
    grad_q2 = tl.zeros((BLOCK_M, HALF), tl.float32)
    for start in range(0, num_tokens, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        inside = tokens < num_tokens
        k1, k2 = load_prepared(
            qkv + kv_head * D, tokens, num_tokens, stride, cos, sin, num_prefix, k_weight, k_bias, eps,
            ROPE, NORM, HAS_WEIGHT, HAS_BIAS, D, HALF,
        )  # fmt: skip
        k1, k2 = k1.to(kind), k2.to(kind)
        scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        scores = tl.dot(q2, tl.trans(k2), scores, input_precision=PRECISION)
        weights = tl.where(inside[None, :], tl.exp2(scores - log_sum[:, None]), 0.0)
        value_at = qkv + (kv_head + NUM_KV_HEADS) * D + tokens.to(tl.int64)[:, None] * stride + column[None, :]
        values = tl.load(value_at, mask=inside[:, None] & (column < D)[None, :], other=0.0)
        by_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        by_scores = (weights * (by_weights - by_sum[:, None])).to(kind)
        grad_q1 = tl.dot(by_scores, k1, grad_q1, input_precision=PRECISION)
        grad_q2 = tl.dot(by_scores, k2, grad_q2, input_precision=PRECISION)
    part = ((sample * NUM_HEADS + head) * tl.num_programs(0) + block) * D
    store_prepared_backward(
        qkv + head * D, grad_qkv + sample * num_tokens * stride + head * D, by_weight + part, by_bias + part,
        grad_q1 * scale, grad_q2 * scale, rows, num_tokens, stride, cos, sin, num_prefix, q_weight, eps,
        ROPE, NORM, HAS_WEIGHT, HAS_BIAS, D, HALF,
    )  # fmt: skip


# the same -> the keys and values of grad_qkv, by_weight, by_bias (B, Hkv, blocks of N, d): of k's norm
@triton.jit
def _key_backward_kernel(
    qkv,
    cos,
    sin,
    q_weight,
    q_bias,
    k_weight,
    k_bias,
    grad,
    lse,
    delta,
    grad_qkv,
    by_weight,
    by_bias,
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
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    block, group, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head = NUM_HEADS + group
    stride: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * D
    kind = qkv.dtype.element_ty
    qkv += sample * num_tokens * stride
    grad_qkv += sample * num_tokens * stride
    tokens = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tokens < num_tokens
    k1, k2 = load_prepared(
        qkv + kv_head * D, tokens, num_tokens, stride, cos, sin, num_prefix, k_weight, k_bias, eps,
        ROPE, NORM, HAS_WEIGHT, HAS_BIAS, D, HALF,
    )  # fmt: skip
    k1, k2 = k1.to(kind), k2.to(kind)
    column = tl.arange(0, 2 * HALF)
    in_heads = inside[:, None] & (column < D)[None, :]
    value_at = (kv_head + NUM_KV_HEADS) * D + tokens.to(tl.int64)[:, None] * stride + column[None, :]
    values = tl.load(qkv + value_at, mask=in_heads, other=0.0)
    grad_k1 = tl.zeros((BLOCK_N, HALF), tl.float32)
    grad_k2 = tl.zeros((BLOCK_N, HALF), tl.float32)
    grad_v = tl.zeros((BLOCK_N, 2 * HALF), tl.float32)
    num_blocks = tl.cdiv(num_tokens, BLOCK_M)
    for index in range(0, GROUP * num_blocks):
        head = group * GROUP + index // num_blocks
        rows = index % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = rows < num_tokens
        q1, q2 = load_prepared(
            qkv + head * D, rows, num_tokens, stride, cos, sin, num_prefix, q_weight, q_bias, eps,
            ROPE, NORM, HAS_WEIGHT, HAS_BIAS, D, HALF,
        )  # fmt: skip
        q1, q2 = (q1 * (scale * LOG2E)).to(kind), (q2 * (scale * LOG2E)).to(kind)
        grad_at = grad + ((sample * num_tokens + rows)[:, None] * NUM_HEADS + head) * D + column[None, :]
        grads = tl.load(grad_at, mask=in_rows[:, None] & (column < D)[None, :], other=0.0)
        of_head = (sample * NUM_HEADS + head) * num_tokens
        log_sum = tl.load(lse + of_head + rows, mask=in_rows, other=float("inf"))  # rows that are not weigh nothing
        by_sum = tl.load(delta + of_head + rows, mask=in_rows, other=0.0)
        scores = tl.dot(k1, tl.trans(q1), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
        scores = tl.dot(k2, tl.trans(q2), scores, input_precision=PRECISION)
        weights = tl.exp2(scores - log_sum[None, :])
        grad_v = tl.dot(weights.to(kind), grads, grad_v, input_precision=PRECISION)
        by_weights = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
        by_scores = (weights * (by_weights - by_sum[None, :])).to(kind)
        grad_k1 = tl.dot(by_scores, q1, grad_k1, input_precision=PRECISION)
        grad_k2 = tl.dot(by_scores, q2, grad_k2, input_precision=PRECISION)
    tl.store(grad_qkv + value_at, grad_v.to(kind), mask=in_heads)
    part = ((sample * NUM_KV_HEADS + group) * tl.num_programs(0) + block) * D
    store_prepared_backward(
        qkv + kv_head * D, grad_qkv + kv_head * D, by_weight + part, by_bias + part,
        grad_k1 / LOG2E, grad_k2 / LOG2E, tokens, num_tokens, stride, cos, sin, num_prefix, k_weight, eps,
        ROPE, NORM, HAS_WEIGHT, HAS_BIAS, D, HALF,
    )  # fmt: skip


def attend_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    norms: tuple[Tensor | None, ...],
    settings: Settings,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """grad (B, N, H, d) -> by qkv (B, N, H + 2 Hkv, d), and by each of the norms' (d,) in its own dtype."""
    batch, num_tokens, num_slots, head_dim = qkv.shape
    num_heads, num_kv_heads = settings.num_heads, (num_slots - settings.num_heads) // 2
    grad_qkv = torch.empty_like(qkv)
    if qkv.numel() == 0:
        return grad_qkv, tuple(None if one is None else torch.zeros_like(one) for one in norms)
    delta = torch.empty_like(lse)
    tables = tuple(qkv if one is None else one for one in (cos, sin, *norms))
    numbers = (num_tokens, settings.num_prefix_tokens, settings.scale, settings.norm_eps)
    constants = settings.constants(qkv, norms)

    def parts(heads: int, blocks: int) -> tuple[Tensor, Tensor]:
        shapes = ((batch * heads * blocks, head_dim) if one is not None else (0,) for one in norms[:2])
        return tuple(qkv.new_empty(shape, dtype=torch.float32) for shape in shapes)

    tile = pick_tile("query_backward", qkv.dtype, head_dim, settings.norm)
    blocks = triton.cdiv(num_tokens, tile.m)
    by_q = parts(num_heads, blocks)
    _query_backward_kernel[(blocks, num_heads, batch)](
        qkv, *tables, out, grad, lse, grad_qkv, delta, *by_q, *numbers, **constants, **tile.options
    )
    tile = pick_tile("key_backward", qkv.dtype, head_dim, settings.norm)
    blocks = triton.cdiv(num_tokens, tile.n)
    by_k = parts(num_kv_heads, blocks)
    _key_backward_kernel[(blocks, num_kv_heads, batch)](
        qkv, *tables, grad, lse, delta, grad_qkv, *by_k, *numbers, **constants, **tile.options
    )
    by_norms = (
        None if one is None else sums.sum(0).to(one.dtype) for one, sums in zip(norms, (*by_q, *by_k), strict=True)
    )
    return grad_qkv, tuple(by_norms)
