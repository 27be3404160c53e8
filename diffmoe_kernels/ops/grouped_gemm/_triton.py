"""Grouped matrix products in Triton: rows by their group's matrix.

E groups, R rows divided among them by `group_offsets` (E,), which only the device knows. K depth, N columns. Of n
programs each takes every n-th of the tiles that there truly are. Their number is at most what keeps the device busy, so
that a bound on R that is far too high costs nothing.
TRITON_DEBUG=1 makes the kernels check on the device that the offsets ascend and stay within the rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from diffmoe_kernels.ops.grouped_gemm.tiles import best_product_tile
from diffmoe_kernels.triton_support import Tile, cdiv, describe, input_precision, next_power_of_2, num_programs


# group_offsets (E,) -> begin, end, last (GROUPS,): each group's rows, and how many row tiles there are up to its end
@triton.jit
def group_tiles(group_offsets, num_rows, num_groups, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr):
    group = tl.arange(0, GROUPS)
    end = tl.load(group_offsets + group, mask=group < num_groups, other=0)
    begin = tl.load(group_offsets + group - 1, mask=(group > 0) & (group < num_groups), other=0)
    tl.device_assert(begin * (group < num_groups) <= end, "group_offsets must ascend")
    tl.device_assert(end <= num_rows, "group_offsets must not pass the number of rows")
    tiles = tl.where(group < num_groups, (end - begin + BLOCK_M - 1) // BLOCK_M, 0)
    return begin, end, tl.cumsum(tiles, 0)


@triton.jit
def find_tile(
    index,
    begin,
    end,
    last,
    num_tiles_m,
    num_tiles_n,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The tile's group, its first row, the group's end, and its column tile.

    Column tiles go round within GROUP_M row tiles, so that rows and weights are found in the L2 cache.
    """
    first = index // (GROUP_M * num_tiles_n) * GROUP_M
    height = tl.minimum(num_tiles_m - first, GROUP_M)
    within = index % (GROUP_M * num_tiles_n)
    tile_m, tile_n = first + within % height, within // height
    group = tl.sum((last <= tile_m).to(tl.int32), 0)  # groups whose tiles all come before
    is_mine = tl.arange(0, GROUPS) == group
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    row = tl.sum(tl.where(is_mine, begin + (tile_m - last + tiles) * BLOCK_M, 0), 0)
    return group, row, tl.sum(tl.where(is_mine, end, 0), 0), tile_n


@triton.jit
def _clear_rows(out, first, num_rows, num_columns: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Zeros in out (R, N) from row `first` on."""
    num_tiles_n = tl.cdiv(num_columns, BLOCK_N)
    for index in range(tl.program_id(0), tl.cdiv(num_rows - first, BLOCK_M) * num_tiles_n, tl.num_programs(0)):
        rows = first + index // num_tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = index % num_tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        at = out + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
        mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        tl.store(at, tl.zeros((BLOCK_M, BLOCK_N), out.dtype.element_ty), mask=mask)


# x (R, K), w (E, K, N), bias (E, N) or None, group_offsets (E,) -> out (R, N); with DESCRIPTORS x and w are descriptors
# of tiles, and w is one of (E, N, K) where K_INNER
@triton.jit(do_not_specialize=["num_rows"])
def _grouped_gemm_fwd_kernel(
    x,
    w,
    bias,
    group_offsets,
    out,
    num_rows,
    num_groups: tl.constexpr,
    num_columns: tl.constexpr,
    depth: tl.constexpr,
    stride_x: tl.constexpr,
    stride_we: tl.constexpr,
    stride_wk: tl.constexpr,
    stride_wn: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUPS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    K_INNER: tl.constexpr,
    CLEARS_REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    begin, ends, last = group_tiles(group_offsets, num_rows, num_groups, BLOCK_M, GROUPS)
    num_tiles_m, num_tiles_n = tl.max(last, 0), tl.cdiv(num_columns, BLOCK_N)
    for index in range(tl.program_id(0), num_tiles_m * num_tiles_n, tl.num_programs(0)):
        group, first, end, tile_n = find_tile(
            index, begin, ends, last, num_tiles_m, num_tiles_n, BLOCK_M, GROUP_M, GROUPS
        )
        rows = first + tl.arange(0, BLOCK_M)
        columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        in_rows, in_columns = (rows < end)[:, None], (columns < num_columns)[None, :]
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if DESCRIPTORS:  # what lies past the depth is 0 in both, rows and columns too many are not stored
            for start in range(0, depth, BLOCK_K):
                x_tile = x.load([first, start])
                if K_INNER:
                    w_tile = tl.reshape(w.load([group, tile_n * BLOCK_N, start]), (BLOCK_N, BLOCK_K)).T
                else:
                    w_tile = tl.reshape(w.load([group, start, tile_n * BLOCK_N]), (BLOCK_K, BLOCK_N))
                total = tl.dot(x_tile, w_tile, total, input_precision=PRECISION)
        else:
            x_at = x + rows.to(tl.int64)[:, None] * stride_x + k[None, :]
            w_at = w + group.to(tl.int64) * stride_we
            w_at = w_at + k.to(tl.int64)[:, None] * stride_wk + columns.to(tl.int64)[None, :] * stride_wn
            for start in range(0, depth, BLOCK_K):
                in_x, in_w = in_rows, in_columns
                if depth % BLOCK_K != 0:
                    inside = start + k < depth
                    in_x, in_w = in_rows & inside[None, :], in_columns & inside[:, None]
                x_tile = tl.load(x_at, mask=in_x, other=0.0)
                total = tl.dot(x_tile, tl.load(w_at, mask=in_w, other=0.0), total, input_precision=PRECISION)
                x_at += BLOCK_K
                w_at += BLOCK_K * stride_wk
        if bias is not None:
            bias_at = bias + group * num_columns + columns
            total += tl.load(bias_at, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
        at = out + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
        tl.store(at, total.to(out.dtype.element_ty), mask=in_rows & in_columns)
    if CLEARS_REST:
        _clear_rows(out, tl.load(group_offsets + num_groups - 1), num_rows, num_columns, BLOCK_M, BLOCK_N)


def most_tiles(num_rows: int, num_groups: int, block_m: int) -> int:
    """The most row tiles that groups of `num_rows` rows in all can fill: each may end in a part of one."""
    return cdiv(num_rows, block_m) + min(num_groups, num_rows)


def multiply_rows(
    x: Tensor,
    w: Tensor,
    group_offsets: Tensor,
    *,
    bias: Tensor | None = None,
    clears_rest: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """(R, K), (E, K, N) of any strides, (E, N) -> (R, N).

    Strides are compiled in, so none may vary with R: x with gaps within its rows is copied.

    Args:
        clears_rest: write zeros past the last group, which else is not written.
        tile: other than the one of `tiles.py`.
    """
    num_rows, (num_groups, depth, num_columns) = x.shape[0], w.shape
    out = x.new_empty(num_rows, num_columns)
    if out.numel() == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    k_inner = w.stride(1) == 1

    def launch(tile: Tile) -> None:
        descriptors = None
        if tile.descriptors:
            block_w = (1, tile.n, tile.k) if k_inner else (1, tile.k, tile.n)
            descriptors = describe((x, (tile.m, tile.k)), (w.mT if k_inner else w, block_w))
        grid = num_programs(most_tiles(num_rows, num_groups, tile.m) * cdiv(num_columns, tile.n), x)
        _grouped_gemm_fwd_kernel[(grid,)](
            *(descriptors or (x, w)),
            bias,
            group_offsets,
            out,
            num_rows,
            num_groups,
            num_columns,
            depth,
            x.stride(0),
            *w.stride(),
            PRECISION=input_precision(x.dtype),
            GROUPS=next_power_of_2(num_groups),
            DESCRIPTORS=descriptors is not None,
            K_INNER=k_inner,
            CLEARS_REST=clears_rest,
            **tile.options,
        )

    sizes = (num_rows, num_groups, num_columns, depth)
    is_aligned = x.stride(0) * x.element_size() % 16 == 0
    launch(tile or best_product_tile("rows", launch, sizes, x.dtype, k_inner, is_aligned, bias is not None))
    return out
