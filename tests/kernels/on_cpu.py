"""Builds the CUDA extension for a CPU, where `cuda_on_cpu.h` runs its kernels, and puts it in the real one's place."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
LAUNCHER = Path(__file__).with_name("cuda_on_cpu.h")
NAME = "diffmoe_kernels._C"
FLAGS = (
    "-std=c++20",
    "-O1",
    "-g1",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    # An index past the end of a shared array ends the process: in the emulator another array may lie there.
    "-fsanitize=bounds",
    "-fsanitize-undefined-trap-on-error",
    "-DDIFFMOE_ON_CPU",
    "-Wall",
    "-Werror",
    "-Wno-unknown-pragmas",
)


def why_not() -> str | None:
    """Why it can't be built here, or None."""
    if shutil.which("g++") is None:
        return "needs g++"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "needs pybind11"
    return None


def build() -> Path:
    """The extension's file, compiled where the sources, the flags or the interpreter have changed.

    Raises:
        RuntimeError: g++ fails; with what it says.
    """
    import pybind11

    sources = [SOURCES / "bindings.cpp", *sorted(SOURCES.glob("*.cu"))]
    headers = [LAUNCHER, *sorted(SOURCES.glob("*.h")), *sorted(SOURCES.glob("*.cuh"))]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    known = hashlib.sha256("\n".join([*FLAGS, suffix, pybind11.__version__]).encode())
    for path in (*sources, *headers):
        known.update(path.read_bytes())
    target = ROOT / "build" / "on_cpu" / known.hexdigest()[:16] / f"_C{suffix}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", "-include", str(LAUNCHER)]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made, objects = Path(folder, target.name), [Path(folder, f"{source.name}.o") for source in sources]
        commands = [
            ["g++", *FLAGS, *includes, "-c", "-x", "c++", source, "-o", one]
            for source, one in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        _run(["g++", *FLAGS, *objects, "-o", made])
        os.replace(made, target)  # at once, should another process build it too
    return target


def _run(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")


def install() -> ModuleType:
    """Loads it as `diffmoe_kernels._C`; before that package is imported."""
    spec = importlib.util.spec_from_file_location(NAME, build())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    return module
