"""What the kernels in CUDA C++ share: whether they can run, and how tensors are handed to them.

The extension `diffmoe_kernels._C` is there where it was built: see `setup.py`. It takes addresses, sizes and the stream
as integers and holds nothing of torch.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from diffmoe_kernels.checks import why_no_kernel

NOT_BUILT = "not built: install diffmoe-kernels where nvcc is on the PATH"
extension, not_loaded = None, None
try:
    extension = importlib.import_module("diffmoe_kernels._C")
except ModuleNotFoundError:
    not_loaded = NOT_BUILT
except ImportError as error:  # such as of a C++ library that is older than the compiler's
    not_loaded = f"built, but does not load: {error}"
HAS_CUDA = extension is not None
ON_CPU = HAS_CUDA and extension.on_cpu  # built for a CPU, for tests
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/common.cuh has the same numbers


def why_not_cuda(tensor: Tensor) -> str | None:
    """Why no kernel of the extension can run on this tensor, or None."""
    if not HAS_CUDA:
        return f"the CUDA extension is {not_loaded}"
    reason = why_no_kernel(tensor, dtypes=TYPES, on_cpu=ON_CPU)
    return why_not_on(tensor.get_device()) if reason is None and tensor.is_cuda else reason


def why_not_on(device: int) -> str | None:
    """Why the extension can't run on that GPU, or None: it was built without code for it, or for a newer driver."""
    if device in _fits:
        return None
    with torch.cuda.device(device):
        reason = extension.why_not_here()
    if reason:
        return f"the CUDA extension can't run on GPU {device}: {reason}"
    _fits.add(device)
    return None


why_not_on._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result, which imports all of Dynamo
_fits: set[int] = set()


def status() -> str:
    """ "available", or the reason why not, as `diffmoe_kernels.available_backends` tells it."""
    if not HAS_CUDA:
        return not_loaded
    if ON_CPU:
        return "available: built for the CPU"
    reason = extension.why_no_device()
    if reason:
        return f"built, no device: {reason}"
    reason = extension.why_not_here() if torch.cuda.is_initialized() else None  # else asking would make a context
    return f"built, not for this GPU: {reason}" if reason else "available"


def address(tensor: Tensor | None) -> int:
    """Of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def stream_of(tensor: Tensor) -> int:
    """The current stream of the tensor's device."""
    # As Triton's launcher asks for it; torch.cuda.current_stream makes an object of Python first, in 4 us.
    return torch._C._cuda_getCurrentRawStream(tensor.get_device()) if tensor.is_cuda else 0
