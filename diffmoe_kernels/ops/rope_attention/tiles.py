"""Tiles of the attention kernels, picked by hand: none spills at the models' shapes, and from sm_90 on two blocks of up
to 72 channels a head fit on a multiprocessor, so that the copies and exponentials of one hide behind the products of
the other. At shapes of no published model a few keep 8 to 32 bytes a thread: more than 64 channels without a norm or on
sm_80, layer norm over interleaved pairs.

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


_NORMS = ("none", "rmsnorm", "layernorm")
# For 16-bit numbers: kernel -> norm -> (up to 64 channels a head, more).
_SM90 = {
    "forward": {
        "none": (AttentionTile(128, 64, 8, 2), AttentionTile(64, 32, 4, 2)),
        "rmsnorm": (AttentionTile(64, 64, 4, 1), AttentionTile(64, 32, 4, 2)),
        "layernorm": (AttentionTile(64, 64, 4, 1), AttentionTile(64, 32, 4, 2)),
    },
    "query_backward": {
        "none": (AttentionTile(128, 64, 8, 2), AttentionTile(64, 32, 4, 2)),
        "rmsnorm": (AttentionTile(64, 64, 4, 1), AttentionTile(64, 32, 4, 2)),
        "layernorm": (AttentionTile(64, 64, 4, 1), AttentionTile(64, 32, 8, 2)),
    },
    "key_backward": {
        "none": (AttentionTile(64, 64, 4, 2), AttentionTile(32, 64, 4, 1)),
        "rmsnorm": (AttentionTile(32, 64, 4, 2), AttentionTile(16, 64, 8, 1)),
        "layernorm": (AttentionTile(32, 64, 4, 1), AttentionTile(16, 64, 8, 1)),
    },
}
# Sums lie in tensor memory there and leave registers for more queries at a time.
_SM100_KEYS = {**_SM90["key_backward"], "none": (AttentionTile(64, 64, 4, 2), AttentionTile(64, 64, 8, 1))}
_SM100 = {**_SM90, "key_backward": _SM100_KEYS}
_SM80 = {
    "forward": (AttentionTile(64, 64, 4, 1), AttentionTile(64, 32, 4, 1)),
    "query_backward": (AttentionTile(32, 32, 4, 2), AttentionTile(32, 32, 4, 2)),
    "key_backward": (AttentionTile(32, 64, 4, 1), AttentionTile(32, 32, 4, 1)),
}
# Without tensor cores; (up to 64 channels, more) by norm.
_FLOAT32 = {
    "forward": dict.fromkeys(_NORMS, (AttentionTile(16, 32, 4, 2), AttentionTile(16, 16, 4, 1))),
    "query_backward": {
        "none": (AttentionTile(16, 32, 4, 2), AttentionTile(32, 16, 8, 2)),
        "rmsnorm": (AttentionTile(16, 16, 4, 2), AttentionTile(32, 16, 8, 2)),
        "layernorm": (AttentionTile(32, 16, 8, 2), AttentionTile(32, 16, 8, 2)),
    },
    "key_backward": {
        "none": (AttentionTile(16, 16, 2, 1), AttentionTile(16, 16, 8, 1)),
        "rmsnorm": (AttentionTile(16, 16, 2, 1), AttentionTile(16, 16, 2, 1)),
        "layernorm": (AttentionTile(16, 16, 2, 1), AttentionTile(16, 16, 2, 1)),
    },
}


def pick_tile(kernel: str, dtype: torch.dtype, head_dim: int, norm: str) -> AttentionTile:
    """The tile of "forward", "query_backward" or "key_backward" with the norm "none", "rmsnorm" or "layernorm"."""
    is_wide = head_dim > 64
    if dtype == torch.float32:
        return _FLOAT32[kernel][norm][is_wide]
    if compute_capability() >= 90:
        return (_SM90 if compute_capability() < 100 else _SM100)[kernel][norm][is_wide]
    return _SM80[kernel][is_wide]
