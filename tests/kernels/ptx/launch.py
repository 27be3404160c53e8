"""Launches of Triton's kernels on CPU tensors, compiled for a chip that is not there and run by `Machine`.

Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.kernels.ahead_of_time import StubDriver, on_multiprocessors
from tests.kernels.ptx.copies import TensorMap
from tests.kernels.ptx.machine import Machine
from tests.kernels.ptx.memory import GlobalMemory
from tests.kernels.ptx.parse import parse


@dataclass(frozen=True)
class Launch:
    """One launch as it went.

    kernel: the function's name.
    faults: what went wrong and at which line of Python, and how many times.
    instructions: how often each was done, by all threads in step.
    wavefronts: of shared memory by a line: cycles, and the fewest that its accesses could take.
    """

    kernel: str
    faults: dict[str, int]
    instructions: dict[str, int]
    wavefronts: dict[str, tuple[int, int]]


@contextmanager
def emulated(
    capability: int, *, multiprocessors: int | None = None, blocks_at_once: int = 16, strict: bool = False
) -> Iterator[list[Launch]]:
    """Within it, launches on CPU tensors run here, as on a chip of some compute capability; the list gets each.

    multiprocessors: that the package is to find on the chip.
    blocks_at_once: how many blocks run in step.
    strict: a launch with faults raises an `AssertionError`.
    """
    launches: list[Launch] = []
    compile_or_run, active = JITFunction.run, driver._active

    def run(self, *args, grid, warmup, **options):
        kernel = compile_or_run(self, *args, grid=grid, warmup=True, **options)
        if warmup:
            return kernel
        bound = {one.name: one.default for one in self.params if one.has_default}
        bound |= dict(zip((one.name for one in self.params), args, strict=False)) | options
        machine = prepare(kernel, bound)
        machine.run((*(grid(bound) if callable(grid) else grid), 1, 1)[:3], blocks_at_once)
        launches.append(Launch(self.fn.__name__, dict(machine.faults), dict(machine.counts), machine.wavefronts))
        if strict and machine.faults:
            raise AssertionError(f"{self.fn.__name__}: {dict(machine.faults)}")
        return kernel

    with ExitStack() as patches:
        if multiprocessors is not None:
            patches.enter_context(on_multiprocessors(multiprocessors))
        patches.enter_context(mock.patch.object(JITFunction, "run", run))
        patches.callback(driver.set_active, active)
        driver.set_active(StubDriver(capability))
        yield launches


def prepare(kernel, bound: dict) -> Machine:
    """A machine with a compiled kernel's arguments, by name, as its code takes them."""
    memory, arguments, maps = GlobalMemory(), [], {}
    described = iter(kernel.metadata.tensordesc_meta or [])
    for kind, value in flattened((kind, bound[name]) for name, kind in kernel.src.signature.items()):
        if kind == "constexpr":
            continue
        if kind.startswith("tensordesc"):
            key = 0x7F00_0000_0000 + 128 * len(maps)
            maps[key] = tensor_map(value, next(described))
            arguments += [key, *value.shape, *value.strides]
            value = value.base
        elif kind.startswith("*"):
            arguments.append(value.data_ptr())
        else:
            arguments.append(float(value) if kind.startswith("fp") else int(value))
            continue
        storage = value.untyped_storage()
        memory.add(storage.data_ptr(), storage.nbytes())
    if kernel.metadata.global_scratch_size:
        raise NotImplementedError("scratch in global memory")
    arguments += [0, 0]  # what Triton adds: that, and for its profiler
    return Machine(parse(kernel.asm["ptx"]), memory, arguments, kernel.metadata.shared, maps)


def flattened(arguments: Iterable[tuple[Any, Any]]) -> Iterator[tuple[str, Any]]:
    """Kinds and values of arguments, those of tuples one by one."""
    for kind, value in arguments:
        if isinstance(kind, tuple):
            yield from flattened(zip(kind, value, strict=True))
        else:
            yield kind, value


def tensor_map(descriptor, meta: dict) -> TensorMap:
    size = descriptor.base.element_size()
    return TensorMap(
        pointer=descriptor.base.data_ptr(),
        size=size,
        shape=list(descriptor.shape),
        strides=[size * stride for stride in descriptor.strides],
        box=list(meta["block_size"]),
        row=16 << meta["swizzle"],
    )
