"""The capacity predictor's loss and its threshold in Triton, straight from the routing, with no mask of who was chosen.

Sums are of each program first, then of those in a fixed order. T tokens, E experts, R rows. Shapes of a kernel's
pointers stand above it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmoe_kernels.ops.token_drop._select import select, sigmoid, tile_of
from diffmoe_kernels.ops.token_drop._triton import bounds
from diffmoe_kernels.triton_order import number_of
from diffmoe_kernels.triton_support import cdiv, next_power_of_2

SUM_BLOCK = 1024


# group_offsets (E,), token_offsets (T + 1,), token_rows (R,) -> (BLOCK_T, BLOCK_E) how often the expert has the token
@triton.jit
def _targets(
    group_offsets,
    token_offsets,
    token_rows,
    tokens,
    experts,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    begin, stop, start, end = bounds(group_offsets, token_offsets, tokens, experts, num_tokens, NUM_EXPERTS)
    target = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for slot in range(0, tl.max(stop - begin, 0)):
        has_row = begin + slot < stop
        row = tl.load(token_rows + begin + slot, mask=has_row, other=-1)[:, None]
        target += ((row >= start[None, :]) & (row < end[None, :])).to(tl.float32)
    return target


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)); log1p(y) as 2 artanh(y / (2 + y)), a series good to 1e-8."""
    small = tl.exp(-tl.abs(x))
    ratio = small / (2.0 + small)  # at most 1/3
    square = ratio * ratio
    series = 1 / 15 * square + 1 / 13
    series = series * square + 1 / 11
    series = series * square + 1 / 9
    series = series * square + 1 / 7
    series = series * square + 1 / 5
    series = series * square + 1 / 3
    return tl.maximum(x, 0.0) + 2.0 * ratio * (series * square + 1.0)


# logits (T, E), group_offsets (E,), token_offsets (T + 1,), token_rows (R,) -> partial (programs,)
@triton.jit
def _capacity_loss_fwd_kernel(
    logits,
    group_offsets,
    token_offsets,
    token_rows,
    partial,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    target = _targets(
        group_offsets, token_offsets, token_rows, tokens, experts, num_tokens, NUM_EXPERTS, BLOCK_T, BLOCK_E
    )
    at = tokens[:, None] * NUM_EXPERTS + experts[None, :]
    mask = (tokens < num_tokens)[:, None] & (experts < NUM_EXPERTS)[None, :]
    logit = tl.load(logits + at, mask=mask, other=0.0).to(tl.float32)
    # Not target * logit: 0 times an infinity is no number.
    loss = _softplus(logit) - tl.where(target > 0, target * logit, 0.0)
    tl.store(partial + tl.program_id(0), tl.sum(tl.where(mask, loss, 0.0)))


# partial (N,) -> mean ()
@triton.jit
def _capacity_loss_mean_kernel(partial, mean, num_partials, num_elements, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, num_partials, BLOCK):
        index = first + tl.arange(0, BLOCK)
        total += tl.load(partial + index, mask=index < num_partials, other=0.0)
    tl.store(mean, tl.sum(total) / num_elements)


# grad (), logits (T, E), group_offsets (E,), token_offsets (T + 1,), token_rows (R,) -> grad_logits (T, E)
@triton.jit
def _capacity_loss_bwd_kernel(
    grad,
    logits,
    group_offsets,
    token_offsets,
    token_rows,
    grad_logits,
    num_tokens,
    num_elements,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    target = _targets(
        group_offsets, token_offsets, token_rows, tokens, experts, num_tokens, NUM_EXPERTS, BLOCK_T, BLOCK_E
    )
    at = tokens[:, None] * NUM_EXPERTS + experts[None, :]
    mask = (tokens < num_tokens)[:, None] & (experts < NUM_EXPERTS)[None, :]
    slope = sigmoid(tl.load(logits + at, mask=mask, other=0.0)) - target
    grad_here = slope * (tl.load(grad) / num_elements)
    tl.store(grad_logits + at, grad_here.to(grad_logits.dtype.element_ty), mask=mask)


# cut (E,) -> quantile (E,)
@triton.jit
def _capacity_quantile_kernel(cut, quantile, num_experts, BLOCK_E: tl.constexpr):
    experts = tl.arange(0, BLOCK_E)
    in_experts = experts < num_experts
    logit = number_of(tl.load(cut + experts, mask=in_experts, other=0))
    tl.store(quantile + experts, sigmoid(logit), mask=in_experts)


def capacity_loss_fwd(logits: Tensor, group_offsets: Tensor, token_offsets: Tensor, token_rows: Tensor) -> Tensor:
    """() float32, mean over (T, E) logits of the binary cross-entropy against who was chosen."""
    num_tokens, num_experts = logits.shape
    mean = logits.new_empty((), dtype=torch.float32)
    if logits.numel() == 0:
        return mean.zero_()
    tile = tile_of(num_experts, num_tokens)
    partial = logits.new_empty(cdiv(num_tokens, tile[0]), dtype=torch.float32)
    _capacity_loss_fwd_kernel[(partial.shape[0],)](
        logits, group_offsets, token_offsets, token_rows, partial, num_tokens, num_experts, *tile
    )
    _capacity_loss_mean_kernel[(1,)](partial, mean, partial.shape[0], logits.numel(), SUM_BLOCK)
    return mean


def capacity_loss_bwd(
    grad: Tensor, logits: Tensor, group_offsets: Tensor, token_offsets: Tensor, token_rows: Tensor
) -> Tensor:
    """() gradient of `capacity_loss_fwd` -> (T, E) of its logits."""
    num_tokens, num_experts = logits.shape
    grad_logits = torch.empty_like(logits)
    if logits.numel() == 0:
        return grad_logits
    tile = tile_of(num_experts, num_tokens)
    _capacity_loss_bwd_kernel[(cdiv(num_tokens, tile[0]),)](
        grad,
        logits,
        group_offsets,
        token_offsets,
        token_rows,
        grad_logits,
        num_tokens,
        logits.numel(),
        num_experts,
        *tile,
    )
    return grad_logits


def capacity_quantile_fwd(logits: Tensor, capacity: int) -> Tensor:
    """(T, E) -> (E,) float32, the capacity-th largest sigmoid of each expert; 1 where it is 0."""
    num_experts = logits.shape[1]
    if capacity == 0:
        return logits.new_ones(num_experts, dtype=torch.float32)
    quantile = logits.new_empty(num_experts, dtype=torch.float32)
    _capacity_quantile_kernel[(1,)](select(logits, capacity).cut, quantile, num_experts, next_power_of_2(num_experts))
    return quantile
