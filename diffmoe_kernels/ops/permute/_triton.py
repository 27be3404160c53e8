"""`permute` and `unpermute` in Triton: gathers and gather-sums, no atomics, the same bits every run.

T tokens, R rows, D = hidden size. Shapes of a kernel's pointers stand above it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmoe_kernels.triton_support import cdiv, next_power_of_2

ELEMENTS = 4096  # of a block: 16 bytes a load for 4 warps, four loads in flight


# x (T, D), token_indices (R,), group_offsets (E,) -> out (R, D)
@triton.jit
def _permute_fwd_kernel(
    x,
    token_indices,
    group_offsets,
    out,
    num_groups,
    num_columns: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid = rows < tl.load(group_offsets + num_groups - 1)
    mask = valid[:, None] & (columns < num_columns)[None, :]
    tokens = tl.load(token_indices + rows, mask=valid, other=0).to(tl.int64)
    values = tl.load(x + tokens[:, None] * num_columns + columns[None, :], mask=mask, other=0.0)
    tl.store(out + rows[:, None] * num_columns + columns[None, :], values, mask=mask)


# rows (R, D), gates (R,) or None, token_offsets (T + 1,), token_rows (R,), residual (T, D) or None -> out (T, D)
@triton.jit
def _unpermute_fwd_kernel(
    rows,
    gates,
    token_offsets,
    token_rows,
    residual,
    out,
    num_tokens,
    num_columns: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_range, in_width = tokens < num_tokens, (columns < num_columns)[None, :]
    begin = tl.load(token_offsets + tokens, mask=in_range, other=0)
    end = tl.load(token_offsets + tokens + 1, mask=in_range, other=0)
    mask = in_range[:, None] & in_width
    if residual is not None:
        total = tl.load(residual + tokens[:, None] * num_columns + columns[None, :], mask=mask, other=0.0)
        total = total.to(tl.float32)
    else:
        total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for slot in range(0, tl.max(end - begin, 0)):
        has_row = begin + slot < end
        row = tl.load(token_rows + begin + slot, mask=has_row, other=0).to(tl.int64)
        values = tl.load(
            rows + row[:, None] * num_columns + columns[None, :], mask=has_row[:, None] & in_width, other=0.0
        ).to(tl.float32)
        if gates is not None:
            values *= tl.load(gates + row, mask=has_row, other=0.0)[:, None]
        total += values
    tl.store(out + tokens[:, None] * num_columns + columns[None, :], total.to(out.dtype.element_ty), mask=mask)


# rows (R, D), gates (R,), token_indices (R,), group_offsets (E,), grad_out (T, D) -> grad_rows (R, D), grad_gates (R,)
@triton.jit
def _unpermute_bwd_kernel(
    rows,
    gates,
    token_indices,
    group_offsets,
    grad_out,
    grad_rows,
    grad_gates,
    num_groups,
    num_rows,
    num_columns: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = row < tl.load(group_offsets + num_groups - 1)
    tokens = tl.load(token_indices + row, mask=valid, other=0).to(tl.int64)
    gate = tl.load(gates + row, mask=valid, other=0.0)
    product = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, num_columns, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        in_width = (columns < num_columns)[None, :]
        at = row[:, None] * num_columns + columns[None, :]
        grad = tl.load(
            grad_out + tokens[:, None] * num_columns + columns[None, :], mask=valid[:, None] & in_width, other=0.0
        ).to(tl.float32)
        value = tl.load(rows + at, mask=valid[:, None] & in_width, other=0.0).to(tl.float32)
        product += tl.sum(grad * value, 1)
        # Past the last row too, where gradients are 0.
        inside = (row < num_rows)[:, None] & in_width
        tl.store(grad_rows + at, (grad * gate[:, None]).to(grad_rows.dtype.element_ty), mask=inside)
    tl.store(grad_gates + row, product, mask=row < num_rows)


def _blocks(num_columns: int, elements: int = ELEMENTS) -> tuple[int, int]:
    width = min(next_power_of_2(num_columns), 1024)
    return max(elements // width, 1), width


def permute_fwd(x: Tensor, token_indices: Tensor, group_offsets: Tensor) -> Tensor:
    """(T, D) -> (R, D): row r is token ``token_indices[r]``; not written past the last group."""
    out = x.new_empty(token_indices.shape[0], x.shape[1])
    if out.numel() == 0:
        return out
    block_r, block_d = _blocks(x.shape[1])
    grid = (cdiv(out.shape[0], block_r), cdiv(out.shape[1], block_d))
    _permute_fwd_kernel[grid](
        x, token_indices, group_offsets, out, group_offsets.shape[0], out.shape[1], block_r, block_d
    )
    return out


def unpermute_fwd(
    rows: Tensor,
    gates: Tensor | None,
    token_offsets: Tensor,
    token_rows: Tensor,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(R, D) -> (T, D): each token's rows, weighted and summed in float32 in a fixed order, and the residual."""
    num_tokens, num_columns = token_offsets.shape[0] - 1, rows.shape[1]
    out = rows.new_empty(num_tokens, num_columns, dtype=dtype)
    if out.numel() == 0:
        return out
    block_t, block_d = _blocks(num_columns)
    grid = (cdiv(num_tokens, block_t), cdiv(num_columns, block_d))
    _unpermute_fwd_kernel[grid](
        rows,
        gates,
        token_offsets,
        token_rows,
        residual,
        out,
        num_tokens,
        num_columns,
        block_t,
        block_d,
    )
    return out


def unpermute_bwd(
    grad_out: Tensor, rows: Tensor, gates: Tensor, token_indices: Tensor, group_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `unpermute_fwd` by its rows (R, D) and gates (R,); 0 past the last group."""
    grad_rows, grad_gates = torch.empty_like(rows), torch.empty_like(gates)
    if rows.numel() == 0:
        return grad_rows, grad_gates.zero_()
    block_r, block_d = _blocks(rows.shape[1], 2 * ELEMENTS)  # with 8 warps: with 4 some compilers spill
    _unpermute_bwd_kernel[(cdiv(rows.shape[0], block_r),)](
        rows,
        gates,
        token_indices,
        group_offsets,
        grad_out,
        grad_rows,
        grad_gates,
        group_offsets.shape[0],
        *rows.shape,
        block_r,
        block_d,
        num_warps=8,
    )
    return grad_rows, grad_gates
