"""Tiles of the attention kernels, picked by hand: none spills (but float32 keys of 128 interleaved channels under layer
norm, 16 bytes a thread), and from sm_90 on two blocks of 64 channels a head fit on a multiprocessor, so that the copies
and exponentials of one hide behind the products of the other.

Not measured. What decides: a block of 128 queries reads keys and values twice at 256 tokens, one of 64 four times;
norms hold more numbers and leave room for smaller blocks only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffmoe_kernels.triton_support import compute_capability


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


# (least compute capability, up to 64 channels a head) -> kernel -> tile by norm, for 16-bit numbers.
_TILES = {
    (90, True): {
        "forward": {
            "none": AttentionTile(128, 64, 8, 2),
            "rmsnorm": AttentionTile(64, 64, 4, 1),
            "layernorm": AttentionTile(64, 64, 4, 1),
        },
        "query_backward": {
            "none": AttentionTile(128, 64, 8, 2),
            "rmsnorm": AttentionTile(64, 64, 4, 1),
            "layernorm": AttentionTile(64, 64, 4, 1),
        },
        "key_backward": {
            "none": AttentionTile(64, 64, 4, 2),
            "rmsnorm": AttentionTile(32, 64, 4, 2),
            "layernorm": AttentionTile(32, 64, 4, 1),
        },
    },
    (90, False): {
        "forward": dict.fromkeys(("none", "rmsnorm", "layernorm"), AttentionTile(64, 32, 4, 2)),
        "query_backward": {
            "none": AttentionTile(64, 32, 4, 2),
            "rmsnorm": AttentionTile(64, 32, 4, 2),
            "layernorm": AttentionTile(64, 32, 8, 2),
        },
        "key_backward": {
            "none": AttentionTile(32, 64, 8, 1),
            "rmsnorm": AttentionTile(32, 32, 4, 1),
            "layernorm": AttentionTile(32, 32, 4, 1),
        },
    },
}
_SM80 = {
    "forward": (AttentionTile(64, 64, 4, 1), AttentionTile(64, 32, 4, 1)),
    "query_backward": (AttentionTile(32, 32, 4, 2), AttentionTile(32, 32, 4, 2)),
    "key_backward": (AttentionTile(32, 64, 4, 1), AttentionTile(32, 32, 4, 1)),
}
_FLOAT32 = {  # without tensor cores; up to 64 channels, above them, above them with a norm
    "forward": (AttentionTile(16, 32, 4, 2), AttentionTile(16, 16, 4, 1), AttentionTile(16, 16, 4, 1)),
    "query_backward": (AttentionTile(16, 32, 4, 2), AttentionTile(32, 16, 8, 2), AttentionTile(32, 16, 8, 2)),
    "key_backward": (AttentionTile(16, 16, 2, 1), AttentionTile(16, 16, 8, 1), AttentionTile(16, 16, 2, 1)),
}


def pick_tile(kernel: str, dtype: torch.dtype, head_dim: int, norm: str) -> AttentionTile:
    """The tile of "forward", "query_backward" or "key_backward" with the norm "none", "rmsnorm" or "layernorm"."""
    is_narrow = head_dim <= 64
    if dtype == torch.float32:
        return _FLOAT32[kernel][0 if is_narrow else 1 if norm == "none" else 2]
    if compute_capability() >= 90:
        return _TILES[90, is_narrow][kernel][norm]
    return _SM80[kernel][not is_narrow]
