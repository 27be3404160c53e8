"""Compile the launches of the kernels for a chip that is not there, and read what the compiler made of them.

    python -m tests.kernels.ahead_of_time 90 > report.json

Runs the launchers on meta tensors with a stub in the driver's place, so that what is compiled is what would run: the
same kernels, tiles and specialisations. Must run without TRITON_INTERPRET. Prints one JSON object per launch and line.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TENSOR_CORE = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}  # by compute capability


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled.

    case: which launch it is of.
    kernel: the function's name.
    registers: of a thread.
    warps: of a block.
    local_memory: bytes that a thread keeps there: spilled registers and arrays.
    shared: bytes of shared memory a block.
    matrix_instructions: how many tensor-core instructions of the chip's kind its code has.
    dtype: of the operands.
    widest_load: bits of the widest load from global memory, of a thread.
    loads_in_flight: copies to shared memory that may still be under way where the code waits for one.
    bulk_copies: instructions of the bulk copy engine.
    compiled_as: what Triton keeps the kernel under; the same where a launch needs no other code.
    """

    case: str
    kernel: str
    registers: int
    warps: int
    local_memory: int
    shared: int
    matrix_instructions: int
    dtype: str
    widest_load: int
    loads_in_flight: int
    bulk_copies: int
    compiled_as: str


class StubDriver:
    """Says that a chip of some compute capability is there."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # the compiled kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def is_active(self) -> bool:
        return True


@contextmanager
def recorded_launches(capability: int) -> Iterator[list]:
    """Within it, launches compile and do not run; the list gets (function's name, compiled kernel)."""
    launches: list = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        launches.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **options)))

    driver.set_active(StubDriver(capability))
    JITFunction.run = compile_only
    try:
        yield launches
    finally:
        JITFunction.run = run


def inspect(case: str, name: str, kernel, dtype: torch.dtype) -> Compiled:
    capability = kernel.metadata.target.arch
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    code = kernel.asm["ptx"]
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", code)
    widths = [int(count or 1) * int(bits) for count, bits in loads]
    widths += [8 * int(size, 16) for size in re.findall(r"cp\.async\S+ \[[^]]+\], \[[^]]+\], 0x([0-9a-f]+)", code)]
    return Compiled(
        case=case,
        kernel=name,
        registers=usage["REG"],
        warps=kernel.metadata.num_warps,
        local_memory=usage["STACK"] + usage["LOCAL"],
        shared=kernel.metadata.shared,
        matrix_instructions=len(re.findall(TENSOR_CORE[capability], code)),
        dtype=str(dtype).removeprefix("torch."),
        widest_load=max(widths, default=0),
        loads_in_flight=max((int(n) for n in re.findall(r"cp\.async\.wait_group\s+(\d+)", code)), default=0),
        bulk_copies=len(re.findall(r"cp\.async\.bulk\.tensor", code)),
        compiled_as=kernel.hash,
    )


def main(capability: int, cases: dict[str, tuple[Callable[[], object], torch.dtype]]) -> None:
    for case, (launch, dtype) in cases.items():
        with recorded_launches(capability) as launches:
            launch()
        seen: Counter[str] = Counter()
        for name, kernel in launches:
            seen[name] += 1
            row = inspect(f"{case} {name}" + (f" {seen[name]}" if seen[name] > 1 else ""), name, kernel, dtype)
            print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    from tests.kernels.cases import CASES

    main(int(sys.argv[1]), CASES)
