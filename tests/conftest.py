"""What all tests share: ``pytest`` runs them on the CPU, Triton's kernels interpreted, CUDA's built for it.

``pytest --emulate 90`` compiles both for a chip and emulates that; ``pytest -m gpu`` does none of it.
"""

import importlib.util
import os
import shutil
import sys
import tempfile

import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "run the kernels as compiled for sm_80 or sm_90, emulated: Triton's, and CUDA's if there is nvcc"
    parser.addoption("--emulate", type=int, choices=(80, 90), metavar="CHIP", help=text)


def pytest_configure(config: pytest.Config) -> None:
    """A process interprets kernels or compiles them: that is settled before CUDA starts and Triton is imported."""
    if "PYTEST_XDIST_WORKER" not in os.environ:  # graphs that an earlier code compiled would be taken for this one's
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder = tempfile.mkdtemp(prefix="inductor-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    if config.getoption("markexpr") == "gpu":
        return
    if "diffmoe_kernels" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("a conftest.py imported diffmoe_kernels before Triton was told to interpret")
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the workers are as many as the cores
    from tests.kernels import on_cpu

    extension = on_cpu.install() if on_cpu.why_not() is None else None
    if chip := config.getoption("--emulate"):
        from tests.kernels.ptx.session import start

        config.add_cleanup(start(chip, extension))
    elif HAS_TRITON:
        from tests.kernels.interpreter import mend_bfloat16, patch_language_once

        mend_bfloat16()
        patch_language_once()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_compiled():
    """What an earlier test compiled, and the sizes it saw: these would decide which sizes a graph has fixed."""
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and pytest -m gpu"))
        if item.get_closest_marker("slow") and config.getoption("markexpr") != "slow":
            item.add_marker(pytest.mark.skip(reason="takes minutes: pytest -m slow"))
