"""What the attention kernels do to q and k on their way in, and to their gradients on their way out, in Triton.

Rows of a head are a tuple of one tile, (BLOCK, 2 HALF), or of two, the other (BLOCK, 2 TAIL), where that wastes less
padding: 72 channels are 64 and 8. Values and outputs keep memory's order. q and k hold each rotated pair in adjacent
columns, so that the rotation needs no data from other threads; their product does not depend on the columns' order.
HALF and TAIL count pairs, rounded up to powers of 2; what lies past d is 0 and neither read nor written.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from diffmoe_kernels.ops.rope_attention.tiles import pairs_of_tiles
from diffmoe_kernels.triton_support import input_precision


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
        half, tail = pairs_of_tiles(head_dim, self.norm)
        return {
            "NUM_HEADS": self.num_heads,
            "NUM_KV_HEADS": (qkv.shape[2] - self.num_heads) // 2,
            "NUM_PREFIX": self.num_prefix_tokens,
            "D": head_dim,
            "HALF": half,
            "TAIL": tail,
            "ROPE": self.rope,
            "NORM": self.norm,
            "HAS_WEIGHT": norms[0] is not None,
            "HAS_BIAS": norms[1] is not None,
            "PRECISION": input_precision(qkv.dtype),
        }


@triton.jit
def _channels(ROPE: tl.constexpr, D: tl.constexpr, FROM: tl.constexpr, HALF: tl.constexpr):
    """(HALF,) first and second channel of each pair from FROM on, and which pairs there are."""
    pair = FROM + tl.arange(0, HALF)
    if ROPE == "2d_interleaved" or ROPE == "none":
        first, second = 2 * pair, 2 * pair + 1
    elif ROPE == "2d":
        first = pair // (D // 4) * (D // 2) + pair % (D // 4)
        second = first + D // 4
    else:
        first, second = pair, pair + D // 2
    return first, second, pair < D // 2


@triton.jit
def _mask(rows, num_rows, exists, WHOLE: tl.constexpr):
    """(BLOCK, columns) which numbers exist; WHOLE: every row does, so that none is compared."""
    if WHOLE:
        mask = tl.broadcast_to(exists[None, :], (rows.shape[0], exists.shape[0]))
    else:
        mask = (rows < num_rows)[:, None] & exists[None, :]
    return mask


@triton.jit
def _load_columns(
    head, rows, num_rows, stride, D: tl.constexpr, FROM: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr
):
    column = FROM + tl.arange(0, COLUMNS)
    mask = _mask(rows, num_rows, column < D, WHOLE)
    return tl.load(head + rows.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def load_head(
    head, rows, num_rows, stride, D: tl.constexpr, HALF: tl.constexpr, TAIL: tl.constexpr, WHOLE: tl.constexpr
):
    """Rows of a head as they are."""
    tiles = (_load_columns(head, rows, num_rows, stride, D, 0, 2 * HALF, WHOLE),)
    if TAIL > 0:
        tiles = tiles + (_load_columns(head, rows, num_rows, stride, D, 2 * HALF, 2 * TAIL, WHOLE),)
    return tiles


@triton.jit
def _store_columns(head, rows, num_rows, stride, tile, D: tl.constexpr, FROM: tl.constexpr, WHOLE: tl.constexpr):
    column = FROM + tl.arange(0, tile.shape[1])
    at = head + rows.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(at, tile.to(head.dtype.element_ty), mask=_mask(rows, num_rows, column < D, WHOLE))


@triton.jit
def store_head(
    head, rows, num_rows, stride, tiles, D: tl.constexpr, HALF: tl.constexpr, TAIL: tl.constexpr, WHOLE: tl.constexpr
):
    """The way back of `load_head`."""
    _store_columns(head, rows, num_rows, stride, tiles[0], D, 0, WHOLE)
    if TAIL > 0:
        _store_columns(head, rows, num_rows, stride, tiles[1], D, 2 * HALF, WHOLE)


@triton.jit
def zeros_like_head(BLOCK: tl.constexpr, HALF: tl.constexpr, TAIL: tl.constexpr):
    """Sums for the rows of a head, in float32."""
    tiles = (tl.zeros((BLOCK, 2 * HALF), tl.float32),)
    if TAIL > 0:
        tiles = tiles + (tl.zeros((BLOCK, 2 * TAIL), tl.float32),)
    return tiles


@triton.jit
def scale_head(tiles, scale, TAIL: tl.constexpr):
    """Each row by its own number, or all by one."""
    scaled = (tiles[0] * scale,)
    if TAIL > 0:
        scaled = scaled + (tiles[1] * scale,)
    return scaled


@triton.jit
def row_products(one, two, TAIL: tl.constexpr):
    """(BLOCK,) <one, two> of each row, in float32."""
    total = tl.sum(one[0].to(tl.float32) * two[0].to(tl.float32), 1)
    if TAIL > 0:
        total += tl.sum(one[1].to(tl.float32) * two[1].to(tl.float32), 1)
    return total


@triton.jit
def multiply_heads(left, right, PRECISION: tl.constexpr, TAIL: tl.constexpr):
    """Rows (M, d) and rows (N, d) -> their products (M, N)."""
    products = tl.dot(left[0], tl.trans(right[0]), input_precision=PRECISION)
    if TAIL > 0:
        products = tl.dot(left[1], tl.trans(right[1]), products, input_precision=PRECISION)
    return products


@triton.jit
def add_weighted(total, weights, rows, PRECISION: tl.constexpr, TAIL: tl.constexpr):
    """total (M, d) and weights (M, N) @ rows (N, d)."""
    added = (tl.dot(weights, rows[0], total[0], input_precision=PRECISION),)
    if TAIL > 0:
        added = added + (tl.dot(weights, rows[1], total[1], input_precision=PRECISION),)
    return added


@triton.jit
def _load_pairs(
    head, rows, num_rows, stride, ROPE: tl.constexpr, D: tl.constexpr, FROM: tl.constexpr, HALF: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Rows of a head as two (BLOCK, HALF) float32 tiles, the pairs' first and second channels."""
    if ROPE == "2d_interleaved" or ROPE == "none":  # one wide load, and pairs that lie side by side in a thread
        first, second = _split(_load_columns(head, rows, num_rows, stride, D, 2 * FROM, 2 * HALF, WHOLE))
    else:
        one, two, exists = _channels(ROPE, D, FROM, HALF)
        mask = _mask(rows, num_rows, exists, WHOLE)
        at = head + rows.to(tl.int64)[:, None] * stride
        first = tl.load(at + one[None, :], mask=mask, other=0.0)
        second = tl.load(at + two[None, :], mask=mask, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store_pairs(
    head, rows, num_rows, stride, first, second, ROPE: tl.constexpr, D: tl.constexpr, FROM: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """The way back of `_load_pairs`."""
    if ROPE == "2d_interleaved" or ROPE == "none":
        _store_columns(head, rows, num_rows, stride, _join(first, second), D, 2 * FROM, WHOLE)
    else:
        one, two, exists = _channels(ROPE, D, FROM, first.shape[1])
        mask = _mask(rows, num_rows, exists, WHOLE)
        at = head + rows.to(tl.int64)[:, None] * stride
        kind = head.dtype.element_ty
        tl.store(at + one[None, :], first.to(kind), mask=mask)
        tl.store(at + two[None, :], second.to(kind), mask=mask)


@triton.jit
def _join(first, second):
    """(BLOCK, HALF) twice -> (BLOCK, 2 HALF), the two channels of a pair side by side."""
    return tl.reshape(tl.join(first, second), (first.shape[0], 2 * first.shape[1]))


@triton.jit
def _split(both):
    """The way back of `_join`."""
    return tl.split(tl.reshape(both, (both.shape[0], both.shape[1] // 2, 2)))


@triton.jit
def _load_vector(vector, ROPE: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """(D,) -> (1, HALF) twice, float32."""
    one, two, exists = _channels(ROPE, D, 0, HALF)
    first = tl.load(vector + one, mask=exists, other=0.0).to(tl.float32)
    second = tl.load(vector + two, mask=exists, other=0.0).to(tl.float32)
    return first[None, :], second[None, :]


@triton.jit
def _mean(values, D: tl.constexpr):
    """(BLOCK, HALF), the sum over a pair -> (BLOCK, 1) mean over the channels."""
    return (tl.sum(values, 1) / D)[:, None]


@triton.jit
def _standardize(
    first, second, rows, num_rows, eps, NORM: tl.constexpr, ROPE: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """The norm before scale and shift, and its reciprocal (BLOCK, 1), finite where there is no row."""
    if NORM == "layernorm":
        mean = _mean(first + second, D)
        _, _, exists = _channels(ROPE, D, 0, HALF)
        first = tl.where(exists[None, :], first - mean, 0.0)
        second = tl.where(exists[None, :], second - mean, 0.0)
    variance = _mean(first * first + second * second, D) + eps
    if not WHOLE:
        variance = tl.where((rows < num_rows)[:, None], variance, 1.0)
    inverse = tl.rsqrt(variance)
    return first * inverse, second * inverse, inverse


@triton.jit
def _load_angles(
    cos, sin, rows, num_rows, D: tl.constexpr, FROM: tl.constexpr, HALF: tl.constexpr, NUM_PREFIX: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """(BLOCK, HALF) cosines and sines of the rows; a prefix token does not turn."""
    pair = FROM + tl.arange(0, HALF)
    at = (rows - NUM_PREFIX).to(tl.int64)[:, None] * (D // 2) + pair[None, :]
    mask = _mask(rows, num_rows, pair < D // 2, WHOLE)
    if NUM_PREFIX > 0:
        mask = mask & (rows >= NUM_PREFIX)[:, None]
        cosine = tl.load(cos + at, mask=mask, other=1.0)
    else:
        cosine = tl.load(cos + at, mask=mask, other=0.0)
    sine = tl.load(sin + at, mask=mask, other=0.0)
    return cosine.to(tl.float32), sine.to(tl.float32)


@triton.jit
def _load_prepared_pairs(
    head, rows, num_rows, stride, cos, sin, weight, bias, eps, scale, ROPE: tl.constexpr, NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, D: tl.constexpr, FROM: tl.constexpr, HALF: tl.constexpr,
    NUM_PREFIX: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    first, second = _load_pairs(head, rows, num_rows, stride, ROPE, D, FROM, HALF, WHOLE)
    if NORM != "none":
        first, second, _ = _standardize(first, second, rows, num_rows, eps, NORM, ROPE, D, HALF, WHOLE)
        if HAS_WEIGHT:
            one, two = _load_vector(weight, ROPE, D, HALF)
            first, second = first * one, second * two
        if HAS_BIAS:
            one, two = _load_vector(bias, ROPE, D, HALF)
            first, second = first + one, second + two
    if ROPE != "none":
        cosine, sine = _load_angles(cos, sin, rows, num_rows, D, FROM, HALF, NUM_PREFIX, WHOLE)
        first, second = first * cosine - second * sine, second * cosine + first * sine
    return (_join(first, second) * scale).to(head.dtype.element_ty)


@triton.jit
def load_prepared(
    head, rows, num_rows, stride, cos, sin, weight, bias, eps, scale, ROPE: tl.constexpr, NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, TAIL: tl.constexpr,
    NUM_PREFIX: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Rows of q or k, normalised, rotated and scaled."""
    tiles = (
        _load_prepared_pairs(
            head, rows, num_rows, stride, cos, sin, weight, bias, eps, scale,
            ROPE, NORM, HAS_WEIGHT, HAS_BIAS, D, 0, HALF, NUM_PREFIX, WHOLE,
        ),
    )  # fmt: skip
    if TAIL > 0:
        tail = _load_prepared_pairs(
            head, rows, num_rows, stride, cos, sin, weight, bias, eps, scale,
            ROPE, NORM, HAS_WEIGHT, HAS_BIAS, D, HALF, TAIL, NUM_PREFIX, WHOLE,
        )  # fmt: skip
        tiles = tiles + (tail,)
    return tiles


@triton.jit
def keep_prepared(
    head, num_rows, stride, cos, sin, weight, bias, eps, scale, ROPE: tl.constexpr, NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, TAIL: tl.constexpr,
    NUM_PREFIX: tl.constexpr, WHOLE: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first KEPT blocks of `load_prepared`. Products alone use them: so they lie in shared memory."""
    kept = ()
    for i in tl.static_range(KEPT):
        tiles = load_prepared(
            head + i * BLOCK * stride, tl.arange(0, BLOCK), num_rows - i * BLOCK, stride, cos, sin, weight, bias, eps,
            scale, ROPE, NORM, HAS_WEIGHT, HAS_BIAS, D, HALF, TAIL, NUM_PREFIX - i * BLOCK, WHOLE or i < KEPT - 1,
        )  # fmt: skip
        kept = kept + (tiles,)
    return kept


@triton.jit
def keep_head(
    head, num_rows, stride, D: tl.constexpr, HALF: tl.constexpr, TAIL: tl.constexpr, WHOLE: tl.constexpr,
    KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same of `load_head`."""
    kept = ()
    for i in tl.static_range(KEPT):
        at, left = head + i * BLOCK * stride, num_rows - i * BLOCK
        tiles = load_head(at, tl.arange(0, BLOCK), left, stride, D, HALF, TAIL, WHOLE or i < KEPT - 1)
        kept = kept + (tiles,)
    return kept


@triton.jit
def _store_pairs_backward(
    head, grad_head, grad_weight, grad_bias, tile, rows, num_rows, stride, cos, sin, weight, eps,
    ROPE: tl.constexpr, NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, D: tl.constexpr,
    FROM: tl.constexpr, HALF: tl.constexpr, NUM_PREFIX: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    first, second = _split(tile)
    if ROPE != "none":
        cosine, sine = _load_angles(cos, sin, rows, num_rows, D, FROM, HALF, NUM_PREFIX, WHOLE)
        first, second = first * cosine + second * sine, second * cosine - first * sine
    if NORM != "none":
        one, two, exists = _channels(ROPE, D, 0, HALF)
        if not WHOLE:
            in_rows = (rows < num_rows)[:, None]
            first, second = tl.where(in_rows, first, 0.0), tl.where(in_rows, second, 0.0)
        if HAS_BIAS:
            tl.store(grad_bias + one, tl.sum(first, 0), mask=exists)
            tl.store(grad_bias + two, tl.sum(second, 0), mask=exists)
        unit_first, unit_second = _load_pairs(head, rows, num_rows, stride, ROPE, D, 0, HALF, WHOLE)
        unit_first, unit_second, inverse = _standardize(
            unit_first, unit_second, rows, num_rows, eps, NORM, ROPE, D, HALF, WHOLE
        )
        if HAS_WEIGHT:
            tl.store(grad_weight + one, tl.sum(first * unit_first, 0), mask=exists)
            tl.store(grad_weight + two, tl.sum(second * unit_second, 0), mask=exists)
            scale_first, scale_second = _load_vector(weight, ROPE, D, HALF)
            first, second = first * scale_first, second * scale_second
        along = _mean(first * unit_first + second * unit_second, D)
        if NORM == "layernorm":
            mean = _mean(first + second, D)
            first, second = first - mean, second - mean
        first = (first - unit_first * along) * inverse
        second = (second - unit_second * along) * inverse
    _store_pairs(grad_head, rows, num_rows, stride, first, second, ROPE, D, FROM, WHOLE)


@triton.jit
def store_prepared_backward(
    head, grad_head, grad_weight, grad_bias, tiles, rows, num_rows, stride, cos, sin, weight, eps,
    ROPE: tl.constexpr, NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr, TAIL: tl.constexpr, NUM_PREFIX: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """From the gradient by what `load_prepared` gave: stores that by the rows as they came, and these rows' part of
    that by the norm's scale and shift."""
    _store_pairs_backward(
        head, grad_head, grad_weight, grad_bias, tiles[0], rows, num_rows, stride, cos, sin, weight, eps,
        ROPE, NORM, HAS_WEIGHT, HAS_BIAS, D, 0, HALF, NUM_PREFIX, WHOLE,
    )  # fmt: skip
    if TAIL > 0:
        _store_pairs_backward(
            head, grad_head, grad_weight, grad_bias, tiles[1], rows, num_rows, stride, cos, sin, weight, eps,
            ROPE, NORM, HAS_WEIGHT, HAS_BIAS, D, HALF, TAIL, NUM_PREFIX, WHOLE,
        )  # fmt: skip
