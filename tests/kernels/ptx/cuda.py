"""Launches of the CUDA extension's kernels, as nvcc compiles them for a chip that is not there, run by `Machine`.

The build for a CPU of `tests/kernels/on_cpu.py` hands its launches over: which kernel, and the bytes of its arguments.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from tests.kernels.on_cpu import ROOT, SOURCES
from tests.kernels.ptx.machine import Machine
from tests.kernels.ptx.memory import GlobalMemory
from tests.kernels.ptx.parse import kernels, parse

OPTIONS = ("-ptx", "-std=c++17", "-lineinfo")


def why_not() -> str | None:
    return "needs nvcc" if shutil.which("nvcc") is None else None


def emulate(extension, capability: int) -> Callable[[], None]:
    """From here on the extension's launches run here, and raise where one has faults; what ends that."""
    texts, names = compiled(capability), symbols(Path(extension.__file__))
    extension.set_runner(lambda place, *launch: run(texts[names[place]], *launch))
    return lambda: extension.set_runner(None)


def run(text: str, grid: int, threads: int, arguments: list[int]) -> None:
    program, memory = parse(text, threads), GlobalMemory()
    kinds = program.parameters.values()
    values = [as_float(bits) if kind == "f32" else bits for kind, bits in zip(kinds, arguments, strict=True)]
    addresses = [value for kind, value in zip(kinds, values, strict=True) if kind == "u64"]
    for start, size in storages():
        if any(start <= address < start + size for address in addresses):
            memory.add(start, size)
    machine = Machine(program, memory, values)
    machine.run((grid, 1, 1))
    if machine.faults:
        raise AssertionError(f"{program.name}: {dict(machine.faults)}")


def as_float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def storages() -> set[tuple[int, int]]:
    """Where the memory of each tensor that there is begins, and its bytes: of a launch only addresses are known."""
    tensors = [one for one in gc.get_objects() if type(one) in (Tensor, Parameter) and one.device.type == "cpu"]
    found = [one.untyped_storage() for one in tensors if one.layout == torch.strided]
    return {(one.data_ptr(), one.nbytes()) for one in found}


@functools.cache
def compiled(capability: int) -> dict[str, str]:
    """The PTX of each kernel, by its name in C++; kept in ``build`` until the sources change."""
    sources = sorted(SOURCES.glob("*.cu"))
    known = hashlib.sha256(f"{OPTIONS} {capability} {subprocess.check_output(['nvcc', '--version'])}".encode())
    for path in (*sources, *sorted(SOURCES.glob("*.h")), *sorted(SOURCES.glob("*.cuh"))):
        known.update(path.read_bytes())
    folder = ROOT / "build" / "ptx" / known.hexdigest()[:16]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as parent:
            made = Path(parent, "ptx")
            made.mkdir()
            arch = f"-arch=compute_{capability}{'a' if capability == 90 else ''}"
            jobs = [
                subprocess.Popen(["nvcc", *OPTIONS, arch, str(path), "-o", f"{made}/{path.stem}.ptx"])
                for path in sources
            ]
            if any([job.wait() for job in jobs]):
                raise RuntimeError("nvcc fails")
            with contextlib.suppress(OSError):  # another process was first
                made.rename(folder)
    texts: dict[str, str] = {}
    for path in folder.glob("*.ptx"):
        texts |= kernels(path.read_text())
    listed = subprocess.run(["c++filt"], input="\n".join(texts), capture_output=True, text=True, check=True)
    return dict(zip(map(plain, listed.stdout.splitlines()), texts.values(), strict=True))


def symbols(library: Path) -> dict[int, str]:
    """The names of a library's functions in C++, by where they are."""
    listed = subprocess.run(["nm", "--demangle", str(library)], capture_output=True, text=True, check=True)
    return {
        int(at, 16): plain(name) for at, name in re.findall(r"^([0-9a-f]+) [tTwW] (.+)$", listed.stdout, re.MULTILINE)
    }


def plain(name: str) -> str:
    """Without what nvcc names a file's own namespace by."""
    return re.sub(r"_GLOBAL__N_\w*|\(anonymous namespace\)", "-", name)
