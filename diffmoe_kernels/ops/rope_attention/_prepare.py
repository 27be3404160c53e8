"""What the attention kernels do to q and k on their way in, and to their gradients on their way out, in Triton.

Rows of a head are a tuple of one tile, (BLOCK, 2 half), or of two, the other (BLOCK, 2 tail), where that wastes less
padding: 72 channels are 64 and 8. Values and outputs keep memory's order. q and k hold each rotated pair in adjacent
columns, so that the rotation needs no data from other threads; their product does not depend on the columns' order.
half and tail count pairs, rounded up to powers of 2; what lies past d is 0 and neither read nor written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from diffmoe_kernels.ops.rope_attention.tiles import pairs_of_tiles
from diffmoe_kernels.triton_support import input_precision


class Norm(NamedTuple):
    """Of q or k: scale and shift (d,), each or None, and what is added to the variance. Or parts of their gradients."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float | None = None

    @property
    def vectors(self) -> tuple[Tensor | None, Tensor | None]:
        return self.weight, self.bias


class Table(NamedTuple):
    """cos and sin (N - prefix, d / 2), None where nothing is rotated."""

    cos: Tensor | None
    sin: Tensor | None


class Layout(NamedTuple):
    """How heads of d channels lie in tiles, and what is done to q and k: a kernel is compiled for it.

    half, tail: pairs of channels in a head's tiles; rope, norm: as `Settings` has them.
    """

    d: int
    half: int
    tail: int
    rope: str
    norm: str


@dataclass(frozen=True)
class Settings:
    """The options of `rope_attention`, as the kernels take them: "none" for no rotation and no norm."""

    num_heads: int
    rope: str
    num_prefix_tokens: int
    norm: str
    scale: float

    def constants(self, qkv: Tensor) -> dict[str, object]:
        """What a kernel is compiled for."""
        head_dim = qkv.shape[3]
        return {
            "NUM_HEADS": self.num_heads,
            "NUM_KV_HEADS": (qkv.shape[2] - self.num_heads) // 2,
            "NUM_PREFIX": self.num_prefix_tokens,
            "LAYOUT": Layout(head_dim, *pairs_of_tiles(head_dim, self.norm), self.rope, self.norm),
            "PRECISION": input_precision(qkv.dtype),
        }


@triton.jit
def _channels(FROM: tl.constexpr, PAIRS: tl.constexpr, LAYOUT: tl.constexpr):
    """(PAIRS,) first and second channel of each pair from FROM on, and which pairs there are."""
    pair = FROM + tl.arange(0, PAIRS)
    if LAYOUT.rope == "2d_interleaved" or LAYOUT.rope == "none":
        first, second = 2 * pair, 2 * pair + 1
    elif LAYOUT.rope == "2d":
        first = pair // (LAYOUT.d // 4) * (LAYOUT.d // 2) + pair % (LAYOUT.d // 4)
        second = first + LAYOUT.d // 4
    else:
        first, second = pair, pair + LAYOUT.d // 2
    return first, second, pair < LAYOUT.d // 2


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
    head, rows, num_rows, stride, FROM: tl.constexpr, COLUMNS: tl.constexpr, LAYOUT: tl.constexpr, WHOLE: tl.constexpr
):
    column = FROM + tl.arange(0, COLUMNS)
    mask = _mask(rows, num_rows, column < LAYOUT.d, WHOLE)
    return tl.load(head + rows.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def load_head(head, rows, num_rows, stride, LAYOUT: tl.constexpr, WHOLE: tl.constexpr):
    """Rows of a head as they are."""
    tiles = (_load_columns(head, rows, num_rows, stride, 0, 2 * LAYOUT.half, LAYOUT, WHOLE),)
    if LAYOUT.tail > 0:
        tail = _load_columns(head, rows, num_rows, stride, 2 * LAYOUT.half, 2 * LAYOUT.tail, LAYOUT, WHOLE)
        tiles = tiles + (tail,)
    return tiles


@triton.jit
def _store_columns(head, rows, num_rows, stride, tile, FROM: tl.constexpr, LAYOUT: tl.constexpr, WHOLE: tl.constexpr):
    column = FROM + tl.arange(0, tile.shape[1])
    at = head + rows.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(at, tile.to(head.dtype.element_ty), mask=_mask(rows, num_rows, column < LAYOUT.d, WHOLE))


@triton.jit
def store_head(head, rows, num_rows, stride, tiles, LAYOUT: tl.constexpr, WHOLE: tl.constexpr):
    """The way back of `load_head`."""
    _store_columns(head, rows, num_rows, stride, tiles[0], 0, LAYOUT, WHOLE)
    if len(tiles) > 1:
        _store_columns(head, rows, num_rows, stride, tiles[1], 2 * LAYOUT.half, LAYOUT, WHOLE)


@triton.jit
def zeros_like_head(BLOCK: tl.constexpr, LAYOUT: tl.constexpr):
    """Sums for the rows of a head, in float32."""
    tiles = (tl.zeros((BLOCK, 2 * LAYOUT.half), tl.float32),)
    if LAYOUT.tail > 0:
        tiles = tiles + (tl.zeros((BLOCK, 2 * LAYOUT.tail), tl.float32),)
    return tiles


@triton.jit
def scale_head(tiles, scale):
    """Each row by its own number, or all by one."""
    scaled = (tiles[0] * scale,)
    if len(tiles) > 1:
        scaled = scaled + (tiles[1] * scale,)
    return scaled


@triton.jit
def row_products(one, two):
    """(BLOCK,) <one, two> of each row, in float32."""
    total = tl.sum(one[0].to(tl.float32) * two[0].to(tl.float32), 1)
    if len(one) > 1:
        total += tl.sum(one[1].to(tl.float32) * two[1].to(tl.float32), 1)
    return total


@triton.jit
def multiply_heads(left, right, PRECISION: tl.constexpr):
    """Rows (M, d) and rows (N, d) -> their products (M, N)."""
    products = tl.dot(left[0], tl.trans(right[0]), input_precision=PRECISION)
    if len(left) > 1:
        products = tl.dot(left[1], tl.trans(right[1]), products, input_precision=PRECISION)
    return products


@triton.jit
def add_weighted(total, weights, rows, PRECISION: tl.constexpr):
    """total (M, d) and weights (M, N) @ rows (N, d)."""
    added = (tl.dot(weights, rows[0], total[0], input_precision=PRECISION),)
    if len(rows) > 1:
        added = added + (tl.dot(weights, rows[1], total[1], input_precision=PRECISION),)
    return added


@triton.jit
def _load_pairs(
    head, rows, num_rows, stride, FROM: tl.constexpr, PAIRS: tl.constexpr, LAYOUT: tl.constexpr, WHOLE: tl.constexpr
):
    """Rows of a head as two (BLOCK, PAIRS) float32 tiles, the pairs' first and second channels."""
    if LAYOUT.rope == "2d_interleaved" or LAYOUT.rope == "none":  # one wide load; a pair is in one thread
        first, second = _split(_load_columns(head, rows, num_rows, stride, 2 * FROM, 2 * PAIRS, LAYOUT, WHOLE))
    else:
        one, two, exists = _channels(FROM, PAIRS, LAYOUT)
        mask = _mask(rows, num_rows, exists, WHOLE)
        at = head + rows.to(tl.int64)[:, None] * stride
        first = tl.load(at + one[None, :], mask=mask, other=0.0)
        second = tl.load(at + two[None, :], mask=mask, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store_pairs(
    head, rows, num_rows, stride, first, second, FROM: tl.constexpr, LAYOUT: tl.constexpr, WHOLE: tl.constexpr
):
    """The way back of `_load_pairs`."""
    if LAYOUT.rope == "2d_interleaved" or LAYOUT.rope == "none":
        _store_columns(head, rows, num_rows, stride, _join(first, second), 2 * FROM, LAYOUT, WHOLE)
    else:
        one, two, exists = _channels(FROM, first.shape[1], LAYOUT)
        mask = _mask(rows, num_rows, exists, WHOLE)
        at = head + rows.to(tl.int64)[:, None] * stride
        kind = head.dtype.element_ty
        tl.store(at + one[None, :], first.to(kind), mask=mask)
        tl.store(at + two[None, :], second.to(kind), mask=mask)


@triton.jit
def _join(first, second):
    """(BLOCK, PAIRS) twice -> (BLOCK, 2 PAIRS), the two channels of a pair side by side."""
    return tl.reshape(tl.join(first, second), (first.shape[0], 2 * first.shape[1]))


@triton.jit
def _split(both):
    """The way back of `_join`."""
    return tl.split(tl.reshape(both, (both.shape[0], both.shape[1] // 2, 2)))


@triton.jit
def _load_vector(vector, LAYOUT: tl.constexpr):
    """(d,) -> (1, half) twice, float32."""
    one, two, exists = _channels(0, LAYOUT.half, LAYOUT)
    first = tl.load(vector + one, mask=exists, other=0.0).to(tl.float32)
    second = tl.load(vector + two, mask=exists, other=0.0).to(tl.float32)
    return first[None, :], second[None, :]


@triton.jit
def _mean(values, LAYOUT: tl.constexpr):
    """(BLOCK, half), the sum over a pair -> (BLOCK, 1) mean over the channels."""
    return (tl.sum(values, 1) / LAYOUT.d)[:, None]


@triton.jit
def _standardize(first, second, rows, num_rows, eps, LAYOUT: tl.constexpr, WHOLE: tl.constexpr):
    """The norm before scale and shift, and its reciprocal (BLOCK, 1), finite where there is no row."""
    if LAYOUT.norm == "layernorm":
        mean = _mean(first + second, LAYOUT)
        _, _, exists = _channels(0, LAYOUT.half, LAYOUT)
        first = tl.where(exists[None, :], first - mean, 0.0)
        second = tl.where(exists[None, :], second - mean, 0.0)
    variance = _mean(first * first + second * second, LAYOUT) + eps
    if not WHOLE:
        variance = tl.where((rows < num_rows)[:, None], variance, 1.0)
    inverse = tl.rsqrt(variance)
    return first * inverse, second * inverse, inverse


@triton.jit
def _load_angles(
    table, rows, num_rows, FROM: tl.constexpr, PAIRS: tl.constexpr, LAYOUT: tl.constexpr, NUM_PREFIX: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """(BLOCK, PAIRS) cosines and sines of the rows; a prefix token does not turn."""
    pair = FROM + tl.arange(0, PAIRS)
    at = (rows - NUM_PREFIX).to(tl.int64)[:, None] * (LAYOUT.d // 2) + pair[None, :]
    mask = _mask(rows, num_rows, pair < LAYOUT.d // 2, WHOLE)
    if NUM_PREFIX > 0:
        mask = mask & (rows >= NUM_PREFIX)[:, None]
        cosine = tl.load(table.cos + at, mask=mask, other=1.0)
    else:
        cosine = tl.load(table.cos + at, mask=mask, other=0.0)
    sine = tl.load(table.sin + at, mask=mask, other=0.0)
    return cosine.to(tl.float32), sine.to(tl.float32)


@triton.jit
def _load_prepared_pairs(
    head, rows, num_rows, stride, table, norm, scale, FROM: tl.constexpr, PAIRS: tl.constexpr, LAYOUT: tl.constexpr,
    NUM_PREFIX: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    first, second = _load_pairs(head, rows, num_rows, stride, FROM, PAIRS, LAYOUT, WHOLE)
    if LAYOUT.norm != "none":
        first, second, _ = _standardize(first, second, rows, num_rows, norm.eps, LAYOUT, WHOLE)
        if norm.weight is not None:
            one, two = _load_vector(norm.weight, LAYOUT)
            first, second = first * one, second * two
        if norm.bias is not None:
            one, two = _load_vector(norm.bias, LAYOUT)
            first, second = first + one, second + two
    if LAYOUT.rope != "none":
        cosine, sine = _load_angles(table, rows, num_rows, FROM, PAIRS, LAYOUT, NUM_PREFIX, WHOLE)
        first, second = first * cosine - second * sine, second * cosine + first * sine
    return (_join(first, second) * scale).to(head.dtype.element_ty)


@triton.jit
def load_prepared(
    head, rows, num_rows, stride, table, norm, scale, LAYOUT: tl.constexpr, NUM_PREFIX: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Rows of q or k, normalised, rotated and scaled."""
    tiles = (
        _load_prepared_pairs(
            head, rows, num_rows, stride, table, norm, scale, 0, LAYOUT.half, LAYOUT, NUM_PREFIX, WHOLE
        ),
    )
    if LAYOUT.tail > 0:
        tail = _load_prepared_pairs(
            head, rows, num_rows, stride, table, norm, scale, LAYOUT.half, LAYOUT.tail, LAYOUT, NUM_PREFIX, WHOLE
        )
        tiles = tiles + (tail,)
    return tiles


@triton.jit
def keep_prepared(
    head, num_rows, stride, table, norm, scale, LAYOUT: tl.constexpr, NUM_PREFIX: tl.constexpr, WHOLE: tl.constexpr,
    KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first KEPT blocks of `load_prepared`. Products alone use them: so they lie in shared memory."""
    kept = ()
    for i in tl.static_range(KEPT):
        tiles = load_prepared(
            head + i * BLOCK * stride, tl.arange(0, BLOCK), num_rows - i * BLOCK, stride, table, norm, scale,
            LAYOUT, NUM_PREFIX - i * BLOCK, WHOLE or i < KEPT - 1,
        )  # fmt: skip
        kept = kept + (tiles,)
    return kept


@triton.jit
def keep_head(
    head, num_rows, stride, LAYOUT: tl.constexpr, WHOLE: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr
):
    """The same of `load_head`."""
    kept = ()
    for i in tl.static_range(KEPT):
        at, left = head + i * BLOCK * stride, num_rows - i * BLOCK
        tiles = load_head(at, tl.arange(0, BLOCK), left, stride, LAYOUT, WHOLE or i < KEPT - 1)
        kept = kept + (tiles,)
    return kept


@triton.jit
def _store_pairs_backward(
    head, grad_head, by_norm, part, tile, rows, num_rows, stride, table, norm,
    FROM: tl.constexpr, LAYOUT: tl.constexpr, NUM_PREFIX: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    first, second = _split(tile)
    if LAYOUT.rope != "none":
        cosine, sine = _load_angles(table, rows, num_rows, FROM, first.shape[1], LAYOUT, NUM_PREFIX, WHOLE)
        first, second = first * cosine + second * sine, second * cosine - first * sine
    if LAYOUT.norm != "none":
        one, two, exists = _channels(0, LAYOUT.half, LAYOUT)
        if not WHOLE:
            in_rows = (rows < num_rows)[:, None]
            first, second = tl.where(in_rows, first, 0.0), tl.where(in_rows, second, 0.0)
        if norm.bias is not None:
            tl.store(by_norm.bias + part + one, tl.sum(first, 0), mask=exists)
            tl.store(by_norm.bias + part + two, tl.sum(second, 0), mask=exists)
        unit_first, unit_second = _load_pairs(head, rows, num_rows, stride, 0, LAYOUT.half, LAYOUT, WHOLE)
        unit_first, unit_second, inverse = _standardize(
            unit_first, unit_second, rows, num_rows, norm.eps, LAYOUT, WHOLE
        )
        if norm.weight is not None:
            tl.store(by_norm.weight + part + one, tl.sum(first * unit_first, 0), mask=exists)
            tl.store(by_norm.weight + part + two, tl.sum(second * unit_second, 0), mask=exists)
            scale_first, scale_second = _load_vector(norm.weight, LAYOUT)
            first, second = first * scale_first, second * scale_second
        along = _mean(first * unit_first + second * unit_second, LAYOUT)
        if LAYOUT.norm == "layernorm":
            mean = _mean(first + second, LAYOUT)
            first, second = first - mean, second - mean
        first = (first - unit_first * along) * inverse
        second = (second - unit_second * along) * inverse
    _store_pairs(grad_head, rows, num_rows, stride, first, second, FROM, LAYOUT, WHOLE)


@triton.jit
def store_prepared_backward(
    head, grad_head, by_norm, part, tiles, rows, num_rows, stride, table, norm,
    LAYOUT: tl.constexpr, NUM_PREFIX: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """From the gradient by what `load_prepared` gave: stores that by the rows as they came, and from `part` on these
    rows' part of that by the norm's scale and shift."""
    _store_pairs_backward(
        head, grad_head, by_norm, part, tiles[0], rows, num_rows, stride, table, norm, 0, LAYOUT, NUM_PREFIX, WHOLE
    )
    if len(tiles) > 1:
        _store_pairs_backward(
            head, grad_head, by_norm, part, tiles[1], rows, num_rows, stride, table, norm,
            LAYOUT.half, LAYOUT, NUM_PREFIX, WHOLE,
        )  # fmt: skip
