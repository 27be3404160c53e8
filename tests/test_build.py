"""The build of the CUDA extension: when it is made, what it says where it is not, and what the compiler makes of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
KERNELS = sorted(path.name for path in (ROOT / "csrc").glob("*.cu") if "__global__" in path.read_text())


def setup(*words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a copy of setup.py, so that nothing is left in the checkout."""
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "diffmoe_kernels", "models"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    ours = ("CUDA_HOME", "CUDA_PATH", "CUDACXX", "DIFFMOE_BUILD_CUDA", "CMAKE_ARGS")
    known = {key: value for key, value in os.environ.items() if key not in ours}
    command = [sys.executable, "setup.py", "-q", *words]
    return subprocess.run(command, cwd=folder, env=known | environment, capture_output=True, text=True, check=False)


def libraries(folder: Path) -> list[Path]:
    return list(folder.rglob("_C*.so"))


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"DIFFMOE_BUILD_CUDA": "0"}, "pure Python, since DIFFMOE_BUILD_CUDA=0"),
        ({"PATH": ""}, "pure Python, since there is no nvcc"),
    ],
)
def test_pure_python_and_one_line_that_says_so(environment, told, tmp_path) -> None:
    done = setup("build", folder=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "diffmoe-kernels" in line] == [f"diffmoe-kernels: {told}"]
    assert not libraries(tmp_path) and (tmp_path / "build/lib/diffmoe_kernels/cuda_support.py").exists()


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"DIFFMOE_BUILD_CUDA": "1", "PATH": ""}, "there is no nvcc: put it on the PATH, or set CUDACXX or CUDA_HOME"),
        ({"DIFFMOE_BUILD_CUDA": "yes"}, "DIFFMOE_BUILD_CUDA: expected 0, 1 or nothing, got 'yes'"),
    ],
)
def test_what_cannot_be_asked_for(environment, told, tmp_path) -> None:
    done = setup("build", folder=tmp_path, **environment)
    assert done.returncode != 0 and told in done.stderr


@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("ninja") is None, reason="needs cmake and ninja")
def test_a_broken_nvcc_fails(tmp_path) -> None:
    broken = tmp_path / "bin" / "nvcc"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho 'no licence' >&2\nexit 1\n")
    broken.chmod(0o755)
    done = setup("build", folder=tmp_path, CUDACXX=str(broken))
    assert done.returncode != 0 and not libraries(tmp_path)
    assert "CMAKE_CUDA_COMPILER" in done.stdout + done.stderr or "CUDA compiler" in done.stdout + done.stderr


def resources(output: str) -> Iterator[tuple[str, int, int]]:
    """Of each kernel in what ``ptxas -v`` tells: its name, and its bytes of stack and of spills."""
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill"
    for name, stack, stores, loads in re.findall(pattern, output, re.DOTALL):
        yield name, int(stack), int(stores) + int(loads)


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100a"])
@pytest.mark.parametrize("source", KERNELS)
def test_no_kernel_spills_or_keeps_an_array_in_local_memory(source, architecture, tmp_path) -> None:
    command = [NVCC, "-std=c++17", "-cubin", f"-arch={architecture}", "-Xptxas", "-v"]
    path = ROOT / "csrc" / source
    done = subprocess.run(
        [*command, str(path), "-o", str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    found = list(resources(done.stderr))
    assert len(found) == done.stderr.count("Compiling entry function") >= 3
    assert [one for one in found if one[1] or one[2]] == []


@needs_nvcc
def test_loads_of_16_bytes_are_in_flight_together(tmp_path) -> None:
    """Of bfloat16 rows: four before the first sum or product that waits for one, and in the gather three."""
    nvidia = pytest.importorskip("triton.backends.nvidia")
    disassembler = Path(nvidia.__path__[0], "bin", "cuobjdump")
    cubin = tmp_path / "out"
    subprocess.run(
        [NVCC, "-std=c++17", "-cubin", "-arch=sm_90a", str(ROOT / "csrc/permute.cu"), "-o", cubin], check=True
    )
    listing = subprocess.run([disassembler, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    kernels = {part.split("\n", 1)[0]: part for part in listing.split("Function : ")[1:]}
    for name, before, wanted in (
        ("gather_sum_kernelINS_8BFloat16ELi8ELb1", "FFMA", 4),
        ("unpermute_backward_kernelINS_8BFloat16ELi8", "FFMA", 8),
        ("gather_kernelINS_3RunINS_8BFloat16ELi8", "STG", 3),
    ):
        (code,) = (code for key, code in kernels.items() if name in key)
        loads = re.split(rf"\b{before}\b", code[code.index("LDG.E.128") :])[0].count("LDG.E.128")
        assert loads >= wanted, f"{name}: {loads}"


def test_the_report_of_a_spill_is_read() -> None:
    output = """ptxas info    : Compiling entry function '_Z1k' for 'sm_80'
ptxas info    : Function properties for _Z1k
    8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 32 registers"""
    assert list(resources(output)) == [("_Z1k", 8, 16)]


SCRIPT = """
import diffmoe_kernels as d
print(d.available_backends()["cuda"])
try:
    d.cuda_support.extension.gather(0, 0, 0, 0, 3, 5, 8, 0, 0)
except RuntimeError as error:
    print(error)
"""


@needs_nvcc
@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("ninja") is None, reason="needs cmake and ninja")
def test_the_build(tmp_path) -> None:
    """It loads where there is no device, says so, and a launch that fails names the kernel and its arguments."""
    pytest.importorskip("pybind11")
    done = setup("build", folder=tmp_path, CMAKE_ARGS="-DDIFFMOE_ARCHITECTURES=90a-real")
    assert done.returncode == 0, done.stdout + done.stderr
    (library,) = libraries(tmp_path / "build")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", SCRIPT]
    folder = library.parents[1]
    told = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
    status, error = told.splitlines()
    assert re.fullmatch("built, no device: .+", status)
    assert re.match(r"kernel gather\(\S+, \S+, \S+, \S+, 3, 2\) on a grid of 1 blocks of 256 threads: cuda", error)


def test_a_wheel_without_it_is_for_every_machine(tmp_path) -> None:
    pytest.importorskip("setuptools")
    done = setup("bdist_wheel", folder=tmp_path, DIFFMOE_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert [path.name.split("-", 2)[2] for path in tmp_path.glob("dist/*.whl")] == ["py3-none-any.whl"]
