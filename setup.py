"""Builds the CUDA extension through CMake where nvcc is found; else the package is pure Python.

DIFFMOE_BUILD_CUDA=0 leaves it out, =1 asks for it: without nvcc the build then fails. CUDACXX, or CUDA_HOME, names an
nvcc that is not on the PATH; CMAKE_ARGS is given to CMake.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()


def find_nvcc() -> str | None:
    """CUDACXX, CUDA_HOME's or the PATH's, whether or not it works: a broken one should fail, not be passed over."""
    if named := os.environ.get("CUDACXX"):
        return named
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (nvcc := Path(home, "bin", "nvcc")).exists():
        return str(nvcc)
    return shutil.which("nvcc")


def pure(reason: str) -> list[Extension]:
    """Prints why the build is pure Python; no extension."""
    print(f"diffmoe-kernels: pure Python, {reason}", file=sys.stderr)
    return []


def extensions() -> list[Extension]:
    wanted = os.environ.get("DIFFMOE_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"DIFFMOE_BUILD_CUDA: expected 0, 1 or nothing, got {wanted!r}")
    if wanted == "0":
        return pure("since DIFFMOE_BUILD_CUDA=0")
    if find_nvcc() is None:
        if wanted == "1":
            raise SystemExit(
                "DIFFMOE_BUILD_CUDA=1, and there is no nvcc: put it on the PATH, or set CUDACXX or CUDA_HOME"
            )
        return pure("since there is no nvcc")
    return [Extension("diffmoe_kernels._C", sources=[])]


class Build(build_py):
    """Removes, in an editable install without the extension, a stale `_C` that would still be imported."""

    def run(self) -> None:
        super().run()
        if self.editable_mode and not self.distribution.ext_modules:
            (ROOT / "diffmoe_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)


def path_of_tools() -> str:
    """The PATH, the packages cmake and ninja that pip brought for the build before it, what lies by Python after it."""
    folders = []
    for module, folder in (("cmake", "CMAKE_BIN_DIR"), ("ninja", "BIN_DIR")):
        with contextlib.suppress(ImportError, AttributeError):
            folders.append(getattr(importlib.import_module(module), folder))
    return os.pathsep.join([*folders, os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])


class CMakeBuild(build_ext):
    """One CMake project; its target is the extension."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        folder = Path(self.build_temp).resolve() / "cmake"
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{folder}",
            "-GNinja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_CUDA_COMPILER={find_nvcc()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        shutil.rmtree(folder, ignore_errors=True)  # it may point at another environment's pybind11
        environment = os.environ | {"PATH": path_of_tools()}
        for command in (configure, ["cmake", "--build", str(folder)]):
            subprocess.run(command, env=environment, check=True)


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild, "build_py": Build})
