"""The choice of an implementation."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from diffmoe_kernels import Routing, available_backends, ops
from diffmoe_kernels.backend import BACKENDS, KERNEL_BACKENDS, Implementation, check_backend, run

ROOT = Path(__file__).parents[1]
X = torch.zeros(())
FAST = Implementation(lambda x, ready: "fast", lambda x, ready: None if ready else "it is not ready")
IMPLEMENTATIONS = {"triton": FAST, "reference": Implementation(lambda x, ready: "reference")}


def test_auto_takes_the_first_that_can_run():
    assert run("op", "auto", IMPLEMENTATIONS, X, ready=True) == "fast"
    assert run("op", "auto", IMPLEMENTATIONS, X, ready=False) == "reference"


def test_auto_asks_what_was_measured():
    slow = Implementation(lambda x, size: "measured", automatic=lambda x, size: size > 8)
    implementations = {"triton": slow, "torch": Implementation(lambda x, size: "torch")}
    assert run("op", "auto", implementations, X, size=9) == "measured"
    assert run("op", "auto", implementations, X, size=8) == "torch"
    assert run("op", "triton", implementations, X, size=8) == "measured"


def test_an_explicit_choice_is_kept_or_raises():
    assert run("op", "triton", IMPLEMENTATIONS, X, ready=True) == "fast"
    assert run("op", "reference", IMPLEMENTATIONS, X, ready=True) == "reference"
    with pytest.raises(NotImplementedError, match="op: backend 'triton' can't run here: it is not ready"):
        run("op", "triton", IMPLEMENTATIONS, X, ready=False)
    with pytest.raises(NotImplementedError, match="op: there is no 'cuda' backend; this op has 'triton', 'reference'"):
        run("op", "cuda", IMPLEMENTATIONS, X, ready=True)


def test_unknown_names_list_the_known():
    assert all(check_backend(name) == name for name in BACKENDS)
    for name in ("cudnn", None):
        with pytest.raises(ValueError, match=f"backend: expected one of 'auto', .* 'cuda', got {name!r}"):
            check_backend(name)
    with pytest.raises(ValueError, match="backend: expected one of"):
        run("op", "fast", IMPLEMENTATIONS, X, ready=True)


def test_implementations_run_without_autocast():
    seen = {"reference": Implementation(lambda x: torch.is_autocast_enabled("cpu"))}
    with torch.autocast("cpu", torch.bfloat16):
        assert run("op", "auto", seen, X) is False
        assert torch.is_autocast_enabled("cpu")


def test_available_backends_tells_each_or_why_not():
    told = available_backends()
    assert set(told) == set(BACKENDS) - {"auto"}
    assert told["reference"] == told["torch"] == "available"
    expected = ("available", "not available: ", "built, ", "not built: ")
    assert all(text.startswith(expected) for text in told.values())


NOT_BUILT = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "diffmoe_kernels._C":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Finder())
import diffmoe_kernels
print(diffmoe_kernels.available_backends()["cuda"])
"""


def test_without_the_extension_cuda_is_not_built():
    done = subprocess.run([sys.executable, "-c", NOT_BUILT], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "not built: install diffmoe-kernels where nvcc is on the PATH\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="fakes a GPU where there is none")
def test_fake_tensors_on_a_gpu_that_is_not_there():
    """As when memory is estimated on another machine: PyTorch's way is traced, a kernel refuses with the reason."""
    with FakeTensorMode():
        x, shift = torch.empty(2, 4, 8, device="cuda", dtype=torch.bfloat16), torch.empty(2, 8, device="cuda")
        assert ops.adaln(x, shift, shift).device.type == "cuda"
        for backend in KERNEL_BACKENDS:
            ends, rows, gates = (torch.empty(4, device="cuda", dtype=one) for one in (torch.int32, torch.int32, None))
            routing = Routing(rows, gates, ends, torch.empty(5, device="cuda", dtype=torch.int32), rows)
            with pytest.raises(NotImplementedError, match="there is no CUDA device|not built|is not installed"):
                ops.permute(torch.empty(4, 8, device="cuda"), routing, backend=backend)
