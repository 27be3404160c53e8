"""Tiles of the attention kernels, picked by hand and not measured: none spills registers at a published model's shape.
Elsewhere backwards keep at most 24 bytes a thread on the stack (128 channels; 72 with a norm; float16): tiles that keep
none take a tenth more instructions (benchmarks/NOTES.md). An opt-in search tries more tiles.

What decides is how many instructions a multiprocessor issues in all (benchmarks/NOTES.md), then that two programs fit
on one, so that the copies and exponentials of one hide behind the products of the other. Where all of a head fits in
shared memory it is kept there, prepared once. Without pipeline stages: they were seen to wait for all copies anyway,
and to make the compiler run warp-group products one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import starmap

import torch
from torch import Tensor

from diffmoe_kernels.autotune import best_tile, is_on
from diffmoe_kernels.triton_support import cdiv, chip_generation, multiprocessors, next_power_of_2


@dataclass(frozen=True)
class AttentionTile:
    """m queries by n keys, warps and pipeline stages.

    kept: blocks of keys (in the backward of keys: of queries) that stay in shared memory across the loop, all of a
        head; 0 for none.
    registers: limit of a thread (maxnreg), where one fewer lets two programs fit on a multiprocessor; None for none.
    """

    m: int
    n: int
    warps: int
    stages: int = 1
    kept: int = 0
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What a launch takes of it."""
        blocks = {"BLOCK_M": self.m, "BLOCK_N": self.n, "KEPT": self.kept}
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {**blocks, "num_warps": self.warps, "num_stages": self.stages, **limit}

    def divides(self, num_tokens: int) -> bool:
        """Whether no block of queries or keys is cut short."""
        return num_tokens % max(self.m, self.n) == 0


LEAST_PAIRS = 8  # a product is 16 deep at least
MAX_KEPT, MAX_KEPT_BYTES = 5, 80 * 1024  # blocks, which are unrolled; and so that two programs fit on a multiprocessor
_NORMS = ("none", "rmsnorm", "layernorm")
_ROWS32, _ROWS64, _ROWS128 = AttentionTile(32, 32, 4), AttentionTile(64, 64, 4), AttentionTile(128, 64, 8)
_ROWS128_TWICE = replace(_ROWS128, registers=128)
_FEW_KEYS, _FEW_KEYS8, _FEW_QUERIES = AttentionTile(64, 32, 4), AttentionTile(128, 32, 8), AttentionTile(32, 64, 4)
_WIDE_QUERIES, _WIDE_KEYS = AttentionTile(64, 32, 8), AttentionTile(16, 64, 8)
# For 16-bit numbers where nothing is kept: kernel -> norm -> by channels of the tiles, up to 64, up to 96, more. With a
# norm there are none between: all are in one tile.
_SM90 = {
    "forward": {
        "none": (_ROWS128_TWICE, _FEW_KEYS8, _ROWS64),
        "rmsnorm": (_ROWS128, _ROWS64, _ROWS64),
        "layernorm": (_ROWS128, _ROWS64, _ROWS64),
    },
    "query_backward": {
        "none": (_ROWS128_TWICE, _FEW_KEYS, _ROWS64),
        "rmsnorm": (_FEW_KEYS8, _FEW_KEYS, _FEW_KEYS),
        "layernorm": (_FEW_KEYS8, _FEW_KEYS, _FEW_KEYS),
    },
    "key_backward": {
        "none": (_ROWS64, _FEW_QUERIES, _FEW_QUERIES),
        "rmsnorm": (_FEW_QUERIES, _ROWS32, _ROWS32),
        "layernorm": (_FEW_QUERIES, _ROWS32, _ROWS32),
    },
}
# Sums lie in tensor memory there and leave registers for more at a time.
_SM100 = {
    "forward": {
        "none": (_ROWS128, _ROWS64, _ROWS64),
        "rmsnorm": (_ROWS128, _FEW_KEYS8, _FEW_KEYS8),
        "layernorm": (_ROWS128, _FEW_KEYS8, _FEW_KEYS8),
    },
    "query_backward": {
        "none": (_ROWS64, _ROWS64, _ROWS64),
        "rmsnorm": (_ROWS64, _WIDE_QUERIES, _WIDE_QUERIES),
        "layernorm": (_ROWS64, _WIDE_QUERIES, _WIDE_QUERIES),
    },
    "key_backward": {
        "none": (_ROWS64, _FEW_QUERIES, _FEW_QUERIES),
        "rmsnorm": (_ROWS64, _WIDE_KEYS, _WIDE_KEYS),
        "layernorm": (_ROWS64, _WIDE_KEYS, _WIDE_KEYS),
    },
}
_SM80 = {"forward": _FEW_KEYS, "query_backward": _ROWS32, "key_backward": _ROWS32}
# Without tensor cores; (up to 64 channels, more) by norm.
_WIDE_FLOAT32 = AttentionTile(16, 16, 8)
_FLOAT32 = {
    "forward": dict.fromkeys(_NORMS, (AttentionTile(16, 32, 4, 2), _WIDE_FLOAT32)),
    "query_backward": {
        "none": (AttentionTile(16, 32, 4, 2), _WIDE_FLOAT32),
        "rmsnorm": (AttentionTile(16, 16, 4, 2), _WIDE_FLOAT32),
        "layernorm": (AttentionTile(32, 16, 8, 2), _WIDE_FLOAT32),
    },
    "key_backward": dict.fromkeys(_NORMS, (AttentionTile(16, 16, 2), _WIDE_FLOAT32)),
}

# What an opt-in search tries for 16-bit numbers: rows of a program's own, those that it goes through, warps.
_TRIED = (
    *((32, 64, 4), (64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 64, 4)),
    *((128, 32, 8), (128, 64, 8), (128, 128, 8), (256, 64, 16)),
)
_TRIED_KEPT = (64, 64, 4), (64, 128, 4), (64, 256, 4), (128, 64, 8)


def pick_tile(
    kernel: str, dtype: torch.dtype, head_dim: int, norm: str, num_tokens: int, group: int = 1
) -> AttentionTile:
    """The tile of "forward", "query_backward" or "key_backward" with the norm "none", "rmsnorm" or "layernorm".

    group: query heads to a key head, over which the kernel goes: in "key_backward" alone.
    """
    return _pick_tile(kernel, dtype, head_dim, norm, num_tokens, group, chip_generation())


@functools.lru_cache(1024)  # asked for at every launch
def _pick_tile(
    kernel: str, dtype: torch.dtype, head_dim: int, norm: str, num_tokens: int, group: int, chip: int
) -> AttentionTile:
    if dtype == torch.float32:
        return _FLOAT32[kernel][norm][head_dim > 64]
    if chip < 90:
        return _SM80[kernel]
    channels = 2 * sum(_pairs_of_tiles(head_dim, norm, chip))
    blocks = cdiv(num_tokens, _ROWS64.n)
    kept_bytes = 2 * blocks * _ROWS64.n * channels * dtype.itemsize
    # Five with a norm would take a register too many where float16 is multiplied.
    most = MAX_KEPT - (kernel == "key_backward" and norm != "none" and dtype == torch.float16)
    if chip < 100 and group == 1 and blocks <= most and kept_bytes <= MAX_KEPT_BYTES:
        return replace(_ROWS64, kept=blocks)
    return (_SM90 if chip < 100 else _SM100)[kernel][norm][(channels > 64) + (channels > 96)]


def best_attention_tile(
    kernel: str, launch: Callable[[AttentionTile], object], qkv: Tensor, constants: dict[str, object], *options: object
) -> AttentionTile:
    """`pick_tile`'s for qkv (B, N, H + 2 Hkv, d), or what an opt-in search found; see `autotune`.

    constants: what the kernel is compiled for, of `Settings`.
    """
    batch, num_tokens = qkv.shape[:2]
    group = constants["NUM_HEADS"] // constants["NUM_KV_HEADS"] if kernel == "key_backward" else 1
    layout = constants["LAYOUT"]
    default = pick_tile(kernel, qkv.dtype, layout.d, layout.norm, num_tokens, group)
    if not is_on():
        return default
    length = cdiv(num_tokens, _ROWS64.n), num_tokens % _ROWS64.n == 0
    others = (value for name, value in constants.items() if name != "LAYOUT")
    shape_class = (next_power_of_2(batch), *length, qkv.dtype, *layout, *others, *options)
    tried = candidates(kernel, qkv.dtype, num_tokens, keeps=default.kept > 0)
    return best_tile(f"attention_{kernel}", shape_class, default, tried, launch)


def candidates(kernel: str, dtype: torch.dtype, num_tokens: int, *, keeps: bool) -> Iterator[AttentionTile]:
    """Tiles that an opt-in search tries. keeps: all of a head in shared memory, too."""
    if dtype == torch.float32:
        yield from (tile for by_norm in _FLOAT32.values() for pair in by_norm.values() for tile in pair)
        return

    def tile(rows: int, others: int, warps: int) -> AttentionTile:
        return AttentionTile(others, rows, warps) if kernel == "key_backward" else AttentionTile(rows, others, warps)

    for one in starmap(tile, _TRIED):
        yield one
        if one.warps == 8:
            yield replace(one, registers=128)  # two programs on a multiprocessor
    if keeps:
        for rows, others, warps in _TRIED_KEPT:
            if others < 2 * num_tokens:
                yield replace(tile(rows, others, warps), kept=cdiv(num_tokens, others))


def programs_of_head(tile: AttentionTile, blocks: int, num_heads: int, like: Tensor) -> int:
    """How many programs share a head's blocks: as few as keep the device busy where they have what is kept in common.

    num_heads: of all samples.
    """
    return min(blocks, max(2 * multiprocessors(like.device) // num_heads, 1)) if tile.kept else blocks


def pairs_of_tiles(head_dim: int, norm: str) -> tuple[int, int]:
    """half and tail: how many pairs of channels the one or two tiles of a head have.

    A norm wants all in one; so do chips before sm_90, whose registers hold what theirs keep in shared memory.
    """
    return _pairs_of_tiles(head_dim, norm, chip_generation())


@functools.lru_cache(1024)
def _pairs_of_tiles(head_dim: int, norm: str, chip: int) -> tuple[int, int]:
    pairs = cdiv(head_dim, 2)
    whole = max(next_power_of_2(pairs), LEAST_PAIRS)
    half = max(whole // 2, LEAST_PAIRS)
    tail = max(next_power_of_2(pairs - half), LEAST_PAIRS)
    is_split = norm == "none" and half + tail < whole and chip >= 90
    return (half, tail) if is_split else (whole, 0)
