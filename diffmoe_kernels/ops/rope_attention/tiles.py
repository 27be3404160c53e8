"""Tiles of the attention kernels, picked by hand and not measured: none spills registers at a published model's shape,
with triton 3.7.1 on sm_90 none at any width or norm that was tried. On sm_100 72 channels with a norm keep 24 bytes.

What decides is how many instructions a multiprocessor issues in all (benchmarks/NOTES.md), then that two programs fit
on one, so that the copies and exponentials of one hide behind the products of the other. Where all of a head fits in
shared memory it is kept there, prepared once. Without pipeline stages: they were seen to wait for all copies anyway,
and to make the compiler run warp-group products one by one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffmoe_kernels.triton_support import chip_generation, multiprocessors, next_power_of_2


@dataclass(frozen=True)
class AttentionTile:
    """m queries by n keys, warps and pipeline stages.

    kept: blocks of what a program meets again and again that stay in shared memory, all of a head; 0 for none.
    registers: that a thread may take, where the compiler would take one too many for two programs; None for any number.
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
        "none": (_ROWS64, _FEW_KEYS, _ROWS64),
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


def pick_tile(
    kernel: str, dtype: torch.dtype, head_dim: int, norm: str, num_tokens: int, group: int = 1
) -> AttentionTile:
    """The tile of "forward", "query_backward" or "key_backward" with the norm "none", "rmsnorm" or "layernorm".

    group: query heads to a key head, over which the kernel goes: in "key_backward" alone.
    """
    chip = chip_generation()
    if dtype == torch.float32:
        return _FLOAT32[kernel][norm][head_dim > 64]
    if chip < 90:
        return _SM80[kernel]
    channels = 2 * sum(pairs_of_tiles(head_dim, norm))
    blocks = -(-num_tokens // _ROWS64.n)
    kept_bytes = 2 * blocks * _ROWS64.n * channels * dtype.itemsize
    # Five with a norm would take a register too many where float16 is multiplied.
    most = MAX_KEPT - (kernel == "key_backward" and norm != "none" and dtype == torch.float16)
    if chip < 100 and group == 1 and blocks <= most and kept_bytes <= MAX_KEPT_BYTES:
        return replace(_ROWS64, kept=blocks)
    return (_SM90 if chip < 100 else _SM100)[kernel][norm][(channels > 64) + (channels > 96)]


def programs_of_head(tile: AttentionTile, blocks: int, num_heads: int, like: Tensor) -> int:
    """How many programs share a head's blocks: as few as keep the device busy where they have what is kept in common.

    num_heads: of all samples.
    """
    return min(blocks, max(2 * multiprocessors(like.device) // num_heads, 1)) if tile.kept else blocks


def pairs_of_tiles(head_dim: int, norm: str) -> tuple[int, int]:
    """HALF and TAIL: how many pairs of channels the one or two tiles of a head have.

    A norm wants all in one; so do chips before sm_90, whose registers hold what theirs keep in shared memory.
    """
    pairs = -(-head_dim // 2)
    whole = max(next_power_of_2(pairs), LEAST_PAIRS)
    half = max(whole // 2, LEAST_PAIRS)
    tail = max(next_power_of_2(pairs - half), LEAST_PAIRS)
    is_split = norm == "none" and half + tail < whole and chip_generation() >= 90
    return (half, tail) if is_split else (whole, 0)
