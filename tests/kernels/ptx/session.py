"""`pytest --emulate 90`: a run whose kernels are compiled for a chip that is not there, and emulated."""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from types import ModuleType


def start(capability: int, extension: ModuleType | None) -> Callable[[], None]:
    """From here on launches on CPU tensors run as on such a chip, and raise where one has faults; what ends that.

    For the package Triton's kernels are interpreted, so that it takes CPU tensors, with that chip's tiles.

    extension: built for a CPU; its kernels, too, where there is nvcc.
    """
    os.environ.pop("TRITON_INTERPRET", None)  # of the process: Triton reads it where a kernel is defined
    import diffmoe_kernels
    from tests.kernels.ptx import cuda
    from tests.kernels.ptx.launch import emulated

    for found in pkgutil.walk_packages(diffmoe_kernels.__path__, "diffmoe_kernels."):
        if found.name == "diffmoe_kernels._C":
            continue
        module = import_module(found.name)
        if hasattr(module, "INTERPRETED"):
            module.INTERPRETED = True
        if hasattr(module, "chip_generation"):
            module.chip_generation = lambda: capability
    running = ExitStack()
    running.enter_context(emulated(capability, strict=True))
    if extension is not None and cuda.why_not() is None:
        running.callback(cuda.emulate(extension, capability))
    return running.close
