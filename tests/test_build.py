"""The build of the CUDA extension: when it is made, what it says where it is not, and what the compiler makes of it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc")


def is_installed(module: str) -> bool:
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.util.find_spec(module) is not None
    return False


CAN_BUILD = all(shutil.which(name) or is_installed(name) for name in ("cmake", "ninja"))
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")


def setup(
    *words: str,
    folder: Path,
    before: Callable[[], object] = lambda: None,
    python: str = sys.executable,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Runs a copy of setup.py, so that nothing is left in the checkout; ``before`` runs when the copy is there."""
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "diffmoe_kernels", "models"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    before()
    ours = ("CUDA_HOME", "CUDA_PATH", "CUDACXX", "DIFFMOE_BUILD_CUDA", "CMAKE_ARGS")
    known = {key: value for key, value in os.environ.items() if key not in ours}
    command = [python, "setup.py", "-q", *words]
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


def broken(program: str, folder: Path) -> Path:
    """A program of that name that fails, in a folder that is made for it."""
    path = folder / "bin" / program
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{program}: no licence' >&2\nexit 1\n")
    path.chmod(0o755)
    return path


@pytest.mark.skipif(not CAN_BUILD, reason="needs cmake and ninja")
def test_a_broken_nvcc_fails(tmp_path) -> None:
    done = setup("build", folder=tmp_path, CUDACXX=str(broken("nvcc", tmp_path)))
    assert done.returncode != 0 and not libraries(tmp_path)
    assert "CMAKE_CUDA_COMPILER" in done.stdout + done.stderr or "CUDA compiler" in done.stdout + done.stderr


@pytest.mark.skipif(not all(map(is_installed, ("cmake", "ninja"))), reason="needs the packages cmake and ninja")
def test_the_cmake_that_was_installed_for_the_build_comes_before_the_machines(tmp_path) -> None:
    """Even before one that lies beside the interpreter, as in /usr/bin."""
    nvcc, cmake = broken("nvcc", tmp_path), broken("cmake", tmp_path)
    python = cmake.with_name("python")
    python.symlink_to(sys.executable)
    environment = {"PATH": f"{cmake.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = setup("build", folder=tmp_path, python=str(python), CUDACXX=str(nvcc), **environment)
    assert "cmake: no licence" not in done.stderr
    assert "CXX compiler identification" in done.stdout


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.skipif(not CAN_BUILD or not is_installed("pybind11"), reason="needs cmake, ninja and pybind11")
def test_a_source_distribution_holds_all_that_its_build_reads(tmp_path) -> None:
    """It is configured; ninja says what it would do, and that no source is missing."""

    def add_tests() -> None:  # setuptools would take tests/test*.py
        (tmp_path / "tests").mkdir()
        (tmp_path / "tests" / "test_it.py").touch()

    done = setup("sdist", folder=tmp_path, before=add_tests, DIFFMOE_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("dist/*.tar.gz")
    with tarfile.open(archive) as packed:
        names = [name.partition("/")[2] for name in packed.getnames()]
        packed.extractall(tmp_path / "unpacked", filter="data")
    assert "diffmoe_kernels/measured.json" in names
    assert not [name for name in names if name.startswith("tests") or name.endswith(".so")]
    (source,) = (tmp_path / "unpacked").iterdir()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path}
    for command in (
        ["cmake", "-B", "build", "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"],
        ["ninja", "-C", "build", "-n"],
    ):
        done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    pip += ["--target", tmp_path / "installed", archive]
    done = subprocess.run(pip, env=environment | {"DIFFMOE_BUILD_CUDA": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    command = [sys.executable, "-c", "import diffmoe_kernels; print(diffmoe_kernels.__file__)"]
    told = subprocess.run(
        command, cwd=tmp_path / "installed", env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert Path(told.strip()) == tmp_path / "installed" / "diffmoe_kernels" / "__init__.py"


@pytest.mark.skipif(not CAN_BUILD or not is_installed("pybind11"), reason="needs cmake, ninja and pybind11")
@needs_nvcc
def test_architectures(tmp_path) -> None:
    """All, or those that are asked for, in one folder after another."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    every = {"sm_80", "sm_90a", "sm_100a", "compute_100"}  # the last is PTX, which later chips compile
    for asked, expected in (([], every), (["-DCMAKE_CUDA_ARCHITECTURES=86-real"], {"sm_86"})):
        subprocess.run([*command, *asked], env=os.environ | {"PATH": path}, capture_output=True, check=True)
        rules = (tmp_path / "build.ninja").read_text()
        assert set(re.findall(r"code=\[?((?:sm|compute)_\w+)", rules)) == expected


def test_the_extension_in_place_goes_with_an_install_of_pure_python_in_place_alone(tmp_path) -> None:
    """Another install, or a question for the version, may be of another environment."""
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    for words, kept in (("--version", True), ("bdist_wheel", True), ("editable_wheel", False)):
        (tmp_path / words).mkdir()
        built = tmp_path / words / "diffmoe_kernels" / name
        done = setup(words, folder=tmp_path / words, before=lambda built=built: built.touch(), DIFFMOE_BUILD_CUDA="0")
        assert done.returncode == 0, done.stderr
        assert built.exists() == kept, words


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The extension: the installed one, where it is newer than its sources and of every generation; else built here."""
    sources = [ROOT / "CMakeLists.txt", ROOT / "setup.py", *(ROOT / "csrc").iterdir()]
    newest = max(source.stat().st_mtime for source in sources)
    for installed in (ROOT / "diffmoe_kernels").glob(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"):
        if installed.stat().st_mtime > newest and set(resources(installed)) == set(ARCHITECTURES):
            return installed
    if NVCC is None or not CAN_BUILD or not is_installed("pybind11"):
        pytest.skip("needs an installed extension, or nvcc, cmake, ninja and pybind11")
    folder = tmp_path_factory.mktemp("build")
    done = setup("build", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = libraries(folder / "build")
    return built


def tool() -> Path:
    """cuobjdump, as Triton brings it."""
    return Path(pytest.importorskip("triton.backends.nvidia").__path__[0], "bin", "cuobjdump")


def resources(binary: Path) -> dict[str, dict[str, int]]:
    """Architecture -> kernel -> bytes that a thread keeps in memory of its own: spills and arrays."""
    report = subprocess.run([tool(), "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    found: dict[str, dict[str, int]] = {}
    for part in report.split("\narch = ")[1:]:
        kernels = re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", part)
        if kernels:  # else it is PTX
            sizes = {name: int(stack) + int(local) for name, stack, local in kernels}
            found.setdefault(part.split()[0], {}).update(sizes)
    return found


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills_or_keeps_an_array_in_local_memory(library, architecture) -> None:
    kernels = resources(library)[architecture]
    assert len(kernels) > 50
    assert {name: size for name, size in kernels.items() if size} == {}


@needs_nvcc
def test_a_spill_is_seen(tmp_path) -> None:
    """Of 65 numbers that 24 registers are to hold."""
    source, binary = tmp_path / "spill.cu", tmp_path / "spill.fatbin"
    source.write_text("""__global__ void spill(float* x) {
      float y[65], sum = 0;
      for (int i = 0; i < 65; ++i) y[i] = x[i * blockDim.x];
      __syncthreads();
      for (int i = 0; i < 65; ++i) sum += y[i] * y[64 - i];
      x[0] = sum;
    }""")
    subprocess.run([NVCC, "-fatbin", "-arch=sm_90a", "-maxrregcount=24", source, "-o", binary], check=True)
    assert resources(binary)["sm_90a"]["_Z5spillPf"] > 0


@needs_nvcc
def test_loads_of_16_bytes_are_in_flight_together(library) -> None:
    """Of bfloat16 rows: four before the first sum or product that waits for one, and in the gather three."""
    for part, before, wanted in (
        ("unpermute_fwd_kernelINS_8BFloat16ELi8ELb1", "FFMA", 4),
        ("unpermute_bwd_kernelINS_8BFloat16ELi8", "FFMA", 8),
        ("permute_fwd_kernelINS_3VecINS_8BFloat16ELi8", "STG", 3),
    ):
        code = machine_code(library, part)
        loads = re.split(rf"\b{before}\b", code[code.index("LDG.E.128") :])[0].count("LDG.E.128")
        assert loads >= wanted, f"{part}: {loads}"


@needs_nvcc
def test_keys_of_a_thread_are_in_flight_together(library) -> None:
    """All 16 that it keeps, before the first is asked whether it is NaN."""
    code = machine_code(library, "token_drop_cut_kernelIffE")
    assert max(part.count("LDG") for part in code.split("FSETP")) >= 16


def machine_code(library: Path, part: str) -> str:
    """Of the one kernel for sm_90a with that in its name."""
    (name,) = (name for name in resources(library)["sm_90a"] if part in name)
    command = [tool(), "-sass", "-arch", "sm_90a", "-fun", name, library]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


SCRIPT = """
import diffmoe_kernels as d
print(d.available_backends()["cuda"])
try:
    d.cuda_support.extension.permute_fwd(0, 0, 0, 0, 3, 5, 8, 0, 0)
except RuntimeError as error:
    print(error)
"""


@needs_nvcc
def test_it_loads_where_there_is_no_device(library) -> None:
    """It says so, and a launch that fails names the kernel and its arguments."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", SCRIPT]
    folder = library.parents[1]
    told = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
    status, error = told.splitlines()
    assert re.fullmatch("built, no device: .+", status)
    assert re.match(r"kernel permute_fwd\(\S+, \S+, \S+, \S+, 3, 2\) on a grid of 1 blocks of 256 threads: cuda", error)


def test_a_wheel_without_it_is_for_every_machine(tmp_path) -> None:
    pytest.importorskip("setuptools")
    done = setup("bdist_wheel", folder=tmp_path, DIFFMOE_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert [path.name.split("-", 2)[2] for path in tmp_path.glob("dist/*.whl")] == ["py3-none-any.whl"]
