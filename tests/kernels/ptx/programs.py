"""Programs written by hand, and a launch of one on arrays: what the tests of the emulator are made of."""

from __future__ import annotations

import numpy as np

from tests.kernels.ptx.machine import Machine
from tests.kernels.ptx.memory import GlobalMemory
from tests.kernels.ptx.parse import parse

HEADER = """
.visible .entry kernel({parameters})
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<99>;
    .reg .b32 %f<99>;
    .reg .b64 %d<99>;
    mov.u32 %r90, %tid.x;
    mul.lo.s32 %r91, %r90, 4;
    mul.lo.s32 %r92, %r90, 16;
{pointers}
{body}
    ret;
}}
"""


def run(body: str, *arrays: np.ndarray, threads=32, shared=0, blocks=1, maps: dict | None = None) -> Machine:
    """Has where thread t's 4 bytes of array i are in %d{i}, and of shared memory in %r91; 16 bytes: %d{10 + i}, %r92.

    Arguments that stand for tensor maps follow.
    """
    memory, keys = GlobalMemory(), list(maps or {})
    for one in arrays:
        memory.add(one.ctypes.data, one.nbytes)
    arguments = [*(one.ctypes.data for one in arrays), *keys]
    pointers = [f"ld.param.b64 %d{20 + i}, [kernel_param_{i}];" for i in range(len(arguments))]
    pointers += [f"mad.wide.u32 %d{i}, %r90, 4, %d{20 + i};" for i in range(len(arrays))]
    pointers += [f"mad.wide.u32 %d{10 + i}, %r90, 16, %d{20 + i};" for i in range(len(arrays))]
    parameters = ", ".join(f".param .u64 kernel_param_{i}" for i in range(len(arguments)))
    text = HEADER.format(parameters=parameters, threads=threads, pointers="\n".join(pointers), body=body)
    machine = Machine(parse(text), memory, arguments, shared, maps)
    machine.run((blocks, 1, 1))
    return machine


def kinds(machine: Machine) -> set[str]:
    return {text.split(" (")[0] for text in machine.faults}
