"""`experts` in Triton, forward: up-projection with gather and activation, down-projection.

T tokens, R rows, E experts, D hidden size, I intermediate size, U = 2I for "swiglu" (gate columns, then up) and I
for the others. Kept for the backward: x, the pre-activation (R, U) and the routing; activations are computed again.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from diffmoe_kernels.ops.grouped_gemm._triton import find_tile, group_tiles, most_tiles, multiply_rows
from diffmoe_kernels.ops.grouped_gemm.tiles import best_product_tile
from diffmoe_kernels.routing import Routing
from diffmoe_kernels.triton_support import Tile, cdiv, describe, input_precision, next_power_of_2, num_programs


@triton.jit
def passed(h, ACTIVATION: tl.constexpr):
    """The share of h that the activation lets pass, a sigmoid, and the derivative of the sigmoid's argument.

    GELU's 0.5 (1 + tanh(z)) is the sigmoid of 2 z.
    """
    if ACTIVATION == "gelu_tanh":
        scale: tl.constexpr = 2 * 0.7978845608028654  # 2 sqrt(2 / pi)
        argument = scale * h * (1.0 + 0.044715 * h * h)
        slope = scale * (1.0 + 3.0 * 0.044715 * h * h)
    else:
        argument, slope = h, 1.0
    return 1.0 / (1.0 + tl.exp2(argument * -1.4426950408889634)), slope  # tl.exp adds a check for subnormals


@triton.jit
def activated(h, ACTIVATION: tl.constexpr):
    """silu, for "swiglu" of its gate, or GELU."""
    share, _ = passed(h, ACTIVATION)
    return h * share


# x (T, D), token_indices (R,), up (E, U, D) or a descriptor of its tiles, bias (E, U), group_offsets (E,)
# -> pre (R, U), hidden (R, I). bias and pre may be None
@triton.jit(do_not_specialize=["num_rows"])
def _experts_up_fwd_kernel(
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
        if bias is not None:
            bias_at = bias + group * up_width + columns
            gate += tl.load(bias_at, mask=columns < width, other=0.0).to(tl.float32)[None, :]
            if GATED:
                value += tl.load(bias_at + width, mask=columns < width, other=0.0).to(tl.float32)[None, :]
        # The activation sees what is kept, rounded, so that the backward computes the same one again.
        kind = hidden.dtype.element_ty
        gate_kept, value_kept = gate.to(kind), value.to(kind)
        mask = in_rows & in_columns
        rows = rows.to(tl.int64)[:, None]
        if pre is not None:
            tl.store(pre + rows * up_width + columns[None, :], gate_kept, mask=mask)
            if GATED:
                tl.store(pre + rows * up_width + width + columns[None, :], value_kept, mask=mask)
        result = activated(gate_kept.to(tl.float32), ACTIVATION)
        if GATED:
            result *= value_kept.to(tl.float32)
        tl.store(hidden + rows * width + columns[None, :], result.to(kind), mask=mask)


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

    def launch(tile: Tile) -> None:
        descriptors = describe((up, (1, tile.n, tile.k))) if tile.descriptors else None
        grid = num_programs(most_tiles(num_rows, num_groups, tile.m) * cdiv(width, tile.n), x)
        _experts_up_fwd_kernel[(grid,)](
            x,
            token_indices,
            *(descriptors or (up,)),
            bias,
            group_offsets,
            pre if keep_pre else None,
            hidden,
            num_rows,
            num_groups=num_groups,
            width=width,
            depth=depth,
            ACTIVATION=activation,
            PRECISION=input_precision(x.dtype),
            GROUPS=next_power_of_2(num_groups),
            DESCRIPTORS=descriptors is not None,
            **tile.options,
        )

    sizes, options = (num_rows, num_groups, width, depth), (activation, bias is not None, keep_pre)
    launch(tile or best_product_tile("up", launch, sizes, x.dtype, *options, paired=gated))
    return pre, hidden


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
    """(T, D) -> rows (R, D), not written past the last group, and the pre-activation as `up_projection` has it."""
    offsets = routing.group_offsets
    pre, hidden = up_projection(x, routing.token_indices, offsets, up, up_bias, activation, keep_pre=keep_pre)
    return multiply_rows(hidden, down.mT, offsets, bias=down_bias), pre
