"""Sums over each group's rows in Triton: the gradients of biases.

Not a part of the products that read the same rows: where a tile is an operand and something else too, Triton keeps one
buffer too few for products under way, and a copy lands on an operand that is still read (3.6 and 3.7, sm_90).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmoe_kernels.triton_support import cdiv

ROWS, COLUMNS = 128, 64  # of a tile


# rows (R, N), or (T, N) with token_indices (R,), gates (R,) or None, group_offsets (E,) -> out (E, N)
@triton.jit
def _grouped_gemm_sum_rows_kernel(
    rows,
    token_indices,
    gates,
    group_offsets,
    out,
    stride: tl.constexpr,
    num_columns: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    group = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = tl.load(group_offsets + group - 1, mask=group > 0, other=0)
    end = tl.load(group_offsets + group)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)  # added across threads once, at the end
    source = begin + tl.arange(0, BLOCK_R)
    if token_indices is not None:
        source = tl.load(token_indices + source, mask=source < end, other=0)
    for start in range(begin, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < end)[:, None] & (columns < num_columns)[None, :]
        values = tl.load(rows + source.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)
        source = row + BLOCK_R
        if token_indices is not None:  # a step ahead, so that rows need not wait for where they are
            source = tl.load(token_indices + source, mask=source < end, other=0)
        values = values.to(tl.float32)
        if gates is not None:
            values *= tl.load(gates + row, mask=row < end, other=0.0)[:, None]
        total += values
    total = tl.sum(total, 0).to(out.dtype.element_ty)
    tl.store(out + group * num_columns + columns, total, mask=columns < num_columns)


def sum_rows(
    rows: Tensor,
    group_offsets: Tensor,
    *,
    token_indices: Tensor | None = None,
    gates: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """(R, N) -> (E, N) in ``dtype``: each group's sum of its rows, in float32, weighted with the gates (R,).

    token_indices: (R,), through which rows of tokens (T, N) are read.
    """
    num_groups, num_columns = group_offsets.shape[0], rows.shape[1]
    out = rows.new_empty(num_groups, num_columns, dtype=dtype)
    if out.numel() == 0:
        return out
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    _grouped_gemm_sum_rows_kernel[(num_groups, cdiv(num_columns, COLUMNS))](
        rows,
        token_indices,
        gates,
        group_offsets,
        out,
        rows.stride(0),
        num_columns,
        BLOCK_R=ROWS,
        BLOCK_C=COLUMNS,
    )
    return out
