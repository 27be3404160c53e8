"""Importing is quick, touches no GPU, and needs no more than the declared dependencies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL = (
    "matplotlib",
    "sklearn",
    "jsonargparse",
    "tqdm",
    "PIL",
    "yaml",
    "tensorboard",
    "scipy",
    "pandas",
    "hypothesis",
    "diffusers",
    "torchdiffeq",
    "transformers",
)
ALLOWED = {"torch", "triton", "numpy", "einops", "safetensors", "diffmoe_kernels", "models"}

SCRIPT = """
import json, sys, time
for name in {blocked!r}:
    sys.modules[name] = None  # an import of it raises
import torch
before = set(sys.modules)
start = time.perf_counter()
import {module}
seconds = time.perf_counter() - start
roots = sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} - sys.stdlib_module_names)
print(json.dumps({{"seconds": seconds, "cuda": torch.cuda.is_initialized(), "roots": roots}}))
"""


# What a machine has for `make gpu-check`: torch, triton, pytest and what they need.
BARE = {
    *("torch", "torchgen", "functorch", "triton", "numpy", "einops", "safetensors", "pytest", "pytest_benchmark"),
    *("py", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "cpuinfo", "typing_extensions", "sympy"),
    *("mpmath", "jinja2", "markupsafe", "networkx", "filelock", "fsspec", "setuptools"),
}
COLLECT = """
import importlib.machinery, sys
class Bare:
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root in {bare!r} or root in sys.stdlib_module_names:
            return None
        found = importlib.machinery.PathFinder.find_spec(root)
        if found is not None and "-packages" in str(found.origin or found.submodule_search_locations):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Bare())
import pytest
sys.exit(pytest.main(["tests", "benchmarks", "--collect-only", "-q", "-p", "pytest_benchmark.plugin"]))
"""


def imported(module):
    """What a fresh interpreter tells about importing ``module`` after torch."""
    script = SCRIPT.format(blocked=OPTIONAL, module=module)
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(out.stdout)


@pytest.mark.parametrize("module", ["diffmoe_kernels", "diffmoe_kernels.testing", "models"])
def test_import_is_quick_and_needs_the_declared_dependencies_alone(module):
    told = imported(module)
    roots = {root for root in told["roots"] if not root.startswith("_sysconfigdata")}  # a file of Python's own
    assert roots <= ALLOWED
    assert not told["cuda"]
    seconds = [told["seconds"]]
    while min(seconds) >= 3 and len(seconds) < 5:  # a busy machine may be slow once
        seconds.append(imported(module)["seconds"])
    assert min(seconds) < 3, f"beyond torch's own import: {seconds}"


def test_a_bare_machine_collects_every_test():
    """As `make gpu-check` does, after which tests that want more are skipped."""
    pytest.importorskip("pytest_benchmark")
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-c", COLLECT.format(bare=BARE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "test_any_choices" not in done.stdout and "test_speed" in done.stdout
