"""Runs PTX on the CPU: all threads of several blocks in step, a register being an array over them."""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import contextmanager

import numpy as np

# These four say what does which instruction.
from tests.kernels.ptx import arithmetic, copies, products, warps  # noqa: F401
from tests.kernels.ptx.memory import Fault, GlobalMemory, SharedMemory, wavefronts
from tests.kernels.ptx.parse import Address, Instruction, Not, Number, Operand, Program, Register, Symbol
from tests.kernels.ptx.table import Active, find
from tests.kernels.ptx.values import SIGNED, TYPES, UNSIGNED
from tests.kernels.ptx.waiting import Queue

JUMPS = {"bra", "bra.uni", "ret", "exit"}


class Machine:
    """One launch. What threads do that the language leaves open, or that goes wrong on the chip, is in ``faults``.

    arguments: of the kernel, in order. shared: bytes of shared memory a block. maps: tensor maps, by the argument that
    stands for one.

    faults: how many times each, by what it is and where.
    counts: of instructions, those that all threads do in step as one.
    wavefronts: of accesses to shared memory by a line: cycles, and the fewest they could take; one warp of each run.

    The threads that are furthest behind in the program go first, until they meet others. Blocks run ``at_once`` many at
    a time and then the next: one that waits for another's result in global memory would wait for ever.
    """

    def __init__(
        self, program: Program, memory: GlobalMemory, arguments: list, shared: int = 0, maps: dict | None = None
    ) -> None:
        self.program, self.memory, self.maps = program, memory, maps or {}
        self.shared_size = program.shared_size + shared
        self.arguments = dict(zip(program.parameters, arguments, strict=True))
        self.faults: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.wavefronts: dict[str, tuple[int, int]] = {}
        self.actions = [self.action(ins) for ins in program.instructions]
        stores = [ins.parts[-1] for ins in program.instructions if ins.parts[:2] == ["st", "shared"]]
        self.granule = min([4, *(TYPES[kind].itemsize for kind in stores)])
        self.source = ""

    def action(self, ins: Instruction):
        action = find(ins.name)
        if action is None and ins.name not in JUMPS:
            raise NotImplementedError(f"{ins.text} ({ins.source})")
        return action

    def run(self, grid: tuple[int, int, int], at_once: int = 16) -> None:
        blocks = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        try:
            with np.errstate(all="ignore"):
                for start in range(0, len(blocks), at_once):
                    self.run_blocks(blocks[start : start + at_once], grid)
        except Fault as fault:
            self.fault(str(fault))

    def fault(self, text: str, count: int = 1) -> None:
        self.faults[f"{text} ({self.source})"] += count

    @contextmanager
    def blaming(self, source: str):
        """Faults within are of that line."""
        now, self.source = self.source, source
        yield
        self.source = now

    # Control flow: groups of threads, where each is in the program.

    def run_blocks(self, blocks: list[tuple[int, int, int]], grid: tuple[int, int, int]) -> None:
        threads, self.num_blocks = self.program.threads, len(blocks)
        self.n = self.num_blocks * threads
        self.block = np.repeat(np.arange(self.num_blocks), threads)
        in_block = np.tile(np.arange(threads, dtype=np.uint32), self.num_blocks)
        self.warp, self.lane = (in_block // 32).astype(np.int8), (in_block % 32).astype(np.int64)
        self.registers = {"%tid.x": in_block, "%laneid": in_block % 32}
        for i, axis in enumerate("xyz"):
            self.registers[f"%ctaid.{axis}"] = np.array([block[i] for block in blocks], np.uint32)[self.block]
            self.registers[f"%nctaid.{axis}"] = np.full(self.n, grid[i], np.uint32)
            self.registers[f"%ntid.{axis}"] = np.full(self.n, threads if i == 0 else 1, np.uint32)
        self.shared = SharedMemory(self.num_blocks, -(-threads // 32), self.shared_size, self.granule, self.fault)
        self.alive = np.ones(self.n, bool)
        self.products, self.copies = Queue(self.num_blocks), Queue(self.num_blocks)
        self.under_way: list[products.Product] = []
        self.mbarriers: dict[tuple[int, int], copies.Mbarrier] = {}
        self.clock = 0
        groups: list[tuple[int, Active]] = [(0, None)]
        while groups:
            first = min(pc for pc, _ in groups)
            here = [mask for pc, mask in groups if pc == first]
            groups = [group for group in groups if group[0] != first]
            mask = here[0] if len(here) == 1 else np.logical_or.reduce(here)
            if mask is not None and mask.all():
                mask = None
            stop = min((pc for pc, _ in groups), default=len(self.program.instructions))
            groups += self.follow(first, mask, stop)
        if self.products.busy or self.copies.busy or any(one.copies for one in self.mbarriers.values()):
            self.fault("ends with copies or products in flight")

    def follow(self, pc: int, mask: Active, stop: int) -> list[tuple[int, Active]]:
        """Runs a group until it parts or reaches ``stop``; what becomes of it."""
        instructions, everyone = self.program.instructions, np.ones(self.n, bool)
        while True:
            ins, action = instructions[pc], self.actions[pc]
            self.clock += 1
            self.counts[opcode(ins)] += 1
            self.source = ins.source
            active = mask
            if ins.guard is not None:
                guard = self.registers[ins.guard]
                guard = ~guard if ins.negated else guard
                active = guard if mask is None else guard & mask
                if active.all():
                    active = None
            if action is None:
                here = everyone if mask is None else mask
                taken = here if active is None else active
                if ins.parts[0] != "bra":
                    self.alive &= ~taken
                    rest = here & ~taken
                    return [(pc + 1, rest)] if rest.any() else []
                if not taken.any():
                    pc += 1
                elif (taken == here).all():
                    pc = ins.target
                else:
                    return [(ins.target, taken), (pc + 1, here & ~taken)]
            else:
                if active is None or active.any():
                    if self.under_way:
                        products.check_sums(self, ins, active)
                    try:
                        action(self, ins, active)
                    except Fault:
                        raise
                    except Exception as error:
                        error.add_note(f"{ins.text} ({ins.source})")
                        raise
                pc += 1
            if pc >= stop:
                return [(pc, everyone if mask is None else mask)]

    def which(self, active: Active) -> np.ndarray:
        return np.arange(self.n) if active is None else np.flatnonzero(active)

    def blocks_of(self, active: Active) -> np.ndarray:
        """Which blocks some threads are of."""
        return np.ones(self.num_blocks, bool) if active is None else active.reshape(self.num_blocks, -1).any(1)

    def warps_of(self, active: Active, members: Operand | None = None) -> np.ndarray:
        """The threads of an instruction that whole warps do."""
        if active is not None:
            by_warp = active.reshape(-1, 32)
            if (by_warp.any(1) != by_warp.all(1)).any():
                raise Fault("a warp's threads are not all there")
        which = self.which(active)
        if members is not None and (self.full(members, "u32")[which] != 0xFFFFFFFF).any():
            raise NotImplementedError("members that are not the whole warp")
        return which

    # Registers.

    def read(self, operand: Operand, kind: str) -> np.ndarray:
        """As a type of PTX's: of all threads, or one for all."""
        dtype = TYPES[kind]
        if isinstance(operand, Register):
            value = self.registers[operand.name]
            if value.dtype == dtype:
                return value
            if "b" in (dtype.kind, value.dtype.kind) or value.dtype.itemsize < dtype.itemsize:
                raise TypeError(f"{operand.name} of {value.dtype} as {kind}")
            if value.dtype.itemsize > dtype.itemsize:
                value = value.astype(UNSIGNED[dtype.itemsize])
            return value.view(dtype)
        if isinstance(operand, Not):
            return ~self.read(operand.operand, kind)
        if isinstance(operand, Symbol):
            at = self.program.shared_size if operand.name == "global_smem" else self.program.shared.get(operand.name)
            return np.array([self.arguments[operand.name] if at is None else at], dtype)
        if not isinstance(operand, Number):
            raise TypeError(operand)
        if dtype.kind == "b":
            return np.array([operand.bits != 0])
        if dtype.kind == "f" and not operand.text.startswith({4: "0f", 8: "0d"}[dtype.itemsize]):
            raise TypeError(f"{operand.text} as {kind}")
        return np.array([operand.bits & (1 << 8 * dtype.itemsize) - 1], UNSIGNED[dtype.itemsize]).view(dtype)

    def full(self, operand: Operand, kind: str) -> np.ndarray:
        return np.broadcast_to(self.read(operand, kind), (self.n,))

    def write(self, operand: Operand, value: np.ndarray, active: Active) -> None:
        """Of all threads; narrow integers widen as their sign says."""
        if operand == Symbol("_"):
            return
        if not isinstance(operand, Register):
            raise NotImplementedError(f"result in {operand}")
        name = operand.name
        dtype = TYPES[self.program.types.get(name) or self.program.types[name.rstrip("0123456789")]]
        if value.dtype != dtype:
            if value.dtype.itemsize < dtype.itemsize:
                if value.dtype.kind == "f":
                    value = value.view(UNSIGNED[value.dtype.itemsize])
                value = value.astype((SIGNED if value.dtype.kind == "i" else UNSIGNED)[dtype.itemsize])
            value = np.ascontiguousarray(value).view(dtype)
        if active is not None:
            old = self.registers.get(name)
            value = np.where(active, value, np.zeros(1, dtype) if old is None else old)
        elif len(value) != self.n:
            value = np.repeat(value, self.n)
        self.registers[name] = np.ascontiguousarray(value)

    def write_some(self, operand: Operand, which: np.ndarray, values: np.ndarray, active: Active) -> None:
        """``values`` of the active threads alone."""
        if active is not None:
            every = np.zeros(self.n, values.dtype)
            every[which] = values
            values = every
        self.write(operand, np.ascontiguousarray(values), active)

    def note_move(self, to: str, source: str, active: Active) -> None:
        blocks = self.blocks_of(active)
        for product in self.under_way:
            if (product.blocks & blocks).any():
                product.note_move(to, source)

    def addresses(self, address: Address, which: np.ndarray, kind: str = "u32") -> np.ndarray:
        """Of some threads, in shared memory unless ``kind`` is u64."""
        base = self.full(address.base, kind)[which]
        return base + np.uint64(address.offset % 2**64) if kind == "u64" else base.astype(np.int64) + address.offset

    def count_wavefronts(self, which: np.ndarray, addresses: np.ndarray, size: int) -> None:
        one = (self.block[which] == self.block[which[0]]) & (self.warp[which] == self.warp[which[0]])
        before = self.wavefronts.get(self.source, (0, 0))
        now = wavefronts(addresses[one].astype(np.int64), size)
        self.wavefronts[self.source] = (before[0] + now[0], before[1] + now[1])


def opcode(ins: Instruction) -> str:
    """What to count an instruction as: with what tells kinds of accesses and of waits apart."""
    return ".".join(itertools.islice(ins.parts, {"cp": 3}.get(ins.parts[0], 2 if ins.parts[0] in FAMILIES else 1)))


FAMILIES = {"ld", "st", "atom", "wgmma", "mbarrier"}
