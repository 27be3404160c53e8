"""Tiles of the grouped products, picked by hand: a first call costs a compile, not a search.

Keyed by the device and by how many rows a group has on average; from sm_90 on, in training, by columns and depth, too.
Marked are those that did best when first drafts of two of the products were timed on an H200 (torch 2.11, triton 3.6,
2026-11-20). The others are not measured: they fit shared memory, at most 99 KiB below sm_90, so that the smaller chips
of that generation take them too, and 227 KiB from there on, and spill no registers. From sm_90 on what needs no gather
comes by tensor descriptors, but where pointers did better.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from diffmoe_kernels.autotune import best_tile, is_on
from diffmoe_kernels.triton_support import (
    Tile,
    cdiv,
    chip_generation,
    input_precision,
    multiprocessors,
    next_power_of_2,
)

FEW, SOME = 32, 128  # rows of an average group, up to which a tile of 32 or 64 rows wastes less than one of 128
TALL = 1024  # from which a tile of 256 rows wastes an eighth of a group or less, on average
PARTS = 20  # steps of a tile that take as long as writing, reading and adding parts: 12 microseconds; not measured

# (least compute capability, kind of rows) -> tile, for 16-bit numbers, half as deep for TF32; of a plain product.
_PLAIN = {
    (90, "few"): Tile(64, 128, 64, 4, 4, descriptors=True),  # warp-group products have 64 rows at least
    (90, "some"): Tile(64, 128, 64, 4, 4, descriptors=True),
    (90, "many"): Tile(128, 256, 64, 8, 3, descriptors=True),  # measured at DSMoE-L, with pointers
    (80, "few"): Tile(32, 128, 32, 4, 4),
    (80, "some"): Tile(64, 128, 32, 4, 4),
    (80, "many"): Tile(128, 128, 64, 8, 3),
}
# The same of a product with two columns of weights side by side, gate and up, or with an epilogue that holds as much.
_PAIRED = {
    (90, "few"): Tile(64, 64, 64, 4, 4, descriptors=True),
    (90, "some"): Tile(64, 64, 64, 4, 4, descriptors=True),
    (90, "many"): Tile(128, 128, 64, 8, 4, descriptors=True),  # measured at DSMoE-L-E16, B-E48 and 3B, with pointers
    (80, "few"): Tile(32, 64, 64, 4, 3),
    (80, "some"): Tile(64, 64, 64, 4, 3),
    (80, "many"): Tile(128, 64, 64, 8, 3),
}
# From sm_90 on in training, 16-bit; what was measured was measured with pointers.
_SHALLOW = Tile(128, 128, 32, 4, 4)  # measured at DSMoE-S-E48 and B-E48: two blocks, one stores while one multiplies
# Measured at DSMoE-S-E48 but for depth and stages, two blocks; at DSMoE-L-E48, 7 x 64 columns, but for the depth.
_PAIRED_FEW_COLUMNS = Tile(128, 64, 64, 4, 3, descriptors=True)
_PAIRED_TALL = Tile(256, 64, 64, 8, 4, descriptors=True)
_TALL = Tile(256, 128, 64, 8, 3, descriptors=True)
_WEIGHT_GRAD = {90: Tile(128, 256, 64, 8, 3), 80: Tile(128, 128, 32, 8, 3)}
_UNALIGNED = Tile(64, 64, 32, 4, 2)  # rows that begin at odd addresses are read number by number
# Float32 as IEEE has it runs without tensor cores: small tiles, whose sums fit in registers, those of a pair too.
_FLOAT32 = {
    "few": Tile(32, 64, 16, 4, 4),
    "some": Tile(32, 64, 16, 4, 4),
    "many": Tile(64, 64, 16, 8, 3),
    "paired": Tile(32, 64, 16, 8, 3),
    "weight_grad": Tile(64, 64, 32, 8, 3),
}


def pick_tile(
    kernel: str,
    num_rows: int,
    num_groups: int,
    num_columns: int,
    depth: int,
    dtype: torch.dtype,
    *,
    paired: bool = False,
) -> Tile:
    """The tile of a product of `num_rows` rows in `num_groups` groups, `depth` deep, with `num_columns` columns.

    Args:
        kernel: "up", "rows" or "down_backward".
        paired: two products that share their rows, each of `num_columns` columns.
    """
    sizes = num_rows, num_groups, num_columns, depth
    return _pick_tile(kernel, *sizes, dtype, paired, chip_generation(), _without_tensor_cores(dtype))


@functools.lru_cache(1024)  # asked for at every launch
def _pick_tile(
    kernel: str,
    num_rows: int,
    num_groups: int,
    num_columns: int,
    depth: int,
    dtype: torch.dtype,
    paired: bool,
    chip: int,
    without_tensor_cores: bool,
) -> Tile:
    heavy = _is_heavy(kernel, paired)
    average = num_rows / max(num_groups, 1)
    kind = "few" if average <= FEW else "some" if average <= SOME else "many"
    if without_tensor_cores:
        return _FLOAT32["paired" if heavy else kind]
    if not _is_aligned(num_columns, depth, dtype):
        return _UNALIGNED
    generation = min(chip, 90)
    tile = (_PAIRED if heavy else _PLAIN)[generation, kind]
    if dtype == torch.float32:
        if tile.n == (128 if heavy else 256):
            tile = replace(tile, n=tile.n // 2, stages=4)  # what an epilogue holds is twice as wide, too
    elif (generation, kind) == (90, "many"):
        if heavy and num_columns <= 128:
            tile = _PAIRED_FEW_COLUMNS
        elif paired and average >= TALL and _half_is_better(tile.n, num_columns):
            tile = _PAIRED_TALL
        elif kernel == "rows" and depth <= 256:
            tile = _SHALLOW
        elif not heavy and average >= TALL and _half_is_better(tile.n, num_columns):
            tile = _TALL
    return _fitted(tile, num_columns, dtype)


def pick_weight_grad_tile(size_m: int, size_n: int, dtype: torch.dtype) -> Tile:
    """The tile of a product (E, size_m, size_n) over each group's rows."""
    return _pick_weight_grad_tile(size_m, size_n, dtype, chip_generation(), _without_tensor_cores(dtype))


@functools.lru_cache(1024)
def _pick_weight_grad_tile(size_m: int, size_n: int, dtype: torch.dtype, chip: int, without_tensor_cores: bool) -> Tile:
    if without_tensor_cores:
        return _FLOAT32["weight_grad"]
    if not _is_aligned(size_m, size_n, dtype):
        return _UNALIGNED
    tile = _WEIGHT_GRAD[min(chip, 90)]
    upright = _fitted(tile, size_n, dtype)
    if dtype == torch.float32 or tile.m == tile.n:
        return upright
    turned = _fitted(replace(tile, m=tile.n, n=tile.m), size_n, dtype)
    return min(upright, turned, key=lambda one: _padded(size_m, one.m) * _padded(size_n, one.n))


def weight_grad_shares(num_tiles: int, rows_a_group: int, tile: Tile, like: Tensor) -> int:
    """How many programs of `like`'s device share the steps of all tiles evenly; 0 for a program a tile.

    Shared where the rounds that whole tiles take last a ninth longer than an even share and its parts; on sm_90 alone,
    since for sm_100 Triton 3.7 spills, and older chips run two blocks of the kernel that does not share.
    """
    if chip_generation() != 90 or tile.m * tile.n < 128 * 128:  # of smaller ones more run at once
        return 0
    programs, steps = multiprocessors(like.device) * max(8 // tile.warps, 1), rows_a_group // tile.k
    rounds, share = cdiv(num_tiles, programs) * steps, num_tiles * steps / programs + PARTS
    return programs if share < 0.9 * rounds else 0


def best_product_tile(
    kernel: str,
    launch: Callable[[Tile], object],
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    *options: object,
    paired: bool = False,
) -> Tile:
    """`pick_tile`'s of these (rows, groups, columns, depth), or what an opt-in search found; see `autotune`."""
    num_rows, num_groups, num_columns, depth = sizes
    default = pick_tile(kernel, *sizes, dtype, paired=paired)
    if not is_on():
        return default
    shape_class = (next_power_of_2(num_rows // num_groups), *sizes[1:], dtype, input_precision(dtype), *options)
    return best_tile(kernel, shape_class, default, candidates(dtype, paired=_is_heavy(kernel, paired)), launch)


def best_weight_grad_tile(
    launch: Callable[[Tile], object], sizes: tuple[int, int, int, int], dtype: torch.dtype, *options: object
) -> Tile:
    """The same for (rows, groups, size_m, size_n) of `pick_weight_grad_tile`."""
    num_rows, num_groups, size_m, size_n = sizes
    default = pick_weight_grad_tile(size_m, size_n, dtype)
    if not is_on():
        return default
    shape_class = (next_power_of_2(num_rows // num_groups), *sizes[1:], dtype, input_precision(dtype), *options)
    return best_tile("weight_grad", shape_class, default, candidates(dtype, weight_grad=True), launch)


def _is_heavy(kernel: str, paired: bool) -> bool:
    """Whether its epilogue holds two numbers of each result at once."""
    return paired or kernel == "down_backward"


def _without_tensor_cores(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and input_precision(dtype) == "ieee"


def _is_aligned(size: int, other: int, dtype: torch.dtype) -> bool:
    """Whether rows of so many numbers begin at multiples of 16 bytes."""
    return size * dtype.itemsize % 16 == other * dtype.itemsize % 16 == 0


def _padded(size: int, block: int) -> int:
    return cdiv(size, block) * block


def _half_is_better(n: int, num_columns: int) -> bool:
    """Whether half as many columns a tile would save more than a sixteenth of the products."""
    return 16 * _padded(num_columns, n // 2) < 15 * _padded(num_columns, n)


def _fitted(tile: Tile, num_columns: int, dtype: torch.dtype) -> Tile:
    """Half as many columns as long as a tile would be half empty, or more; as many bytes deep in TF32."""
    n, warps = tile.n, tile.warps
    while n >= 128 and num_columns <= n // 2:
        n //= 2
        warps = max(warps // 2, 4)
    # Warp-group products of TF32 want both factors with the depth side by side. What comes by descriptors as it lies
    # would be turned between two products, neither of which could overlap the other.
    descriptors = tile.descriptors and dtype != torch.float32
    return replace(tile, n=n, warps=warps, k=tile.k * 2 // dtype.itemsize, descriptors=descriptors)


def candidates(dtype: torch.dtype, *, paired: bool = False, weight_grad: bool = False) -> Iterator[Tile]:
    """Tiles that an opt-in search tries: those whose sums fit in registers and whose stages fit in shared memory."""
    if _without_tensor_cores(dtype):
        yield from (*_FLOAT32.values(), Tile(32, 32, 32, 4, 3), Tile(128, 64, 16, 8, 3))
        return
    is_new = chip_generation() >= 90
    limit = (227 if is_new else 99) * 1024
    accumulators = 2 if paired else 1
    heights, depths = ((64, 128, 256), (64,)) if is_new else ((32, 64, 128), (32, 64))
    if is_new and dtype != torch.float32 and not paired and not weight_grad:
        yield _SHALLOW
    for m, n, k, warps in product(heights, (64, 128, 256), depths, (4, 8)):
        if accumulators * m * n > 128 * 32 * warps:
            continue
        for stages in (3, 4):
            if stages * 2 * k * (m + accumulators * n) > limit:
                continue
            for descriptors in (False, True) if is_new and not weight_grad else (False,):
                yield Tile(m, n, k * 2 // dtype.itemsize, warps, stages, descriptors=descriptors)
