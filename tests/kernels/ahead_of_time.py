"""Compile the launches of the kernels for a chip that is not there, and read what the compiler made of them.

    python -m tests.kernels.ahead_of_time 90 > report.json

Runs the launchers on meta tensors with a stub in the driver's place, so that what is compiled is what would run: the
same kernels, tiles and specialisations. Must run without TRITON_INTERPRET. Prints one JSON object per launch and line.
"""

from __future__ import annotations

import functools
import io
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

LOGS: dict[str, str] = {}  # of ptxas, by the kernel's hash
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
    older_matrix_instructions: tensor-core instructions of sm_80's kind, one warp's.
    atomics: read-modify-write instructions on global memory, whose order no run repeats.
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
    older_matrix_instructions: int
    atomics: int
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
def on_multiprocessors(count: int) -> Iterator[None]:
    """Within it the package finds so many on the chip."""
    modules = [one for name, one in sys.modules.items() if name.startswith("diffmoe_kernels.")]
    with ExitStack() as patches:
        for module in modules:
            if hasattr(module, "multiprocessors"):
                patches.enter_context(mock.patch.object(module, "multiprocessors", lambda device: count))
        yield


@contextmanager
def recorded_launches(capability: int) -> Iterator[list]:
    """Within it, launches compile and do not run; the list gets (function's name, compiled kernel, ptxas's log)."""
    launches: list = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        printed = io.StringIO()
        with redirect_stdout(printed):
            kernel = run(self, *args, grid=grid, warmup=True, **options)
        log = LOGS.setdefault(kernel.hash, printed.getvalue())  # printed once, when it is compiled
        launches.append((self.fn.__name__, kernel, log))

    driver.set_active(StubDriver(capability))
    JITFunction.run = compile_only
    try:
        with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), on_multiprocessors(132):
            triton.knobs.nvidia.dump_ptxas_log = True
            triton.knobs.compilation.always_compile = True  # whatever is on disk
            yield launches
    finally:
        JITFunction.run = run


def inspect(case: str, name: str, kernel, log: str, dtype: torch.dtype) -> Compiled:
    capability, code = kernel.metadata.target.arch, kernel.asm["ptx"]
    by_groups = capability == 90 and "wgmma" in code
    frames = [int(size) for size in re.findall(r"(\d+) bytes stack frame", log)]
    if not frames:
        raise ValueError(f"{case}: ptxas said nothing of its stack: {log!r}")
    listing = disassemble(kernel.asm["cubin"]) if by_groups else ""
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", code)
    widths = [int(count or 1) * int(bits) for count, bits in loads]
    widths += [8 * int(size, 16) for size in re.findall(r"cp\.async\S+ \[[^]]+\], \[[^]]+\], 0x([0-9a-f]+)", code)]
    return Compiled(
        case=case,
        kernel=name,
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        warps=kernel.metadata.num_warps,
        local_memory=sum(frames),
        shared=kernel.metadata.shared,
        matrix_instructions=len(re.findall(TENSOR_CORE[capability], code)),
        dtype=str(dtype).removeprefix("torch."),
        widest_load=max(widths, default=0),
        loads_in_flight=max((int(n) for n in re.findall(r"cp\.async\.wait_group\s+(\d+)", code)), default=0),
        bulk_copies=len(re.findall(r"cp\.async\.bulk\.tensor", code)),
        older_matrix_instructions=len(re.findall(TENSOR_CORE[80], code)),
        atomics=len(re.findall(r"\b(?:atom|red)\.(?!shared)", code)),
        serialized="wgmma.mma_async instructions are serialized" in log,
        hazards=find_hazards(listing),
        instructions=count_instructions(listing) if listing else [],
        compiled_as=kernel.hash,
    )


def run_tool(name: str, *arguments: str) -> str:
    result = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


@functools.cache  # launches of one kernel share its code
def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return run_tool("nvdisasm", "-c", "-ndf", file.name)


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
            is_wide = "64" in kind and name != "SHF"  # which reads 64 bits and writes half of them
            width = 4 if "128" in kind or ".4" in kind else 2 if is_wide or "WIDE" in kind or ".2" in kind else 1
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
        for name, kernel, log in launches:
            seen[name] += 1
            row = inspect(f"{case} {name}" + (f" {seen[name]}" if seen[name] > 1 else ""), name, kernel, log, dtype)
            print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    from tests.kernels.cases import CASES

    main(int(sys.argv[1]), CASES)
