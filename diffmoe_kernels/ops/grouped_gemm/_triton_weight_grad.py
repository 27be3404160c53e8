"""The weight gradient of grouped products in Triton: each group's sum of outer products, with gathers in its loads.

E groups, R rows divided among them by `group_offsets` (E,), which only the device knows; M and N the matrices' sizes.
TRITON_DEBUG=1 makes the kernel check on the device that the offsets ascend and stay within the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmoe_kernels.ops.grouped_gemm.tiles import best_weight_grad_tile
from diffmoe_kernels.triton_support import Tile, input_precision


# a (R, M) or (T, M) gathered, b (R, N) or (T, N) gathered, token_indices (R,) or None -> out (E, M, N)
@triton.jit(do_not_specialize=["num_rows"])
def _grouped_gemm_weight_grad_kernel(
    a,
    b,
    token_indices,
    group_offsets,
    out,
    num_rows,
    num_tiles_m,
    num_tiles_n,
    size_m: tl.constexpr,
    size_n: tl.constexpr,
    stride_a: tl.constexpr,
    stride_b: tl.constexpr,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
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
    rows = begin + tl.arange(0, BLOCK_K)
    if token_indices is not None:  # a step ahead, so that what they point at is fetched in time
        tokens = tl.load(token_indices + rows, mask=rows < end, other=0)
    for start in range(begin, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        inside = rows < end
        source_a = (tokens if GATHER_A else rows).to(tl.int64)
        source_b = (tokens if GATHER_B else rows).to(tl.int64)
        a_tile = tl.load(
            a + source_a[None, :] * stride_a + m[:, None],
            mask=inside[None, :] & (m < size_m)[:, None],
            other=0.0,
        )
        b_tile = tl.load(
            b + source_b[:, None] * stride_b + n[None, :],
            mask=inside[:, None] & (n < size_n)[None, :],
            other=0.0,
        )
        total = tl.dot(a_tile, b_tile, total, input_precision=PRECISION)
        if token_indices is not None:
            tokens = tl.load(token_indices + rows + BLOCK_K, mask=rows + BLOCK_K < end, other=0)
    at = out + group.to(tl.int64) * size_m * size_n + m.to(tl.int64)[:, None] * size_n + n[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(m < size_m)[:, None] & (n < size_n)[None, :])


def weight_grad(
    a: Tensor,
    b: Tensor,
    group_offsets: Tensor,
    *,
    token_indices: Tensor | None = None,
    gather: str | None = None,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """Per group the sum over its rows of a^T b: (R, M), (R, N) -> (E, M, N) in ``dtype``.

    Strides are compiled in, so none may vary with R: operands with gaps within their rows are copied.

    Args:
        gather: "a" or "b", whose rows are tokens (T, ...), read through ``token_indices``.
        tile: other than the one of `tiles.py`.
    """
    num_groups, size_m, size_n = group_offsets.shape[0], a.shape[1], b.shape[1]
    out = a.new_empty(num_groups, size_m, size_n, dtype=dtype)
    if out.numel() == 0:
        return out
    a, b = (one if one.stride(1) == 1 else one.contiguous() for one in (a, b))
    num_rows = (a if token_indices is None else token_indices).shape[0]

    def launch(tile: Tile) -> None:
        tiles_m, tiles_n = triton.cdiv(size_m, tile.m), triton.cdiv(size_n, tile.n)
        _grouped_gemm_weight_grad_kernel[(num_groups * tiles_m * tiles_n,)](
            a,
            b,
            token_indices,
            group_offsets,
            out,
            num_rows,
            tiles_m,
            tiles_n,
            size_m,
            size_n,
            a.stride(0),
            b.stride(0),
            GATHER_A=gather == "a",
            GATHER_B=gather == "b",
            PRECISION=input_precision(a.dtype),
            **tile.options,
        )

    sizes = (num_rows, num_groups, size_m, size_n)
    launch(tile or best_weight_grad_tile(launch, sizes, a.dtype, dtype, gather))
    return out
