"""What the Triton kernels share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from diffmoe_kernels import triton_support
from diffmoe_kernels.triton_support import HAS_TRITON, input_precision

ROOT = Path(__file__).parents[1]


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


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize(
    ("arch", "generation"), [(80, 80), (89, 80), (90, 90), (100, 100), (103, 100), (120, 80), (121, 80)]
)
def test_a_chip_takes_the_tiles_that_fit_it(arch, generation, monkeypatch):
    target = SimpleNamespace(arch=arch)
    driver = Mock(get_current_target=Mock(return_value=target), get_current_device=Mock(return_value=0))
    monkeypatch.setattr(triton_support, "INTERPRETED", False)
    monkeypatch.setattr(triton_support.triton.runtime.driver, "_active", driver)
    assert triton_support.chip_generation() == triton_support.chip_generation() == generation
    assert driver.get_current_target.call_count == 1
    target.arch, driver.get_current_device.return_value = 80, 1  # another device of the machine
    assert triton_support.chip_generation() == 80


UNMENDED = """
import torch
from diffmoe_kernels import MoE, RoPEAttention
for layer in (MoE(16, 16, 4, 2, backend="triton"), RoPEAttention(16, 1, backend="triton")):
    x = torch.randn(2, 16, 16)
    assert layer(x).isfinite().all()
    try:
        layer.bfloat16()(x.bfloat16())
        print("took it")
    except NotImplementedError as error:
        print(error)
"""


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_an_interpreter_that_multiplies_bfloat16_wrong_is_refused() -> None:
    """As it comes; these tests mend theirs."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", UNMENDED], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert len(told) == 2 and all("Triton's interpreter multiplies bfloat16 as if" in line for line in told)
