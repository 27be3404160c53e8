"""`experts` with the products of `torch.nn.functional.grouped_mm`, and Triton for what lies between them.

T tokens, R rows, E experts, D hidden size, I intermediate size, U = 2I for "swiglu" and I for the others. Keeps for the
backward what the kernels of `_triton.py` keep. Gathered rows are made where a product reads them, and dropped after it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from diffmoe_kernels.ops.experts._triton import activated
from diffmoe_kernels.ops.experts._triton_backward import (
    COLUMNS,
    ELEMENTS_BACKWARD,
    activation_backward,
    groups_of,
    products_with_bias,
    rows_of_tile,
)
from diffmoe_kernels.ops.grouped_gemm._triton_sum_rows import sum_rows
from diffmoe_kernels.ops.permute._triton import permute_fwd, unpermute_fwd
from diffmoe_kernels.routing import Routing
from diffmoe_kernels.triton_support import cdiv, next_power_of_2

ELEMENTS = 4096  # of a tile, forward


# pre (R, U) or (R, N), bias (E, U) or (E, N) or None, group_offsets (E,) -> pre with the bias, hidden (R, I) unless it
# is None
@triton.jit
def _experts_activation_fwd_kernel(
    pre,
    bias,
    group_offsets,
    hidden,
    num_groups,
    width: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    up_width: tl.constexpr = 2 * width if GATED else width
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (rows < tl.load(group_offsets + num_groups - 1))[:, None] & (columns < width)[None, :]
    at = rows.to(tl.int64)[:, None] * up_width + columns[None, :]
    kept = tl.load(pre + at, mask=mask, other=0.0)
    if GATED:
        value = tl.load(pre + at + width, mask=mask, other=0.0)
    if bias is not None:
        group = groups_of(group_offsets, rows, num_groups, GROUPS)
        bias_at = bias + group[:, None] * up_width + columns[None, :]
        kept = (kept.to(tl.float32) + tl.load(bias_at, mask=mask, other=0.0).to(tl.float32)).to(pre.dtype.element_ty)
        tl.store(pre + at, kept, mask=mask)
        if GATED:
            other = tl.load(bias_at + width, mask=mask, other=0.0).to(tl.float32)
            value = (value.to(tl.float32) + other).to(pre.dtype.element_ty)
            tl.store(pre + at + width, value, mask=mask)
    if hidden is not None:
        result = activated(kept.to(tl.float32), ACTIVATION)
        if GATED:
            result *= value.to(tl.float32)
        at = rows.to(tl.int64)[:, None] * width + columns[None, :]
        tl.store(hidden + at, result.to(hidden.dtype.element_ty), mask=mask)


# grad_hidden (R, I) before the gate, gates (R,), pre (R, U), grad_rows (R, D), bias (E, D) or None,
# group_offsets (E,) -> grad_pre (R, U), weighted (R, I), grad_gates (R,)
@triton.jit
def _experts_activation_bwd_kernel(
    grad_hidden,
    gates,
    pre,
    grad_rows,
    bias,
    group_offsets,
    grad_pre,
    weighted,
    grad_gates,
    num_rows,
    num_groups,
    width: tl.constexpr,
    hidden_size: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    end = tl.load(group_offsets + num_groups - 1)
    valid = rows < end
    gate = tl.load(gates + rows, mask=valid, other=0.0)
    by_gate = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, width, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        at = grad_hidden + rows.to(tl.int64)[:, None] * width + columns[None, :]
        grad = tl.load(at, mask=valid[:, None] & (columns < width)[None, :], other=0.0).to(tl.float32)
        by_gate += activation_backward(grad, gate, rows, end, columns, pre, grad_pre, weighted, width, ACTIVATION)
    if bias is not None:
        group = groups_of(group_offsets, rows, num_groups, GROUPS)
        by_gate += products_with_bias(grad_rows, rows, group, bias, valid, hidden_size, BLOCK_C)
    tl.store(grad_gates + rows, by_gate, mask=rows < num_rows)


def _epilogue(pre: Tensor, bias: Tensor | None, group_offsets: Tensor, hidden: Tensor | None, activation: str) -> None:
    num_groups, width = group_offsets.shape[0], (pre if hidden is None else hidden).shape[1]
    block_c = min(next_power_of_2(width), COLUMNS)
    groups = next_power_of_2(num_groups)
    block_r = rows_of_tile(ELEMENTS, block_c, groups)
    grid = (cdiv(pre.shape[0], block_r), cdiv(width, block_c))
    _experts_activation_fwd_kernel[grid](
        pre,
        bias,
        group_offsets,
        hidden,
        num_groups,
        width,
        ACTIVATION=activation,
        GROUPS=groups,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
    )


def experts_fwd(
    x: Tensor,
    routing: Routing,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    *,
    keep_pre: bool,
) -> tuple[Tensor, Tensor]:
    """(T, D) -> rows (R, D) and the pre-activation (R, U), or (0, U) where it is not kept; neither is written past
    the last group."""
    offsets = routing.group_offsets
    pre = F.grouped_mm(permute_fwd(x, routing.token_indices, offsets), up.mT, offs=offsets)
    hidden = pre.new_empty(pre.shape[0], down.shape[2])
    _epilogue(pre, up_bias, offsets, hidden, activation)
    rows = F.grouped_mm(hidden, down.mT, offs=offsets)
    if down_bias is not None:
        _epilogue(rows, down_bias, offsets, None, "none")
    return rows, pre if keep_pre else pre.new_empty(0, pre.shape[1])


def experts_bwd(
    grad: Tensor,
    x: Tensor,
    routing: Routing,
    up: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    pre: Tensor,
    activation: str,
    *,
    needs_x: bool,
    needs_weights: bool,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, ...]:
    """grad (T, D) -> gradients with respect to x, gates, up, down and their biases; None where not asked for."""
    gates, token_indices, offsets = routing.gates, routing.token_indices, routing.group_offsets
    grad_rows = permute_fwd(grad, token_indices, offsets)
    grad_hidden = F.grouped_mm(grad_rows, down, offs=offsets)
    grad_pre, weighted, grad_gates = torch.empty_like(pre), torch.empty_like(grad_hidden), torch.empty_like(gates)
    num_groups, hidden_size, width = down.shape
    block_c = min(next_power_of_2(width), COLUMNS)
    groups = next_power_of_2(num_groups)
    block_r = rows_of_tile(ELEMENTS_BACKWARD, block_c, groups)
    _experts_activation_bwd_kernel[(cdiv(pre.shape[0], block_r),)](
        grad_hidden,
        gates,
        pre,
        grad_rows,
        down_bias,
        offsets,
        grad_pre,
        weighted,
        grad_gates,
        pre.shape[0],
        num_groups,
        width,
        hidden_size,
        ACTIVATION=activation,
        GROUPS=groups,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
    )
    del grad_hidden
    grad_x = None
    if needs_x:
        rows = F.grouped_mm(grad_pre, up, offs=offsets)
        grad_x = unpermute_fwd(rows, None, routing.token_offsets, routing.token_rows)
    if not needs_weights:
        return grad_x, grad_gates, None, None, None, None
    grad_up = F.grouped_mm(grad_pre.mT, permute_fwd(x, token_indices, offsets), offs=offsets)
    grad_down = F.grouped_mm(grad_rows.mT, weighted, offs=offsets)
    grad_biases = None, None
    if bias_dtype is not None:
        grad_biases = (
            sum_rows(grad_pre, offsets, dtype=bias_dtype),
            sum_rows(grad_rows, offsets, gates=gates, dtype=bias_dtype),
        )
    return grad_x, grad_gates, grad_up.to(weight_dtype), grad_down.to(weight_dtype), *grad_biases
