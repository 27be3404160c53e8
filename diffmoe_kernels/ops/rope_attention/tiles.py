"""Tiles of the attention kernels, picked by hand: none spills, and two blocks or more fit on a multiprocessor of sm_90.

Not measured. Why these: a block of 8 warps takes 128 queries, so that keys and values are read twice at 256 tokens; 64
keys a step leave room for a second block, whose copies and exponentials hide behind the first one's products. The
backward by k and v holds four sums and takes 64 of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionTile:
    """m queries by n keys, warps and pipeline stages."""

    m: int
    n: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """What a launch takes of it."""
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "num_warps": self.warps, "num_stages": self.stages}


_NARROW = {  # up to 64 channels a head
    "forward": AttentionTile(128, 64, 8, 2),
    "query_backward": AttentionTile(128, 64, 8, 2),
    "key_backward": AttentionTile(64, 64, 4, 2),
}
_WIDE = {
    "forward": AttentionTile(64, 64, 4, 1),
    "query_backward": AttentionTile(64, 64, 4, 1),
    "key_backward": AttentionTile(64, 64, 8, 2),
}
_FLOAT32 = AttentionTile(32, 32, 4, 1)  # without tensor cores


def pick_tile(kernel: str, dtype: torch.dtype, head_dim: int, num_tokens: int) -> AttentionTile:
    """The tile of "forward", "query_backward" or "key_backward"."""
    if dtype == torch.float32:
        return _FLOAT32
    return (_NARROW if head_dim <= 64 else _WIDE)[kernel]
