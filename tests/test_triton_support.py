"""What the Triton kernels share."""

from __future__ import annotations

import pytest
import torch

from diffmoe_kernels.triton_support import input_precision


@pytest.fixture
def restored():
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_input_precision_follows_torch(restored):
    """By its old setting and by its new one."""
    for setting, value, expected in (
        ("allow_tf32", True, "tf32"),
        ("allow_tf32", False, "ieee"),
        ("fp32_precision", "tf32", "tf32"),
        ("fp32_precision", "ieee", "ieee"),
    ):
        setattr(torch.backends.cuda.matmul, setting, value)
        assert input_precision(torch.float32) == expected
        assert input_precision(torch.bfloat16) == "ieee"
