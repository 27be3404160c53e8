"""Compile the launches of the kernels for a chip that is not there, and read what the compiler made of them.

    python -m tests.kernels.ahead_of_time 90 > report.json

Runs the launchers on meta tensors with a stub in the driver's place, so that what is compiled is what would run: the
same kernels, tiles and specialisations. Must run without TRITON_INTERPRET. Prints one JSON object per launch and line.
"""

from __future__ import annotations

import functools
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
    serialized: whether ptxas says that it runs warp-group products one by one; on sm_90.
    hazards: instructions that touch registers of a warp-group product which is under way, and are no such product; on
        sm_90.
    instructions: of its machine code outside of loops, then in each loop but not in one within it, innermost first; on
        sm_90, where it has products of warp groups.
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
    serialized: bool
    hazards: list[str]
    instructions: list[int]
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
    by_groups = capability == 90 and "wgmma" in kernel.asm["ptx"]
    report, listing = read_machine_code(kernel.asm["cubin"], by_groups)
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
        serialized=by_groups and is_serialized(code),
        hazards=find_hazards(listing),
        instructions=count_instructions(listing) if listing else [],
        compiled_as=kernel.hash,
    )


def run_tool(name: str, *arguments: str) -> str:
    result = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


@functools.cache  # launches of one kernel share its code
def read_machine_code(cubin: bytes, listed: bool) -> tuple[str, str]:
    """What it uses, and its listing if that is asked for."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = run_tool("nvdisasm", "-c", file.name) if listed else ""
        return run_tool("cuobjdump", "-res-usage", file.name), listing


@functools.cache
def is_serialized(code: str) -> bool:
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(code)
        file.flush()
        return "wgmma.mma_async instructions are serialized" in run_tool(
            "ptxas", "-v", "--gpu-name=sm_90a", "--output-file=/dev/null", file.name
        )


INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*(\w+)(\S*)(.*);")
WRITES_NOTHING = ("ST", "RED", "BAR", "SYNCS", "WARPGROUP", "BRA", "LDGSTS", "UTMALDG")


def find_hazards(listing: str) -> list[str]:
    """As `Compiled.hazards` has them: reads and writes of sums, and writes of factors, before the wait for a product.

    PTX leaves the first to the compiler that wrote it, who moves sums about before their wait; of the second ptxas has
    been guilty itself (triton-lang/triton#11781).
    """
    sums: set[int] = set()
    factors: set[int] = set()
    found = []
    for name, kind, operands in INSTRUCTION.findall(listing):
        if name == "HGMMA":
            columns = int(kind.split("x")[1])
            first, second = re.match(r" R(\d+), (?:R(\d+)|gdesc)", operands).groups()
            sums |= {int(first) + i for i in range(columns // 2)}
            factors |= {int(second) + i for i in range(4)} if second else set()
        elif name == "WARPGROUP" and "DEPBAR" in kind:
            if operands.endswith(("0x0 ", "0x0")):
                sums, factors = set(), set()
        else:
            width = 4 if "128" in kind or ".4" in kind else 2 if "64" in kind or "WIDE" in kind or ".2" in kind else 1
            numbers = [(int(number), 2 if wide else 1) for number, wide in re.findall(r"\bR(\d+)(\.64)?", operands)]
            target = re.match(r" R(\d+)", operands)
            written = set()
            if target and not name.startswith(WRITES_NOTHING):
                written = {int(target[1]) + i for i in range(width)}
            if (written | {number + i for number, wide in numbers for i in range(wide)}) & sums or written & factors:
                found.append(f"{name}{kind}{operands}")
    return found


def count_instructions(listing: str) -> list[int]:
    """As `Compiled.instructions` has them. A loop is what lies between a jump back and where it goes."""
    labels: dict[str, int] = {}
    ends: dict[int, int] = {}  # of a loop, by where it begins
    count = 0
    for line in listing.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = count
        elif found := INSTRUCTION.match(line):
            goal = re.search(r"\.L_\w+", found[3])
            if found[1] == "BRA" and goal and labels.get(goal[0], count) < count:
                ends[labels[goal[0]]] = count + 1
            count += found[1] != "NOP"
    spans = sorted(ends.items(), key=lambda span: span[1] - span[0])
    places = [set(range(*span)) for span in spans]
    own = [here.difference(*(one for one in places[:i] if one <= here)) for i, here in enumerate(places)]
    return [count - len(set().union(*places)), *map(len, own)]


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
