"""`pytest --emulate 90`: a run whose Triton kernels are compiled for a chip that is not there, and emulated."""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Callable
from importlib import import_module


def start(capability: int) -> Callable[[], None]:
    """From here on launches on CPU tensors run as on such a chip, and raise where one has faults; what ends that.

    For the package the kernels are interpreted, so that it takes CPU tensors, with that chip's tiles.
    """
    os.environ.pop("TRITON_INTERPRET", None)  # of the process: Triton reads it where a kernel is defined
    import diffmoe_kernels
    from tests.kernels.ptx.launch import emulated

    for found in pkgutil.walk_packages(diffmoe_kernels.__path__, "diffmoe_kernels."):
        if found.name == "diffmoe_kernels._C":
            continue
        module = import_module(found.name)
        if hasattr(module, "INTERPRETED"):
            module.INTERPRETED = True
        if hasattr(module, "chip_generation"):
            module.chip_generation = lambda: capability
    launches = emulated(capability, strict=True)
    launches.__enter__()
    return lambda: launches.__exit__(None, None, None)
