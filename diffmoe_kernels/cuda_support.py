"""What the kernels in CUDA C++ share: whether they can run, and how tensors are handed to them.

The extension `diffmoe_kernels._C` is there where it was built: see `setup.py`. It takes addresses, sizes and the stream
as integers and holds nothing of torch.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from diffmoe_kernels.checks import why_no_kernel

try:
    extension = importlib.import_module("diffmoe_kernels._C")
except ModuleNotFoundError as error:
    if error.name != "diffmoe_kernels._C":
        raise
    extension = None
HAS_CUDA = extension is not None
ON_CPU = HAS_CUDA and extension.on_cpu  # built for a CPU, for tests
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/common.cuh has the same numbers
NOT_BUILT = "not built: install diffmoe-kernels where nvcc is on the PATH"


def why_not_cuda(tensor: Tensor) -> str | None:
    """Why no kernel of the extension can run on this tensor, or None."""
    if not HAS_CUDA:
        return f"the CUDA extension is {NOT_BUILT}"
    return why_no_kernel(tensor, dtypes=TYPES, on_cpu=ON_CPU)


def status() -> str:
    """ "available", or the reason why not, as `diffmoe_kernels.available_backends` tells it."""
    if not HAS_CUDA:
        return NOT_BUILT
    if ON_CPU:
        return "available: built for the CPU"
    reason = extension.why_no_device()
    return f"built, no device: {reason}" if reason else "available"


def address(tensor: Tensor | None) -> int:
    """Of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def stream_of(tensor: Tensor) -> int:
    """The current stream of the tensor's device."""
    # As Triton's launcher asks for it; torch.cuda.current_stream makes an object of Python first, in 4 us.
    return torch._C._cuda_getCurrentRawStream(tensor.get_device()) if tensor.is_cuda else 0
