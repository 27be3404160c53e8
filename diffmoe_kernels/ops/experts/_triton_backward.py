"""`experts` in Triton, backward: from the output's gradient through the activation to inputs, gates and weights.

T tokens, R rows, E experts, D hidden size, I intermediate size, U = 2I for "swiglu" (gate columns, then up) and I
for the others. The activation is computed again from the pre-activation (R, U).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmoe_kernels.ops.experts._triton import passed
from diffmoe_kernels.ops.grouped_gemm._triton import find_tile, group_tiles, most_tiles, multiply_rows
from diffmoe_kernels.ops.grouped_gemm._triton_sum_rows import sum_rows
from diffmoe_kernels.ops.grouped_gemm._triton_weight_grad import weight_grad
from diffmoe_kernels.ops.grouped_gemm.tiles import best_product_tile
from diffmoe_kernels.ops.permute._triton import unpermute_fwd
from diffmoe_kernels.routing import Routing
from diffmoe_kernels.triton_support import Tile, cdiv, describe, input_precision, next_power_of_2, num_programs

COLUMNS, ELEMENTS_BACKWARD = 512, 2048  # of a step over a row's columns, of a tile


@triton.jit
def _activate_and_slope(h, ACTIVATION: tl.constexpr):
    """The activation and its derivative."""
    share, slope = passed(h, ACTIVATION)
    return h * share, share + (h * share) * (1.0 - share) * slope


@triton.jit
def activation_backward(
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


@triton.jit
def groups_of(group_offsets, rows, num_groups, GROUPS: tl.constexpr):
    """group_offsets (E,), rows (BLOCK,) -> each row's group, E past the last."""
    group = tl.arange(0, GROUPS)
    ends = tl.load(group_offsets + group, mask=group < num_groups, other=2147483647)
    return tl.sum((ends[None, :] <= rows[:, None]).to(tl.int32), 1)


@triton.jit
def products_with_bias(grad, source, group, bias, valid, hidden_size: tl.constexpr, BLOCK_C: tl.constexpr):
    """(BLOCK,) <grad[source], bias[group]>: what the bias of the down-projection adds to the gates' gradients."""
    total = tl.zeros(source.shape, tl.float32)
    for start in range(0, hidden_size, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        mask = valid[:, None] & (columns < hidden_size)[None, :]
        at = source.to(tl.int64)[:, None] * hidden_size + columns[None, :]
        values = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        added = tl.load(bias + group[:, None] * hidden_size + columns[None, :], mask=mask, other=0.0)
        # tl.where keeps the product from being fused into the sum, by which threads that share a row would differ.
        total += tl.sum(tl.where(mask, values * added.to(tl.float32), 0.0), 1)
    return total


# grad_out (T, D), token_indices (R,), gates (R,), down (E, D, I) or a descriptor of its tiles, pre (R, U),
# group_offsets (E,) -> grad_pre (R, U), weighted (R, I): gates * activation, grad_gates (tiles of I, R): parts of the
# gates' gradients
@triton.jit(do_not_specialize=["num_rows"])
def _experts_down_bwd_kernel(
    grad_out,
    token_indices,
    gates,
    down,
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
        grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # by the activation, before the gate
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
            grad_at += BLOCK_K

        gate = tl.load(gates + rows, mask=rows < end, other=0.0)
        if SPLIT:  # the tile in two halves: what the whole needs at once does not fit in registers
            HALF: tl.constexpr = BLOCK_N // 2
            left, right = tl.split(tl.permute(tl.reshape(grad, (BLOCK_M, 2, HALF)), (0, 2, 1)))
            half = tile_n * BLOCK_N + tl.arange(0, HALF)
            by_gate = activation_backward(left, gate, rows, end, half, pre, grad_pre, weighted, width, ACTIVATION)
            half += HALF
            by_gate += activation_backward(right, gate, rows, end, half, pre, grad_pre, weighted, width, ACTIVATION)
        else:
            by_gate = activation_backward(grad, gate, rows, end, columns, pre, grad_pre, weighted, width, ACTIVATION)
        tl.store(grad_gates + tile_n.to(tl.int64) * num_rows + rows, by_gate, mask=rows < end)


# parts (P, R), group_offsets (E,), grad_out (T, D), token_indices (R,), bias (E, D) or None -> out (R,): sums of the
# parts, and of what the bias adds; 0 past the last group
@triton.jit
def _experts_gates_bwd_kernel(
    parts,
    group_offsets,
    grad_out,
    token_indices,
    bias,
    out,
    num_groups,
    num_rows,
    num_parts: tl.constexpr,
    hidden_size: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = rows < tl.load(group_offsets + num_groups - 1)
    part = tl.arange(0, BLOCK_P)
    at = part.to(tl.int64)[:, None] * num_rows + rows[None, :]
    total = tl.sum(tl.load(parts + at, mask=(part < num_parts)[:, None] & valid[None, :], other=0.0), 0)
    if bias is not None:
        tokens = tl.load(token_indices + rows, mask=valid, other=0)
        group = groups_of(group_offsets, rows, num_groups, GROUPS)
        total += products_with_bias(grad_out, tokens, group, bias, valid, hidden_size, BLOCK_C)
    tl.store(out + rows, total, mask=rows < num_rows)


def rows_of_tile(elements: int, columns: int, groups: int) -> int:
    """As many as give it that many elements; fewer where `groups_of` compares each row with many groups."""
    return max(elements // max(columns, groups // 8), 1)


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

    def launch(tile: Tile) -> Tensor:
        descriptors = describe((down, (1, tile.k, tile.n))) if tile.descriptors else None
        tiles_n = cdiv(width, tile.n)
        parts = gates.new_empty(tiles_n, num_rows)
        grid = num_programs(most_tiles(num_rows, num_groups, tile.m) * tiles_n, pre)
        _experts_down_bwd_kernel[(grid,)](
            grad_out,
            token_indices,
            gates,
            *(descriptors or (down,)),
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
            PRECISION=input_precision(pre.dtype),
            GROUPS=next_power_of_2(num_groups),
            DESCRIPTORS=descriptors is not None,
            SPLIT=tile.n >= 64,
            **tile.options,
        )
        return parts

    sizes = (num_rows, num_groups, width, depth)
    parts = launch(tile or best_product_tile("down_backward", launch, sizes, pre.dtype, activation))
    groups = next_power_of_2(num_groups)
    block_c = min(next_power_of_2(depth), COLUMNS)
    block_p = next_power_of_2(parts.shape[0])
    block_r = max(ELEMENTS_BACKWARD // block_p, 4)
    if down_bias is not None:
        block_r = rows_of_tile(ELEMENTS_BACKWARD, block_c, groups)
    _experts_gates_bwd_kernel[(cdiv(num_rows, block_r),)](
        parts,
        group_offsets,
        grad_out,
        token_indices,
        down_bias,
        grad_gates,
        num_groups,
        num_rows,
        num_parts=parts.shape[0],
        hidden_size=depth,
        GROUPS=groups,
        BLOCK_P=block_p,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
    )
    return grad_pre, weighted, grad_gates


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
    grad_pre, weighted, grad_gates = down_backward(
        grad, token_indices, gates, offsets, down, down_bias, pre, activation
    )
    grad_x = None
    if needs_x:
        grad_x = unpermute_fwd(multiply_rows(grad_pre, up, offsets), None, routing.token_offsets, routing.token_rows)
    if not needs_weights:
        return grad_x, grad_gates, None, None, None, None
    kinds = {"token_indices": token_indices, "dtype": weight_dtype}
    grad_up = weight_grad(grad_pre, x, offsets, gather="b", **kinds)
    grad_down = weight_grad(grad, weighted, offsets, gather="a", **kinds)
    if bias_dtype is None:
        return grad_x, grad_gates, grad_up, grad_down, None, None
    grad_up_bias = sum_rows(grad_pre, offsets, dtype=bias_dtype)
    grad_down_bias = sum_rows(grad, offsets, token_indices=token_indices, gates=gates, dtype=bias_dtype)
    return grad_x, grad_gates, grad_up, grad_down, grad_up_bias, grad_down_bias
