"""What the Triton kernels share: whether they can run, tiles, and how float32 is multiplied."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import triton
INTERPRETED = HAS_TRITON and triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: on the CPU, for tests
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_triton(tensor: Tensor, *, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str | None:
    """Why no Triton kernel can run on this tensor, or None."""
    if not HAS_TRITON:
        return "triton is not installed: pip install 'diffmoe-kernels[triton]'"
    if tensor.dtype not in dtypes:
        return f"the kernels take {', '.join(str(one) for one in dtypes)}, not {tensor.dtype}"
    if tensor.device.type not in ("cuda", "meta") and not INTERPRETED:
        return f"the tensors are on {tensor.device.type}, the kernels need a CUDA device"
    return None


@dataclass(frozen=True)
class Tile:
    """One configuration of a matrix product: tile sizes in rows, columns and depth, warps and pipeline stages.

    group_m: how many row tiles run before the next column tile, so that operands are still in the L2 cache.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group_m: int = 8


def compute_capability() -> int:
    """10 * major + minor of the device that kernels are compiled for; 80 in the interpreter."""
    return 80 if INTERPRETED else triton.runtime.driver.active.get_current_target().arch


def input_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: float32 as IEEE says, unless torch's own setting allows TF32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is at least n, and 1."""
    return 1 << max(n - 1, 0).bit_length()
