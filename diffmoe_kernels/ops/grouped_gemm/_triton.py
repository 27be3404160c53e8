"""Grouped matrix products in Triton, plain and with a gather in their loads.

E groups, R rows divided among them by `group_offsets` (E,), which only the device knows: a grid of the most tiles there
could be is launched, and each program finds its group. K depth, N columns.
TRITON_DEBUG=1 makes the kernels check on the device that the offsets ascend and stay within the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmoe_kernels.ops.grouped_gemm.tiles import pick_tile, pick_weight_grad_tile
from diffmoe_kernels.triton_support import input_precision, next_power_of_2


@triton.jit
def find_tile(
    group_offsets,
    num_rows,
    num_groups,
    num_tiles_m,
    num_tiles_n,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The program's group (num_groups past the last), its first row, the group's end, and its column tile.

    Column tiles go round within GROUP_M row tiles, so that rows and weights are found in the L2 cache.
    """
    pid = tl.program_id(0)
    first = pid // (GROUP_M * num_tiles_n) * GROUP_M
    height = tl.minimum(num_tiles_m - first, GROUP_M)
    within = pid % (GROUP_M * num_tiles_n)
    tile_m, tile_n = first + within % height, within // height

    group = tl.arange(0, GROUPS)
    end = tl.load(group_offsets + group, mask=group < num_groups, other=0)
    begin = tl.load(group_offsets + group - 1, mask=(group > 0) & (group < num_groups), other=0)
    tl.device_assert(begin * (group < num_groups) <= end, "group_offsets must ascend")
    tl.device_assert(end <= num_rows, "group_offsets must not pass the number of rows")
    tiles = tl.where(group < num_groups, (end - begin + BLOCK_M - 1) // BLOCK_M, 0)
    last = tl.cumsum(tiles, 0)
    mine = tl.sum((last <= tile_m).to(tl.int32), 0)  # groups whose tiles all come before
    is_mine = group == mine
    row = tl.sum(tl.where(is_mine, begin + (tile_m - last + tiles) * BLOCK_M, 0), 0)
    return tl.minimum(mine, num_groups), row, tl.sum(tl.where(is_mine, end, 0), 0), tile_n


# x (R, K) or (T, K) with token_indices (R,), w (E, K, N), bias (E, N), group_offsets (E,) -> out (R, N)
@triton.jit
def _rows_kernel(
    x,
    token_indices,
    w,
    bias,
    group_offsets,
    out,
    num_rows,
    num_tiles_m,
    num_tiles_n,
    num_groups: tl.constexpr,
    num_columns: tl.constexpr,
    depth: tl.constexpr,
    stride_x: tl.constexpr,
    stride_xk: tl.constexpr,
    stride_we: tl.constexpr,
    stride_wk: tl.constexpr,
    stride_wn: tl.constexpr,
    GATHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    group, first, end, tile_n = find_tile(
        group_offsets, num_rows, num_groups, num_tiles_m, num_tiles_n, BLOCK_M, GROUP_M, GROUPS
    )
    if group >= num_groups:
        return
    rows = first + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_rows, in_columns = (rows < end)[:, None], (columns < num_columns)[None, :]
    source = tl.load(token_indices + rows, mask=rows < end, other=0) if GATHER else rows
    x_at = x + source.to(tl.int64)[:, None] * stride_x + k[None, :] * stride_xk
    w_at = w + group.to(tl.int64) * stride_we + k[:, None] * stride_wk + columns.to(tl.int64)[None, :] * stride_wn
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        if depth % BLOCK_K == 0:
            x_tile = tl.load(x_at, mask=in_rows, other=0.0)
            w_tile = tl.load(w_at, mask=in_columns, other=0.0)
        else:
            inside = start + k < depth
            x_tile = tl.load(x_at, mask=in_rows & inside[None, :], other=0.0)
            w_tile = tl.load(w_at, mask=in_columns & inside[:, None], other=0.0)
        total = tl.dot(x_tile, w_tile, total, input_precision=PRECISION)
        x_at += BLOCK_K * stride_xk
        w_at += BLOCK_K * stride_wk
    if HAS_BIAS:
        total += tl.load(bias + group * num_columns + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    at = out + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=in_rows & in_columns)


# a (R, M) or (T, M) gathered, b (R, N) or (T, N) gathered, gates (R,) -> out (E, M, N), bias_out (E, M)
@triton.jit
def _weight_grad_kernel(
    a,
    b,
    token_indices,
    gates,
    group_offsets,
    out,
    bias_out,
    num_rows,
    num_tiles_m,
    num_tiles_n,
    size_m: tl.constexpr,
    size_n: tl.constexpr,
    stride_a: tl.constexpr,
    stride_am: tl.constexpr,
    stride_b: tl.constexpr,
    stride_bn: tl.constexpr,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    HAS_GATES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pid = tl.program_id(0)
    per_group = num_tiles_m * num_tiles_n
    group, pid = pid // per_group, pid % per_group
    first = pid // (GROUP_M * num_tiles_n) * GROUP_M
    height = tl.minimum(num_tiles_m - first, GROUP_M)
    within = pid % (GROUP_M * num_tiles_n)
    tile_m, tile_n = first + within % height, within // height

    begin = tl.load(group_offsets + group - 1, mask=group > 0, other=0)
    end = tl.load(group_offsets + group)
    tl.device_assert(begin <= end, "group_offsets must ascend")
    tl.device_assert(end <= num_rows, "group_offsets must not pass the number of rows")
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    bias_total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(begin, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        inside = rows < end
        if GATHER_A or GATHER_B:
            tokens = tl.load(token_indices + rows, mask=inside, other=0)
        source_a = (tokens if GATHER_A else rows).to(tl.int64)
        source_b = (tokens if GATHER_B else rows).to(tl.int64)
        a_tile = tl.load(
            a + source_a[None, :] * stride_a + m[:, None] * stride_am,
            mask=inside[None, :] & (m < size_m)[:, None],
            other=0.0,
        )
        b_tile = tl.load(
            b + source_b[:, None] * stride_b + n[None, :] * stride_bn,
            mask=inside[:, None] & (n < size_n)[None, :],
            other=0.0,
        )
        total = tl.dot(a_tile, b_tile, total, input_precision=PRECISION)
        if HAS_BIAS:  # every column tile computes it, the first stores it: cheaper than a pass of its own
            terms = a_tile.to(tl.float32)
            if HAS_GATES:
                terms *= tl.load(gates + rows, mask=inside, other=0.0)[None, :]
            bias_total += tl.sum(terms, 1)
    at = out + group.to(tl.int64) * size_m * size_n + m.to(tl.int64)[:, None] * size_n + n[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(m < size_m)[:, None] & (n < size_n)[None, :])
    if HAS_BIAS:
        stores = (m < size_m) & (tile_n == 0)
        tl.store(bias_out + group * size_m + m, bias_total.to(bias_out.dtype.element_ty), mask=stores)


def most_tiles(num_rows: int, num_groups: int, block_m: int) -> int:
    """The most row tiles that groups of `num_rows` rows in all can fill: each may end in a part of one."""
    return triton.cdiv(num_rows, block_m) + min(num_groups, num_rows)


def multiply_rows(
    x: Tensor, w: Tensor, group_offsets: Tensor, *, bias: Tensor | None = None, token_indices: Tensor | None = None
) -> Tensor:
    """(R, K) or gathered (T, K), (E, K, N) of any strides, (E, N) -> (R, N); not written past the last group."""
    num_rows = x.shape[0] if token_indices is None else token_indices.shape[0]
    num_groups, depth, num_columns = w.shape
    out = x.new_empty(num_rows, num_columns)
    if out.numel() == 0:
        return out
    tile = pick_tile(num_rows, num_groups, num_columns, depth, x.dtype)
    tiles_m, tiles_n = most_tiles(num_rows, num_groups, tile.m), triton.cdiv(num_columns, tile.n)
    _rows_kernel[(tiles_m * tiles_n,)](
        x,
        x if token_indices is None else token_indices,
        w,
        x if bias is None else bias,
        group_offsets,
        out,
        num_rows,
        tiles_m,
        tiles_n,
        num_groups,
        num_columns,
        depth,
        *x.stride(),
        *w.stride(),
        GATHER=token_indices is not None,
        HAS_BIAS=bias is not None,
        PRECISION=input_precision(x.dtype),
        GROUPS=next_power_of_2(num_groups),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        GROUP_M=tile.group_m,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def weight_grad(
    a: Tensor,
    b: Tensor,
    group_offsets: Tensor,
    *,
    token_indices: Tensor | None = None,
    gather: str | None = None,
    gates: Tensor | None = None,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Per group the sum over its rows of a^T b: (R, M), (R, N) -> (E, M, N) in ``dtype``.

    Args:
        gather: "a" or "b", whose rows are tokens (T, ...), read through ``token_indices``.
        gates: (R,), weights of the rows in the bias gradient alone.
        bias_dtype: also return the sum over rows of a, (E, M) in this dtype.
    """
    num_groups, size_m, size_n = group_offsets.shape[0], a.shape[1], b.shape[1]
    out = a.new_empty(num_groups, size_m, size_n, dtype=dtype)
    bias_out = None if bias_dtype is None else a.new_empty(num_groups, size_m, dtype=bias_dtype)
    if out.numel() == 0:
        return out, bias_out if bias_out is None else bias_out.zero_()
    tile = pick_weight_grad_tile(size_m, size_n, a.dtype)
    tiles_m, tiles_n = triton.cdiv(size_m, tile.m), triton.cdiv(size_n, tile.n)
    _weight_grad_kernel[(num_groups * tiles_m * tiles_n,)](
        a,
        b,
        group_offsets if token_indices is None else token_indices,
        a if gates is None else gates,
        group_offsets,
        out,
        out if bias_out is None else bias_out,
        (a if token_indices is None else token_indices).shape[0],
        tiles_m,
        tiles_n,
        size_m,
        size_n,
        *a.stride(),
        *b.stride(),
        GATHER_A=gather == "a",
        GATHER_B=gather == "b",
        HAS_GATES=gates is not None,
        HAS_BIAS=bias_out is not None,
        PRECISION=input_precision(a.dtype),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        GROUP_M=tile.group_m,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out, bias_out
