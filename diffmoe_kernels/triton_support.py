"""What the Triton kernels share: whether they can run, tiles, and how float32 is multiplied."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from diffmoe_kernels.checks import why_no_kernel

# Tensor descriptors came with Triton 3.4; an older one is as good as none.
HAS_TRITON = all(importlib.util.find_spec(name) for name in ("triton", "triton.tools.tensor_descriptor"))
if HAS_TRITON:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
INTERPRETED = HAS_TRITON and triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: on the CPU, for tests
NO_TRITON = "Triton 3.6 or newer is not installed: pip install 'triton>=3.6'"
PROGRAMS = 8  # a multiprocessor
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_triton(tensor: Tensor, *, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str | None:
    """Why no Triton kernel can run on this tensor, or None."""
    if not HAS_TRITON:
        return NO_TRITON
    return why_no_kernel(tensor, dtypes=dtypes, on_cpu=INTERPRETED)


def why_not_products(tensor: Tensor) -> str | None:
    """Why no Triton kernel can multiply matrices of this tensor's dtype, or None."""
    reason = why_not_triton(tensor)
    if reason is None and INTERPRETED and tensor.dtype == torch.bfloat16 and not _interprets_bfloat16():
        reason = "Triton's interpreter multiplies bfloat16 as if it were integers; it takes float32 and float16"
    return reason


def _interprets_bfloat16() -> bool:
    """Whether somebody has mended that, as this project's tests do; not asked within a trace."""
    if _MENDED or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    ones, found = torch.ones(16, 16, dtype=torch.bfloat16), torch.zeros(16, 16)
    _square_kernel[(1,)](ones, found)
    if (found == 16).all():
        _MENDED.append(True)
    return bool(_MENDED)


_MENDED: list[bool] = []

if HAS_TRITON:
    # x, y (16, 16): y = x x
    @triton.jit
    def _square_kernel(x, y):
        at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        factor = tl.load(x + at)
        tl.store(y + at, tl.dot(factor, factor))


@dataclass(frozen=True)
class Tile:
    """One configuration of a matrix product: tile sizes in rows, columns and depth, warps and pipeline stages.

    group_m: how many row tiles run before the next column tile, so that operands are still in the L2 cache.
    descriptors: fetch what needs no gather by tensor descriptors (the bulk copy engine of sm_90 and later).
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group_m: int = 8
    descriptors: bool = False

    @property
    def blocks(self) -> dict[str, int]:
        """The sizes, as the kernels call them."""
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k, "GROUP_M": self.group_m}

    @property
    def options(self) -> dict[str, int]:
        """What a launch takes of it, but for the descriptors."""
        return {**self.blocks, "num_warps": self.warps, "num_stages": self.stages}


def chip_generation() -> int:
    """80, 90 or 100: whose tiles the kernels take on the device that they are compiled for; 80 in the interpreter.

    sm_12x has the shared memory of sm_8x, and neither warp-group products nor tensor memory.
    """
    if INTERPRETED:
        return 80
    driver = triton.runtime.driver.active
    return _generation(driver, driver.get_current_device())


@functools.cache
def _generation(driver: object, device: int) -> int:
    """Of the driver's current device, which is ``device``."""
    arch = driver.get_current_target().arch
    return 100 if 100 <= arch < 120 else 90 if 90 <= arch < 100 else 80


def device_name() -> str:
    """Of the current GPU, or "interpreter"."""
    return "interpreter" if INTERPRETED else torch.cuda.get_device_name()


def num_programs(num_tiles: int, like: Tensor) -> int:
    """How many programs share ``num_tiles`` tiles on a tensor's device: enough that the tail is negligible."""
    return min(num_tiles, PROGRAMS * multiprocessors(like.device))


def describe(*tiles: tuple[Tensor, tuple[int, ...]]) -> list[TensorDescriptor] | None:
    """Descriptors of tensors and their tiles; None where a layout allows none: it wants numbers at all, an inner stride
    of 1, and addresses and other strides of whole 16 bytes.
    """
    for tensor, block in tiles:
        strides = [stride * tensor.element_size() for stride in tensor.stride()[:-1]]
        if tensor.stride(-1) != 1 or any(one % 16 or one == 0 for one in (*strides, tensor.data_ptr() or 16)):
            return None
        if max(block) > 256 or tensor.numel() == 0:
            return None
    return [TensorDescriptor(tensor, tensor.shape, tensor.stride(), block) for tensor, block in tiles]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; a few in the interpreter, so that a program takes more than one tile."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def input_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: float32 as IEEE says, unless torch's own setting allows TF32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def cdiv(n: int, size: int) -> int:
    """How many pieces of ``size`` hold n: `triton.cdiv` for the host, where that one takes 2 microseconds."""
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is at least n, and 1."""
    return 1 << max(n - 1, 0).bit_length()
