"""The weight gradient of grouped products in Triton: each group's sum of outer products, with gathers in its loads.

E groups, R rows divided among them by `group_offsets` (E,), which only the device knows; M and N the matrices' sizes.
A program sums all rows of a group for a tile of its matrix. Where tiles are too few to keep the device busy to the end
(`tiles.weight_grad_shares`), P programs share the steps of all tiles evenly instead, each a run of them. Of a tile that
is not all its own a program keeps the sum of its part; a second kernel adds the parts in order, so that the bits are
the same every run.
TRITON_DEBUG=1 makes the kernels check on the device that the offsets ascend and stay within the rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmoe_kernels.ops.grouped_gemm._triton import group_tiles
from diffmoe_kernels.ops.grouped_gemm.tiles import best_weight_grad_tile, weight_grad_shares
from diffmoe_kernels.triton_support import Tile, cdiv, input_precision, next_power_of_2

PART_ROWS = 16  # of a tile, whose parts a program adds


class Operands(NamedTuple):
    """a (R, M) and b (R, N); with token_indices (R,) one of them is (T, ...), whose rows those name."""

    a: Tensor
    b: Tensor
    token_indices: Tensor | None


class Layout(NamedTuple):
    """Of a and b and the matrices: a kernel is compiled for it. gathers: "a", "b" or "none"."""

    size_m: int
    size_n: int
    stride_a: int
    stride_b: int
    gathers: str
    precision: str


@triton.jit
def place_tile(index, layout: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The rows (BLOCK_M,) and columns (BLOCK_N,) of a matrix's tile; columns go round within GROUP_M tiles of rows."""
    num_tiles_m, num_tiles_n = tl.cdiv(layout.size_m, BLOCK_M), tl.cdiv(layout.size_n, BLOCK_N)
    first = index // (GROUP_M * num_tiles_n) * GROUP_M
    height = tl.minimum(num_tiles_m - first, GROUP_M)
    within = index % (GROUP_M * num_tiles_n)
    m = (first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    return m, within // height * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def sum_outer(operands, begin, end, m, n, layout: tl.constexpr, BLOCK_K: tl.constexpr):
    """The sum over rows from begin to end, of columns m of a and n of b: (BLOCK_M, BLOCK_N)."""
    total = tl.zeros((m.shape[0], n.shape[0]), tl.float32)
    rows = begin + tl.arange(0, BLOCK_K)
    if operands.token_indices is not None:  # a step ahead, so that what they point at is fetched in time
        tokens = tl.load(operands.token_indices + rows, mask=rows < end, other=0)
    for start in range(begin, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        inside = rows < end
        source_a = (tokens if layout.gathers == "a" else rows).to(tl.int64)
        source_b = (tokens if layout.gathers == "b" else rows).to(tl.int64)
        a_tile = tl.load(
            operands.a + source_a[None, :] * layout.stride_a + m[:, None],
            mask=inside[None, :] & (m < layout.size_m)[:, None],
            other=0.0,
        )
        b_tile = tl.load(
            operands.b + source_b[:, None] * layout.stride_b + n[None, :],
            mask=inside[:, None] & (n < layout.size_n)[None, :],
            other=0.0,
        )
        total = tl.dot(a_tile, b_tile, total, input_precision=layout.precision)
        if operands.token_indices is not None:
            tokens = tl.load(operands.token_indices + rows + BLOCK_K, mask=rows + BLOCK_K < end, other=0)
    return total


@triton.jit
def store_tile(out, total, group, m, n, layout: tl.constexpr):
    at = out + group.to(tl.int64) * layout.size_m * layout.size_n + m.to(tl.int64)[:, None] * layout.size_n + n[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(m < layout.size_m)[:, None] & (n < layout.size_n)[None, :])


# operands, group_offsets (E,) -> out (E, M, N)
@triton.jit(do_not_specialize=["num_rows"])
def _grouped_gemm_weight_grad_kernel(
    operands,
    group_offsets,
    out,
    num_rows,
    layout: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    per_group = tl.cdiv(layout.size_m, BLOCK_M) * tl.cdiv(layout.size_n, BLOCK_N)
    group = tl.program_id(0) // per_group
    begin = tl.load(group_offsets + group - 1, mask=group > 0, other=0)
    end = tl.load(group_offsets + group)
    tl.device_assert(begin <= end, "group_offsets must ascend")
    tl.device_assert(end <= num_rows, "group_offsets must not pass the number of rows")
    m, n = place_tile(tl.program_id(0) % per_group, layout, BLOCK_M, BLOCK_N, GROUP_M)
    store_tile(out, sum_outer(operands, begin, end, m, n, layout, BLOCK_K), group, m, n, layout)


@triton.jit
def steps_of_groups(group_offsets, num_rows, num_groups, BLOCK_K: tl.constexpr, GROUPS: tl.constexpr):
    """group_offsets (E,) -> begin, end, the steps of a tile and their sum up to each group, (GROUPS,) each.

    A group without rows has a step that adds nothing, so that its zeros are written.
    """
    begin, end, _ = group_tiles(group_offsets, num_rows, num_groups, BLOCK_K, GROUPS)
    steps = tl.where(tl.arange(0, GROUPS) < num_groups, tl.maximum((end - begin + BLOCK_K - 1) // BLOCK_K, 1), 0)
    return begin, end, steps, tl.cumsum(steps, 0)


@triton.jit
def entry(values, index):
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) == index, values, 0), 0)


@triton.jit
def tile_of_step(step, steps, last, per_group):
    """The tile, among those of all groups, that a step belongs to."""
    group = tl.sum((last.to(tl.int64) * per_group <= step).to(tl.int32), 0)
    in_group = step - (entry(last, group) - entry(steps, group)).to(tl.int64) * per_group
    return (group * per_group + in_group // entry(steps, group)).to(tl.int32)


# as `_grouped_gemm_weight_grad_kernel` -> tiles of out that are all a program's own, and parts (P, 2, BLOCK_M, BLOCK_N)
# of the tile that it begins in the middle of and of the one that it leaves before its end
@triton.jit(do_not_specialize=["num_rows"])
def _grouped_gemm_weight_grad_shared_kernel(
    operands,
    group_offsets,
    out,
    parts,
    num_rows,
    num_groups,
    layout: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    begins, ends, steps, last = steps_of_groups(group_offsets, num_rows, num_groups, BLOCK_K, GROUPS)
    per_group = tl.cdiv(layout.size_m, BLOCK_M) * tl.cdiv(layout.size_n, BLOCK_N)
    num_steps = tl.max(last, 0).to(tl.int64) * per_group
    num_shares = tl.minimum(tl.num_programs(0), num_steps)
    program = tl.program_id(0).to(tl.int64)
    if program < num_shares:
        start, stop = program * num_steps // num_shares, (program + 1) * num_steps // num_shares
        final = tile_of_step(stop - 1, steps, last, per_group)
        for tile in range(tile_of_step(start, steps, last, per_group), final + 1):
            group, index = tile // per_group, tile % per_group
            begin, of_group = entry(begins, group), entry(steps, group)
            before = (entry(last, group) - of_group).to(tl.int64) * per_group + index * of_group
            low = tl.maximum(start - before, 0).to(tl.int32)
            high = tl.minimum(stop - before, of_group).to(tl.int32)
            m, n = place_tile(index, layout, BLOCK_M, BLOCK_N, GROUP_M)
            end = tl.minimum(begin + high * BLOCK_K, entry(ends, group))
            total = sum_outer(operands, begin + low * BLOCK_K, end, m, n, layout, BLOCK_K)
            if high - low == of_group:
                store_tile(out, total, group, m, n, layout)
            else:
                part = parts + (2 * program + (low == 0).to(tl.int64)) * BLOCK_M * BLOCK_N
                tl.store(part + tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], total)


# parts (P, 2, BLOCK_M, BLOCK_N), group_offsets (E,) -> the other tiles of out (E, M, N)
@triton.jit(do_not_specialize=["num_rows"])
def _grouped_gemm_weight_grad_parts_kernel(
    parts,
    group_offsets,
    out,
    num_rows,
    num_groups,
    num_programs,
    layout: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    _, _, steps, last = steps_of_groups(group_offsets, num_rows, num_groups, BLOCK_K, GROUPS)
    per_group = tl.cdiv(layout.size_m, BLOCK_M) * tl.cdiv(layout.size_n, BLOCK_N)
    num_steps = tl.max(last, 0).to(tl.int64) * per_group
    num_shares = tl.minimum(num_programs, num_steps)
    group, index = tl.program_id(0) // per_group, tl.program_id(0) % per_group
    of_group = entry(steps, group)
    before = (entry(last, group) - of_group).to(tl.int64) * per_group + index * of_group
    # Program p begins at step p * num_steps // num_shares: the greatest p that does not begin after a step.
    first = ((before + 1) * num_shares - 1) // num_steps
    final = ((before + of_group) * num_shares - 1) // num_steps
    if first < final:
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        at = parts + row[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        total = tl.load(at + (2 * first + 1) * BLOCK_M * BLOCK_N)
        for program in range(first + 1, final + 1):
            total += tl.load(at + 2 * program * BLOCK_M * BLOCK_N)
        m, n = place_tile(index, layout, BLOCK_M, BLOCK_N, GROUP_M)
        store_tile(out, total, group, tl.min(m, 0) + row, n, layout)


def weight_grad(
    a: Tensor,
    b: Tensor,
    group_offsets: Tensor,
    *,
    token_indices: Tensor | None = None,
    gather: str | None = None,
    dtype: torch.dtype,
    tile: Tile | None = None,
    num_shares: int | None = None,
) -> Tensor:
    """Per group the sum over its rows of a^T b: (R, M), (R, N) -> (E, M, N) in ``dtype``.

    Strides are compiled in, so none may vary with R: operands with gaps within their rows are copied.

    Args:
        gather: "a" or "b", whose rows are tokens (T, ...), read through ``token_indices``.
        tile: other than the one of `tiles.py`.
        num_shares: programs that share all steps evenly, 0 for a program a tile; other than what `tiles.py` says.
    """
    num_groups, size_m, size_n = group_offsets.shape[0], a.shape[1], b.shape[1]
    out = a.new_empty(num_groups, size_m, size_n, dtype=dtype)
    if out.numel() == 0:
        return out
    a, b = (one if one.stride(1) == 1 else one.contiguous() for one in (a, b))
    num_rows = (a if token_indices is None else token_indices).shape[0]
    operands = Operands(a, b, token_indices)
    layout = Layout(size_m, size_n, a.stride(0), b.stride(0), gather or "none", input_precision(a.dtype))

    def launch(tile: Tile) -> None:
        num_tiles = num_groups * cdiv(size_m, tile.m) * cdiv(size_n, tile.n)
        shares = weight_grad_shares(num_tiles, num_rows // num_groups, tile, out) if num_shares is None else num_shares
        if shares == 0:
            grid = (num_tiles,)
            _grouped_gemm_weight_grad_kernel[grid](operands, group_offsets, out, num_rows, layout, **tile.options)
            return
        parts = out.new_empty(shares, 2, tile.m, tile.n, dtype=torch.float32)
        sizes, constants = (num_rows, num_groups), {"layout": layout, "GROUPS": next_power_of_2(num_groups)}
        _grouped_gemm_weight_grad_shared_kernel[(shares,)](
            operands, group_offsets, out, parts, *sizes, **constants, **tile.options
        )
        rows = min(PART_ROWS, tile.m)
        _grouped_gemm_weight_grad_parts_kernel[(num_tiles, tile.m // rows)](
            parts, group_offsets, out, *sizes, shares, ROWS=rows, **constants, **tile.blocks
        )

    sizes = (num_rows, num_groups, size_m, size_n)
    launch(tile or best_weight_grad_tile(launch, sizes, a.dtype, dtype, gather))
    return out
