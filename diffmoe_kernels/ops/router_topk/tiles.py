"""Sizes of the Triton kernels' tiles."""

from __future__ import annotations

MAX_EXPERTS = 256  # of the CUDA kernels too
BLOCK_T = 32  # a bit of a mask each, and a lane of a warp
# A program of the wide kernels is one warp. Its tiles are (groups, 16-byte runs of a group, tokens, experts of a run):
# Triton spreads those over lanes by token first, so that up to E = 64 a thread holds one token's experts and a row's
# maximum takes no shuffle. At T = 65536, E = 48 that is 15 warps an SM, all resident.
NARROW = 64
TILE = 1024  # of wider rows, and in the backward, which holds two tiles: 32 elements a thread
SCAN = 4096  # blocks a step: one step up to T = 131072
PLACE_T = 128  # tokens of a program of `_router_topk_place_kernel`: 512 programs at T = 65536
PLACE_SLOTS = 4096  # of theirs at most, 32 a thread: of more choices each, fewer tokens
