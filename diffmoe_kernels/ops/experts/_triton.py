"""`experts` in Triton: up-projection with gather and activation, down-projection, combine; and the way back.

T tokens, R rows, E experts, D hidden size, I intermediate size, U = 2I for "swiglu" (gate columns, then up) and I
for the others. Kept for the backward: x, the pre-activation (R, U) and the routing; activations are computed again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmoe_kernels.ops.grouped_gemm._triton import find_tile, group_tiles, most_tiles
from diffmoe_kernels.ops.grouped_gemm.tiles import pick_tile
from diffmoe_kernels.triton_support import Tile, describe, input_precision, next_power_of_2, num_programs


@triton.jit
def _sigmoid(h):
    return 1.0 / (1.0 + tl.exp(-h))


@triton.jit
def _gelu_tanh_parts(h):
    """tanh of GELU's inner function, and that function's derivative."""
    scale: tl.constexpr = 0.7978845608028654  # sqrt(2 / pi)
    inner = scale * (h + 0.044715 * h * h * h)
    return 2.0 * _sigmoid(2.0 * inner) - 1.0, scale * (1.0 + 3.0 * 0.044715 * h * h)


@triton.jit
def _activate(h, ACTIVATION: tl.constexpr):
    """silu, for "swiglu" of its gate, or GELU."""
    if ACTIVATION == "gelu_tanh":
        tanh, _ = _gelu_tanh_parts(h)
        return 0.5 * h * (1.0 + tanh)
    else:
        return h * _sigmoid(h)


@triton.jit
def _activate_and_slope(h, ACTIVATION: tl.constexpr):
    """The activation and its derivative."""
    if ACTIVATION == "gelu_tanh":
        tanh, inner_slope = _gelu_tanh_parts(h)
        return 0.5 * h * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * h * (1.0 - tanh * tanh) * inner_slope
    else:
        sigmoid = _sigmoid(h)
        return h * sigmoid, sigmoid * (1.0 + h * (1.0 - sigmoid))


# x (T, D), token_indices (R,), up (E, U, D) or a descriptor of its tiles, bias (E, U), group_offsets (E,)
# -> pre (R, U), hidden (R, I)
@triton.jit
def _up_kernel(
    x,
    token_indices,
    up,
    bias,
    group_offsets,
    pre,
    hidden,
    num_rows,
    num_groups: tl.constexpr,
    width: tl.constexpr,
    depth: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEPS_PRE: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUPS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    up_width: tl.constexpr = 2 * width if GATED else width  # U
    begin, ends, last = group_tiles(group_offsets, num_rows, num_groups, BLOCK_M, GROUPS)
    num_tiles_m, num_tiles_n = tl.max(last, 0), tl.cdiv(width, BLOCK_N)
    for index in range(tl.program_id(0), num_tiles_m * num_tiles_n, tl.num_programs(0)):
        group, first, end, tile_n = find_tile(
            index, begin, ends, last, num_tiles_m, num_tiles_n, BLOCK_M, GROUP_M, GROUPS
        )
        rows = first + tl.arange(0, BLOCK_M)
        columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        in_rows, in_columns = (rows < end)[:, None], (columns < width)[None, :]
        tokens = tl.load(token_indices + rows, mask=rows < end, other=0).to(tl.int64)
        x_at = x + tokens[:, None] * depth + k[None, :]
        if not DESCRIPTORS:
            gate_at = up + (group.to(tl.int64) * up_width + columns[None, :]) * depth + k[:, None]
            up_at = gate_at + width * depth
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, depth, BLOCK_K):
            in_x, in_up = in_rows, in_columns
            if depth % BLOCK_K != 0:
                inside = start + k < depth
                in_x, in_up = in_rows & inside[None, :], in_columns & inside[:, None]
            x_tile = tl.load(x_at, mask=in_x, other=0.0)
            if DESCRIPTORS:
                gate_tile = tl.reshape(up.load([group, tile_n * BLOCK_N, start]), (BLOCK_N, BLOCK_K)).T
            else:
                gate_tile = tl.load(gate_at, mask=in_up, other=0.0)
            gate = tl.dot(x_tile, gate_tile, gate, input_precision=PRECISION)
            if GATED:
                if DESCRIPTORS:
                    up_tile = tl.reshape(up.load([group, width + tile_n * BLOCK_N, start]), (BLOCK_N, BLOCK_K)).T
                else:
                    up_tile = tl.load(up_at, mask=in_up, other=0.0)
                value = tl.dot(x_tile, up_tile, value, input_precision=PRECISION)
            x_at += BLOCK_K
            if not DESCRIPTORS:
                gate_at += BLOCK_K
                up_at += BLOCK_K
        if HAS_BIAS:
            bias_at = bias + group * up_width + columns
            gate += tl.load(bias_at, mask=columns < width, other=0.0).to(tl.float32)[None, :]
            if GATED:
                value += tl.load(bias_at + width, mask=columns < width, other=0.0).to(tl.float32)[None, :]
        # The activation sees what is kept, rounded, so that the backward computes the same one again.
        kind = hidden.dtype.element_ty
        gate_kept, value_kept = gate.to(kind), value.to(kind)
        mask = in_rows & in_columns
        rows = rows.to(tl.int64)[:, None]
        if KEEPS_PRE:
            tl.store(pre + rows * up_width + columns[None, :], gate_kept, mask=mask)
            if GATED:
                tl.store(pre + rows * up_width + width + columns[None, :], value_kept, mask=mask)
        result = _activate(gate_kept.to(tl.float32), ACTIVATION)
        if GATED:
            result *= value_kept.to(tl.float32)
        tl.store(hidden + rows * width + columns[None, :], result.to(kind), mask=mask)


@triton.jit
def _activation_backward(
    grad, gate, rows, end, columns, pre, grad_pre, weighted, width: tl.constexpr, ACTIVATION: tl.constexpr
):
    """From the gradient by an activation tile, before the gate: stores that by the pre-activation and the weighted
    activation, returns the gates' gradient (BLOCK_M,) by these columns."""
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    up_width: tl.constexpr = 2 * width if GATED else width  # U
    mask = (rows < end)[:, None] & (columns < width)[None, :]
    at = rows.to(tl.int64)[:, None] * up_width + columns[None, :]
    kind = pre.dtype.element_ty
    activation, slope = _activate_and_slope(tl.load(pre + at, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    grad_hidden = grad * gate[:, None]
    if GATED:
        value = tl.load(pre + at + width, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_pre + at + width, (grad_hidden * activation).to(kind), mask=mask)
        tl.store(grad_pre + at, (grad_hidden * value * slope).to(kind), mask=mask)
        activation *= value
    else:
        tl.store(grad_pre + at, (grad_hidden * slope).to(kind), mask=mask)
    weighted_at = weighted + rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(weighted_at, (activation * gate[:, None]).to(kind), mask=mask)
    return tl.sum(tl.where(mask, grad * activation, 0.0), 1)


# grad_out (T, D), token_indices (R,), gates (R,), down (E, D, I) or a descriptor of its tiles, down_bias (E, D),
# pre (R, U), group_offsets (E,) -> grad_pre (R, U), weighted (R, I): gates * activation, grad_gates (tiles of I, R):
# parts of the gates' gradients
@triton.jit
def _down_backward_kernel(
    grad_out,
    token_indices,
    gates,
    down,
    down_bias,
    pre,
    group_offsets,
    grad_pre,
    weighted,
    grad_gates,
    num_rows,
    num_groups: tl.constexpr,
    width: tl.constexpr,
    depth: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUPS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
):
    begin, ends, last = group_tiles(group_offsets, num_rows, num_groups, BLOCK_M, GROUPS)
    num_tiles_m, num_tiles_n = tl.max(last, 0), tl.cdiv(width, BLOCK_N)
    for index in range(tl.program_id(0), num_tiles_m * num_tiles_n, tl.num_programs(0)):
        group, first, end, tile_n = find_tile(
            index, begin, ends, last, num_tiles_m, num_tiles_n, BLOCK_M, GROUP_M, GROUPS
        )
        rows = first + tl.arange(0, BLOCK_M)
        columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        in_rows, in_columns = (rows < end)[:, None], (columns < width)[None, :]
        tokens = tl.load(token_indices + rows, mask=rows < end, other=0).to(tl.int64)
        grad_at = grad_out + tokens[:, None] * depth + k[None, :]
        if not DESCRIPTORS:
            down_at = down + (group.to(tl.int64) * depth + k[:, None]) * width + columns[None, :]
        bias_at = down_bias + group * depth + k
        grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # by the activation, before the gate
        by_bias = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, depth, BLOCK_K):
            in_grad, in_down, in_depth = in_rows, in_columns, k < BLOCK_K
            if depth % BLOCK_K != 0:
                in_depth = start + k < depth
                in_grad, in_down = in_rows & in_depth[None, :], in_columns & in_depth[:, None]
            grad_tile = tl.load(grad_at, mask=in_grad, other=0.0)
            if DESCRIPTORS:
                down_tile = tl.reshape(down.load([group, start, tile_n * BLOCK_N]), (BLOCK_K, BLOCK_N))
            else:
                down_tile = tl.load(down_at, mask=in_down, other=0.0)
                down_at += BLOCK_K * width
            grad = tl.dot(grad_tile, down_tile, grad, input_precision=PRECISION)
            if HAS_BIAS:
                bias = tl.load(bias_at, mask=in_depth, other=0.0).to(tl.float32)
                by_bias += tl.sum(grad_tile.to(tl.float32) * bias[None, :], 1)
                bias_at += BLOCK_K
            grad_at += BLOCK_K

        gate = tl.load(gates + rows, mask=rows < end, other=0.0)
        if SPLIT:  # the tile in two halves: what the whole needs at once does not fit in registers
            HALF: tl.constexpr = BLOCK_N // 2
            left, right = tl.split(tl.permute(tl.reshape(grad, (BLOCK_M, 2, HALF)), (0, 2, 1)))
            half = tile_n * BLOCK_N + tl.arange(0, HALF)
            by_gate = _activation_backward(left, gate, rows, end, half, pre, grad_pre, weighted, width, ACTIVATION)
            half += HALF
            by_gate += _activation_backward(right, gate, rows, end, half, pre, grad_pre, weighted, width, ACTIVATION)
        else:
            by_gate = _activation_backward(grad, gate, rows, end, columns, pre, grad_pre, weighted, width, ACTIVATION)
        if HAS_BIAS:
            by_gate += tl.where(tile_n == 0, by_bias, 0.0)
        tl.store(grad_gates + tile_n.to(tl.int64) * num_rows + rows, by_gate, mask=rows < end)


# parts (P, R), group_offsets (E,) -> out (R,): sums of the parts in order, 0 past the last group
@triton.jit
def _sum_parts_kernel(parts, group_offsets, out, num_groups, num_rows, num_parts, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = rows < tl.load(group_offsets + num_groups - 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, num_parts):
        total += tl.load(parts + part * num_rows + rows, mask=valid, other=0.0)
    tl.store(out + rows, total, mask=rows < num_rows)


def up_projection(
    x: Tensor,
    token_indices: Tensor,
    group_offsets: Tensor,
    up: Tensor,
    bias: Tensor | None,
    activation: str,
    *,
    keep_pre: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """(T, D) -> pre (R, U), or (0, U) where it is not kept, and hidden (R, I); not written past the last group."""
    num_rows, (num_groups, up_width, depth) = token_indices.shape[0], up.shape
    gated = activation == "swiglu"
    width = up_width // 2 if gated else up_width
    pre, hidden = x.new_empty(num_rows if keep_pre else 0, up_width), x.new_empty(num_rows, width)
    if hidden.numel() == 0:
        return pre, hidden
    tile = tile or pick_tile(num_rows, num_groups, width, depth, x.dtype, paired=gated)
    descriptors = describe((up, (1, tile.n, tile.k))) if tile.descriptors else None
    grid = num_programs(most_tiles(num_rows, num_groups, tile.m) * triton.cdiv(width, tile.n), x)
    _up_kernel[(grid,)](
        x,
        token_indices,
        *(descriptors or (up,)),
        x if bias is None else bias,
        group_offsets,
        pre if keep_pre else hidden,
        hidden,
        num_rows,
        num_groups=num_groups,
        width=width,
        depth=depth,
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        KEEPS_PRE=keep_pre,
        PRECISION=input_precision(x.dtype),
        GROUPS=next_power_of_2(num_groups),
        DESCRIPTORS=descriptors is not None,
        **tile.options,
    )
    return pre, hidden


def down_backward(
    grad_out: Tensor,
    token_indices: Tensor,
    gates: Tensor,
    group_offsets: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    pre: Tensor,
    activation: str,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_out (T, D) -> grad_pre (R, U), gates * activation (R, I), both not written past the last group, and the
    gates' gradient (R,), 0 there."""
    num_rows, (num_groups, depth, width) = token_indices.shape[0], down.shape
    grad_pre, weighted = torch.empty_like(pre), pre.new_empty(num_rows, width)
    grad_gates = torch.empty_like(gates)
    if weighted.numel() == 0:
        return grad_pre, weighted, grad_gates.zero_()
    # Its epilogue holds as much as that of a pair.
    tile = tile or pick_tile(num_rows, num_groups, width, depth, pre.dtype, paired=True)
    descriptors = describe((down, (1, tile.k, tile.n))) if tile.descriptors else None
    tiles_n = triton.cdiv(width, tile.n)
    parts = gates.new_empty(tiles_n, num_rows)
    grid = num_programs(most_tiles(num_rows, num_groups, tile.m) * tiles_n, pre)
    _down_backward_kernel[(grid,)](
        grad_out,
        token_indices,
        gates,
        *(descriptors or (down,)),
        pre if down_bias is None else down_bias,
        pre,
        group_offsets,
        grad_pre,
        weighted,
        parts,
        num_rows,
        num_groups=num_groups,
        width=width,
        depth=depth,
        ACTIVATION=activation,
        HAS_BIAS=down_bias is not None,
        PRECISION=input_precision(pre.dtype),
        GROUPS=next_power_of_2(num_groups),
        DESCRIPTORS=descriptors is not None,
        SPLIT=tile.n >= 64,
        **tile.options,
    )
    _sum_parts_kernel[(triton.cdiv(num_rows, 1024),)](
        parts, group_offsets, grad_gates, num_groups, num_rows, tiles_n, BLOCK=1024
    )
    return grad_pre, weighted, grad_gates
