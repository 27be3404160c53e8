"""What the attention kernels do to q and k on their way in, and to their gradients on their way out, in Triton.

A head's d channels are held as two tiles of (BLOCK, HALF), the first and the second channels of the pairs that the
rotation turns, so that it needs no partner from elsewhere; q . k is the sum of two products. HALF is d / 2 rounded up
to a power of 2; what lies past d / 2 is 0 and neither read nor written.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from diffmoe_kernels.triton_support import input_precision, next_power_of_2


@dataclass(frozen=True)
class Settings:
    """The options of `rope_attention`, as the kernels take them: "none" for no rotation and no norm."""

    num_heads: int
    rope: str
    num_prefix_tokens: int
    norm: str
    norm_eps: float
    scale: float

    def constants(self, qkv: Tensor, norms: tuple[Tensor | None, ...]) -> dict[str, object]:
        """What a kernel is compiled for. norms: q_weight, q_bias, k_weight, k_bias."""
        head_dim = qkv.shape[3]
        return {
            "NUM_HEADS": self.num_heads,
            "NUM_KV_HEADS": (qkv.shape[2] - self.num_heads) // 2,
            "D": head_dim,
            "HALF": max(next_power_of_2(-(-head_dim // 2)), 16),  # a product's depth is 16 at least
            "ROPE": self.rope,
            "NORM": self.norm,
            "HAS_WEIGHT": norms[0] is not None,
            "HAS_BIAS": norms[1] is not None,
            "PRECISION": input_precision(qkv.dtype),
        }


@triton.jit
def channels(ROPE: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """(HALF,) first and second channel of each pair, and which pairs there are."""
    pair = tl.arange(0, HALF)
    if ROPE == "2d_interleaved":
        first, second = 2 * pair, 2 * pair + 1
    elif ROPE == "2d":
        first = pair // (D // 4) * (D // 2) + pair % (D // 4)
        second = first + D // 4
    else:
        first, second = pair, pair + D // 2
    return first, second, pair < D // 2


@triton.jit
def load_pairs(head, rows, in_rows, stride, ROPE: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """Rows of a head as two (BLOCK, HALF) float32 tiles."""
    at = head + rows.to(tl.int64)[:, None] * stride
    if ROPE == "2d_interleaved":  # one wide load, and pairs that lie side by side in a thread
        column = tl.arange(0, 2 * HALF)
        tile = tl.load(at + column[None, :], mask=in_rows[:, None] & (column < D)[None, :], other=0.0)
        first, second = tl.split(tl.reshape(tile, (tile.shape[0], HALF, 2)))
    else:
        one, two, exists = channels(ROPE, D, HALF)
        mask = in_rows[:, None] & exists[None, :]
        first = tl.load(at + one[None, :], mask=mask, other=0.0)
        second = tl.load(at + two[None, :], mask=mask, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def store_pairs(head, rows, in_rows, stride, first, second, ROPE: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """The way back of `load_pairs`."""
    at = head + rows.to(tl.int64)[:, None] * stride
    kind = head.dtype.element_ty
    if ROPE == "2d_interleaved":
        column = tl.arange(0, 2 * HALF)
        tile = tl.reshape(tl.join(first, second), (first.shape[0], 2 * HALF)).to(kind)
        tl.store(at + column[None, :], tile, mask=in_rows[:, None] & (column < D)[None, :])
    else:
        one, two, exists = channels(ROPE, D, HALF)
        mask = in_rows[:, None] & exists[None, :]
        tl.store(at + one[None, :], first.to(kind), mask=mask)
        tl.store(at + two[None, :], second.to(kind), mask=mask)


@triton.jit
def load_vector(vector, ROPE: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """(D,) -> (1, HALF) twice, float32."""
    one, two, exists = channels(ROPE, D, HALF)
    first = tl.load(vector + one, mask=exists, other=0.0).to(tl.float32)
    second = tl.load(vector + two, mask=exists, other=0.0).to(tl.float32)
    return first[None, :], second[None, :]


@triton.jit
def _mean(first, second, D: tl.constexpr):
    """(BLOCK, 1) mean over the channels."""
    return ((tl.sum(first, 1) + tl.sum(second, 1)) / D)[:, None]


@triton.jit
def standardize(
    first, second, in_rows, eps, NORM: tl.constexpr, ROPE: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr
):
    """The norm before scale and shift, and its reciprocal (BLOCK, 1), finite where there is no row."""
    if NORM == "layernorm":
        mean = _mean(first, second, D)
        _, _, exists = channels(ROPE, D, HALF)
        first = tl.where(exists[None, :], first - mean, 0.0)
        second = tl.where(exists[None, :], second - mean, 0.0)
    variance = _mean(first * first, second * second, D)
    inverse = 1.0 / tl.sqrt(tl.where(in_rows[:, None], variance + eps, 1.0))
    return first * inverse, second * inverse, inverse


@triton.jit
def load_angles(cos, sin, rows, num_tokens, num_prefix, D: tl.constexpr, HALF: tl.constexpr):
    """(BLOCK, HALF) cosines and sines of the rows; a prefix token does not turn."""
    pair = tl.arange(0, HALF)
    turned = (rows >= num_prefix) & (rows < num_tokens)
    at = (rows - num_prefix).to(tl.int64)[:, None] * (D // 2) + pair[None, :]
    mask = turned[:, None] & (pair < D // 2)[None, :]
    cosine = tl.load(cos + at, mask=mask, other=1.0).to(tl.float32)
    sine = tl.load(sin + at, mask=mask, other=0.0).to(tl.float32)
    return cosine, sine


@triton.jit
def load_prepared(
    head,
    rows,
    num_tokens,
    stride,
    cos,
    sin,
    num_prefix,
    weight,
    bias,
    eps,
    ROPE: tl.constexpr,
    NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
):
    """Rows of q or k, normalised and rotated, as two (BLOCK, HALF) float32 tiles."""
    first, second = load_pairs(head, rows, rows < num_tokens, stride, ROPE, D, HALF)
    if NORM != "none":
        first, second, _ = standardize(first, second, rows < num_tokens, eps, NORM, ROPE, D, HALF)
        if HAS_WEIGHT:
            one, two = load_vector(weight, ROPE, D, HALF)
            first, second = first * one, second * two
        if HAS_BIAS:
            one, two = load_vector(bias, ROPE, D, HALF)
            first, second = first + one, second + two
    if ROPE != "none":
        cosine, sine = load_angles(cos, sin, rows, num_tokens, num_prefix, D, HALF)
        first, second = first * cosine - second * sine, second * cosine + first * sine
    return first, second


@triton.jit
def store_prepared_backward(
    head,
    grad_head,
    grad_weight,
    grad_bias,
    first,
    second,
    rows,
    num_tokens,
    stride,
    cos,
    sin,
    num_prefix,
    weight,
    eps,
    ROPE: tl.constexpr,
    NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
):
    """From the gradient by prepared rows, two (BLOCK, HALF) tiles: stores that by the rows as they came, and these
    rows' part of that by the norm's scale and shift."""
    if ROPE != "none":
        cosine, sine = load_angles(cos, sin, rows, num_tokens, num_prefix, D, HALF)
        first, second = first * cosine + second * sine, second * cosine - first * sine
    in_rows = rows < num_tokens
    if NORM != "none":
        one, two, exists = channels(ROPE, D, HALF)
        if HAS_BIAS:
            tl.store(grad_bias + one, tl.sum(tl.where(in_rows[:, None], first, 0.0), 0), mask=exists)
            tl.store(grad_bias + two, tl.sum(tl.where(in_rows[:, None], second, 0.0), 0), mask=exists)
        raw_first, raw_second = load_pairs(head, rows, in_rows, stride, ROPE, D, HALF)
        unit_first, unit_second, inverse = standardize(raw_first, raw_second, in_rows, eps, NORM, ROPE, D, HALF)
        if HAS_WEIGHT:
            by_first = tl.where(in_rows[:, None], first * unit_first, 0.0)
            by_second = tl.where(in_rows[:, None], second * unit_second, 0.0)
            tl.store(grad_weight + one, tl.sum(by_first, 0), mask=exists)
            tl.store(grad_weight + two, tl.sum(by_second, 0), mask=exists)
            scale_first, scale_second = load_vector(weight, ROPE, D, HALF)
            first, second = first * scale_first, second * scale_second
        along = _mean(first * unit_first, second * unit_second, D)
        if NORM == "layernorm":
            mean = _mean(first, second, D)
            first, second = first - mean, second - mean
        first = (first - unit_first * along) * inverse
        second = (second - unit_second * along) * inverse
    store_pairs(grad_head, rows, in_rows, stride, first, second, ROPE, D, HALF)
