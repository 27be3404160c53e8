"""The backends of kernels: on a CPU Triton's interpreted and CUDA's built for it, on a GPU as they are."""

import pytest
import torch

from diffmoe_kernels.cuda_support import HAS_CUDA, ON_CPU
from diffmoe_kernels.triton_support import HAS_TRITON

CAN_RUN_CUDA = ON_CPU or (HAS_CUDA and torch.cuda.is_available())
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs triton"))
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not CAN_RUN_CUDA, reason="needs the CUDA extension, or g++"))
KERNELS = [TRITON, CUDA]
