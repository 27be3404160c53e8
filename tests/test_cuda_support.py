"""Where the CUDA extension is there and can't run: the reason is told, and all else works."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffmoe_kernels import cuda_support

ROOT = Path(__file__).parents[1]
CUDA_TENSOR = SimpleNamespace(is_cuda=True, dtype=torch.float32, get_device=lambda: 0, device=torch.device("cuda:0"))


@pytest.fixture
def built(monkeypatch):
    """An extension, on a GPU that is new enough."""
    extension = SimpleNamespace(why_no_device=lambda: "", why_not_here=lambda: "", on_cpu=False)
    for name, value in (("extension", extension), ("HAS_CUDA", True), ("ON_CPU", False), ("_fits", set())):
        monkeypatch.setattr(cuda_support, name, value)
    monkeypatch.setattr(cuda_support, "why_no_kernel", lambda *args, **options: None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return extension


def test_an_extension_that_fits_the_gpu(built) -> None:
    assert cuda_support.why_not_cuda(CUDA_TENSOR) is None and cuda_support.status() == "available"


def test_an_extension_without_code_for_the_gpu(built) -> None:
    """Another architecture's, or a driver that is too old."""
    built.why_not_here = lambda: "cudaErrorNoKernelImageForDevice, no kernel image"
    reason = cuda_support.why_not_cuda(CUDA_TENSOR)
    assert reason == "the CUDA extension can't run on GPU 0: cudaErrorNoKernelImageForDevice, no kernel image"
    assert cuda_support.status() == "built, not for this GPU: cudaErrorNoKernelImageForDevice, no kernel image"


def test_a_gpu_that_fits_is_asked_once_and_one_that_did_not_again(built) -> None:
    answers = ["cudaErrorMemoryAllocation, out of memory", ""]
    built.why_not_here = lambda: answers.pop(0)
    assert "out of memory" in cuda_support.why_not_cuda(CUDA_TENSOR)
    for _ in range(2):
        assert cuda_support.why_not_cuda(CUDA_TENSOR) is None


def test_telling_what_is_there_makes_no_context(built, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    built.why_not_here = lambda: pytest.fail("asked the device")
    assert cuda_support.status() == "available"


def test_a_compiler_asks_too(monkeypatch) -> None:
    told_in_c = os.getcwd  # some string, by a function that Dynamo can't look into, as those of the extension
    monkeypatch.setattr(cuda_support, "extension", SimpleNamespace(why_not_here=told_in_c))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())

    def choose(x):
        return x + (1 if cuda_support.why_not_on(0) else 2)

    assert torch.compile(choose, fullgraph=True, backend="eager")(torch.zeros(())) == 1


LOAD = """
import sys, torch
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec
class Finder:  # as of a file that the system refuses to load
    def find_spec(self, name, path=None, target=None):
        if name == "diffmoe_kernels._C":
            return ModuleSpec(name, ExtensionFileLoader(name, __FILE__), origin=__FILE__)
sys.meta_path.insert(0, Finder())
import diffmoe_kernels
print(diffmoe_kernels.available_backends()["cuda"])
layer = diffmoe_kernels.MoE(8, 8, 2, 1)
print(layer(torch.ones(3, 8)).shape)
try:
    diffmoe_kernels.ops.token_drop(torch.rand(4, 2), 1, backend="cuda")
except NotImplementedError as error:
    print(error)
"""


def test_an_extension_that_does_not_load_is_named_and_hinders_nothing(tmp_path) -> None:
    broken = tmp_path / "_C.so"
    broken.write_text("not a library")
    script = LOAD.replace("__FILE__", repr(str(broken)))
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    status, shape, error = done.stdout.splitlines()
    assert status.startswith("built, but does not load: ") and "_C.so" in status
    assert shape == "torch.Size([3, 8])"
    assert f"the CUDA extension is {status}" in error
