"""The kernels as compiled for chips that are not there, run by the emulator of `tests/kernels/ptx`.

Values, and what a sanitizer would see: races between warps, copies and products under way, fences, addresses.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from diffmoe_kernels.triton_support import HAS_TRITON
from tests.kernels import on_cpu
from tests.kernels.ptx import cuda
from tests.kernels.ptx.cases import report

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
ROOT = Path(__file__).parents[2]
CASES = "tests.kernels.emulated_cases"
SINGLE = {"gates", "up", "down", "down_bias"}  # results in float32, whatever the operands are
ATTENTION = (
    *("attention", "attention, float16, part of a block", "attention with prefix and norm", "attention of 72 channels"),
    *("attention of many tokens", "attention of grouped heads", "attention of 128 channels"),
)
EXPERTS = (
    *("experts", "experts of few columns", "experts with biases", "experts with many rows"),
    *("experts with biases, few rows", "experts, unaligned", "experts in TF32"),
)


def is_known(fault: str) -> bool:
    """Triton 3.7 was the first with a fence between a copy and the product that reads it: triton-lang/triton#10537."""
    version = tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
    return version < (3, 7) and fault.startswith("product of what was written since the last proxy fence")


@pytest.mark.parametrize(
    ("capability", "names"),
    [(90, ATTENTION), (90, EXPERTS), (80, (ATTENTION[0], ATTENTION[5], EXPERTS[0]))],
    ids=["attention-90", "experts-90", "some-80"],
)
def test_right_and_without_a_race(capability, names):
    rows = report(CASES, capability, *names)
    assert set(rows) == set(names)
    if "experts of few columns" in names:
        launched = {launch["kernel"] for launch in rows["experts of few columns"]["launches"]}
        assert "_grouped_gemm_weight_grad_parts_kernel" in launched
    for name, row in rows.items():
        assert len(row["launches"]) >= 3 and len(row["errors"]) >= 2
        for launch in row["launches"]:
            assert not [fault for fault in launch["faults"] if not is_known(fault)], (name, launch["kernel"])
        coarse = 7e-4 if "float16" in name or "few rows" in name else 6e-3  # bfloat16
        fine = 5e-7
        if "TF32" in name:  # its factors have 10 bits behind the point, whatever becomes of the product
            coarse = fine = 1e-3
        for result, error in row["errors"].items():
            assert error < (fine if result in SINGLE else coarse), (name, result, error)


@pytest.mark.parametrize(
    ("choice", "files"),
    [("triton", ("test_permute", "test_router_topk")), ("not opcheck", ("test_cuda_edges",))],
    ids=["triton", "cuda"],
)
def test_tests_of_ops_run_on_it(choice, files):
    """`pytest --emulate`, for a few files of tests/ops."""
    if choice != "triton" and (on_cpu.why_not() or cuda.why_not()):
        pytest.skip(on_cpu.why_not() or cuda.why_not())
    command = [sys.executable, "-m", "pytest", "--emulate", "90", "-p", "no:cacheprovider", "-k", choice]
    command += [f"tests/ops/{name}.py" for name in files]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= 30
