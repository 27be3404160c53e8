"""`rope_attention` in Triton, backward, in two kernels without atomics: by q, then by k and v.

B samples, N tokens, H query heads on Hkv key and value heads, d = head_dim. Both compute the scores again from the
packed projection and the saved log-sum-exp. The first also leaves delta, each query's <grad, out>, to the second.
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
    row_products,
    scale_head,
    store_head,
    store_prepared_backward,
    zeros_like_head,
)
from diffmoe_kernels.ops.rope_attention._triton import LOG2E
from diffmoe_kernels.ops.rope_attention.tiles import AttentionTile, best_attention_tile, programs_of_head
from diffmoe_kernels.triton_support import cdiv


@triton.jit
def _query_grad(
    q, k, v, grads, log_sum, by_sum, tokens, num_tokens, grad_q, PRECISION: tl.constexpr, WHOLE: tl.constexpr
):
    """The gradient of a block of queries, with what these keys add."""
    weights = tl.exp2(multiply_heads(q, k, PRECISION) - log_sum[:, None])
    if not WHOLE:
        weights = tl.where((tokens < num_tokens)[None, :], weights, 0.0)
    by_scores = weights * (multiply_heads(grads, v, PRECISION) - by_sum[:, None])
    return add_weighted(grad_q, by_scores.to(k[0].dtype), k, PRECISION)


@triton.jit
def _key_grads(k, v, q, grads, log_sum, by_sum, grad_k, grad_v, PRECISION: tl.constexpr):
    """The gradients of a block of keys and values, with what these queries add. All is (keys, queries)."""
    weights = tl.exp2(multiply_heads(k, q, PRECISION) - log_sum[None, :])
    grad_v = add_weighted(grad_v, weights.to(k[0].dtype), grads, PRECISION)
    by_scores = weights * (multiply_heads(v, grads, PRECISION) - by_sum[None, :])
    return add_weighted(grad_k, by_scores.to(k[0].dtype), q, PRECISION), grad_v


# what `_rope_attention_fwd_kernel` took and gave, grad (B, N, H, d) -> the queries of grad_qkv, delta (B, H, N),
# by_norm: a `Norm` of parts of the gradients of q's, (B, H, blocks of N, d) each. KEPT: as there
@triton.jit
def _rope_attention_bwd_q_kernel(
    qkv,
    table,
    q_norm,
    k_norm,
    out,
    grad,
    lse,
    grad_qkv,
    delta,
    by_norm,
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
    of_head = (sample * num_tokens * NUM_HEADS + head) * D  # in out and grad
    by_row = (sample * NUM_HEADS + head) * num_tokens  # in lse and delta
    kept_keys = keep_prepared(k_head, num_tokens, stride, table, k_norm, 1.0, LAYOUT, NUM_PREFIX, WHOLE, KEPT, BLOCK_N)
    kept_values = keep_head(v_head, num_tokens, stride, LAYOUT, WHOLE, KEPT, BLOCK_N)
    for block in tl.range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_M), tl.num_programs(0), disable_licm=True):
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        q = load_prepared(q_head, rows, num_tokens, stride, table, q_norm, scale * LOG2E, LAYOUT, NUM_PREFIX, WHOLE)
        grads = load_head(grad + of_head, rows, num_tokens, NUM_HEADS * D, LAYOUT, WHOLE)
        outs = load_head(out + of_head, rows, num_tokens, NUM_HEADS * D, LAYOUT, WHOLE)
        by_sum = row_products(grads, outs)
        tl.store(delta + by_row + rows, by_sum, mask=rows < num_tokens)
        log_sum = tl.load(lse + by_row + rows, mask=rows < num_tokens, other=0.0)
        grad_q = zeros_like_head(BLOCK_M, LAYOUT)
        if KEPT > 0:
            for i in tl.static_range(KEPT):
                grad_q = _query_grad(
                    q, kept_keys[i], kept_values[i], grads, log_sum, by_sum, tl.arange(0, BLOCK_N),
                    num_tokens - i * BLOCK_N, grad_q, PRECISION, WHOLE or i < KEPT - 1,
                )  # fmt: skip
        else:
            for start in range(0, num_tokens, BLOCK_N):
                tokens = start + tl.arange(0, BLOCK_N)
                k = load_prepared(k_head, tokens, num_tokens, stride, table, k_norm, 1.0, LAYOUT, NUM_PREFIX, WHOLE)
                v = load_head(v_head, tokens, num_tokens, stride, LAYOUT, WHOLE)
                grad_q = _query_grad(q, k, v, grads, log_sum, by_sum, tokens, num_tokens, grad_q, PRECISION, WHOLE)
        part = ((sample * NUM_HEADS + head) * tl.cdiv(num_tokens, BLOCK_M) + block) * D
        store_prepared_backward(
            q_head, grad_qkv + sample * num_tokens * stride + head * D, by_norm, part, scale_head(grad_q, scale),
            rows, num_tokens, stride, table, q_norm, LAYOUT, NUM_PREFIX, WHOLE,
        )  # fmt: skip


# the same -> the keys and values of grad_qkv, by_norm: of k's, (B, Hkv, blocks of N, d) each. KEPT: blocks of
# queries and their gradients that stay in shared memory, where a key's head has one head of queries
@triton.jit
def _rope_attention_bwd_kv_kernel(
    qkv,
    table,
    q_norm,
    k_norm,
    grad,
    lse,
    delta,
    grad_qkv,
    by_norm,
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
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    group, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head = NUM_HEADS + group
    D: tl.constexpr = LAYOUT.d
    stride: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * D
    grad_qkv += sample * num_tokens * stride
    qkv += sample * num_tokens * stride
    k_head, v_head = qkv + kv_head * D, qkv + (kv_head + NUM_KV_HEADS) * D
    grad_v_head = grad_qkv + (kv_head + NUM_KV_HEADS) * D
    grad += sample * num_tokens * NUM_HEADS * D
    lse += sample * NUM_HEADS * num_tokens
    delta += sample * NUM_HEADS * num_tokens
    kept_queries = keep_prepared(
        qkv + group * D, num_tokens, stride, table, q_norm, scale * LOG2E, LAYOUT, NUM_PREFIX, WHOLE, KEPT, BLOCK_M
    )
    kept_grads = keep_head(grad + group * D, num_tokens, NUM_HEADS * D, LAYOUT, WHOLE, KEPT, BLOCK_M)
    for block in tl.range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_N), tl.num_programs(0), disable_licm=True):
        tokens = block * BLOCK_N + tl.arange(0, BLOCK_N)
        k = load_prepared(k_head, tokens, num_tokens, stride, table, k_norm, 1.0, LAYOUT, NUM_PREFIX, WHOLE)
        v = load_head(v_head, tokens, num_tokens, stride, LAYOUT, WHOLE)
        grad_k = zeros_like_head(BLOCK_N, LAYOUT)
        grad_v = zeros_like_head(BLOCK_N, LAYOUT)
        if KEPT > 0:
            for i in tl.static_range(KEPT):
                row, left = tl.arange(0, BLOCK_M), num_tokens - i * BLOCK_M
                at = group * num_tokens + row
                # Rows that are not weigh nothing.
                log_sum = tl.load(lse + at + i * BLOCK_M, mask=row < left, other=float("inf"))
                by_sum = tl.load(delta + at + i * BLOCK_M, mask=row < left, other=0.0)
                grad_k, grad_v = _key_grads(
                    k, v, kept_queries[i], kept_grads[i], log_sum, by_sum, grad_k, grad_v, PRECISION
                )
        else:
            num_blocks = tl.cdiv(num_tokens, BLOCK_M)
            for index in range(0, GROUP * num_blocks):
                head = group * GROUP + index // num_blocks
                rows = index % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
                q = load_prepared(
                    qkv + head * D, rows, num_tokens, stride, table, q_norm, scale * LOG2E, LAYOUT, NUM_PREFIX, WHOLE
                )
                grads = load_head(grad + head * D, rows, num_tokens, NUM_HEADS * D, LAYOUT, WHOLE)
                at = head.to(tl.int64) * num_tokens + rows
                log_sum = tl.load(lse + at, mask=rows < num_tokens, other=float("inf"))
                by_sum = tl.load(delta + at, mask=rows < num_tokens, other=0.0)
                grad_k, grad_v = _key_grads(k, v, q, grads, log_sum, by_sum, grad_k, grad_v, PRECISION)
        store_head(grad_v_head, tokens, num_tokens, stride, grad_v, LAYOUT, WHOLE)
        part = ((sample * NUM_KV_HEADS + group) * tl.cdiv(num_tokens, BLOCK_N) + block) * D
        store_prepared_backward(
            k_head, grad_qkv + kv_head * D, by_norm, part, scale_head(grad_k, 1.0 / LOG2E),
            tokens, num_tokens, stride, table, k_norm, LAYOUT, NUM_PREFIX, WHOLE,
        )  # fmt: skip


def rope_attention_bwd(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    table: Table,
    q_norm: Norm,
    k_norm: Norm,
    settings: Settings,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """grad (B, N, H, d) -> by qkv (B, N, H + 2 Hkv, d), and by weight and bias of q's norm, then of k's, (d,) each."""
    batch, num_tokens, num_slots, head_dim = qkv.shape
    num_heads, num_kv_heads = settings.num_heads, (num_slots - settings.num_heads) // 2
    vectors = (*q_norm.vectors, *k_norm.vectors)
    grad_qkv = torch.empty_like(qkv)
    if qkv.numel() == 0:
        return grad_qkv, tuple(None if one is None else torch.zeros_like(one) for one in vectors)
    delta = torch.empty_like(lse)
    constants = settings.constants(qkv)

    def parts(norm: Norm, heads: int, blocks: int) -> Norm:
        shape = (batch * heads * blocks, head_dim)
        sums = (None if one is None else qkv.new_empty(shape, dtype=torch.float32) for one in norm.vectors)
        return Norm(*sums)

    def launch_by_queries(tile: AttentionTile) -> Norm:
        blocks = cdiv(num_tokens, tile.m)
        by_norm = parts(q_norm, num_heads, blocks)
        _rope_attention_bwd_q_kernel[(programs_of_head(tile, blocks, num_heads * batch, qkv), num_heads, batch)](
            *(qkv, table, q_norm, k_norm, out, grad, lse, grad_qkv, delta, by_norm, num_tokens, settings.scale),
            **constants,
            **tile.options,
            WHOLE=tile.divides(num_tokens),
        )
        return by_norm

    def launch_by_keys(tile: AttentionTile) -> Norm:
        blocks = cdiv(num_tokens, tile.n)
        by_norm = parts(k_norm, num_kv_heads, blocks)
        _rope_attention_bwd_kv_kernel[(programs_of_head(tile, blocks, num_kv_heads * batch, qkv), num_kv_heads, batch)](
            *(qkv, table, q_norm, k_norm, grad, lse, delta, grad_qkv, by_norm, num_tokens, settings.scale),
            **constants,
            **tile.options,
            WHOLE=tile.divides(num_tokens),
        )
        return by_norm

    has = [one is not None for one in q_norm.vectors]  # k's norm has the same
    by_q = launch_by_queries(best_attention_tile("query_backward", launch_by_queries, qkv, constants, *has))
    by_k = launch_by_keys(best_attention_tile("key_backward", launch_by_keys, qkv, constants, *has))
    pairs = zip(vectors, (*by_q.vectors, *by_k.vectors), strict=True)
    return grad_qkv, tuple(None if one is None else sums.sum(0).to(one.dtype) for one, sums in pairs)
