"""Products of warp groups, wgmma: done when they are waited for, so that an operand changed too early gives others."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tests.kernels.ptx.matrix import group_fragment, group_sum, operand_addresses
from tests.kernels.ptx.memory import Fault
from tests.kernels.ptx.parse import Address, Instruction
from tests.kernels.ptx.table import Active, does
from tests.kernels.ptx.values import UNSIGNED, tf32, unpacked, widen


@dataclass
class Product:
    """Of several warp groups.

    blocks: in which it is not over.
    threads: of each group, (G, 128).
    left: (G, 64, k): the values, or where they are in shared memory.
    right: (G, n, k), where.
    accumulate: whether each group adds to what is there.
    sums: registers of the result.
    aliases: those that they were moved to since, and from where: ptxas makes one register of the two.
    """

    machine: object
    source: str
    start: int
    kind: str
    blocks: np.ndarray
    threads: np.ndarray
    left: np.ndarray
    right: np.ndarray
    accumulate: np.ndarray
    sums: list[str]
    aliases: dict[str, str] = field(default_factory=dict)

    def note_move(self, to: str, source: str) -> None:
        origin = self.aliases.get(source, source)
        if origin in self.sums and to != origin:
            self.aliases[to] = origin
        else:
            self.aliases.pop(to, None)

    def __call__(self, blocks: np.ndarray) -> None:
        machine, here = self.machine, blocks[self.machine.block[self.threads[:, 0]]]
        with machine.blaming(self.source):
            left = self.left[here] if self.left.dtype == np.float32 else self.fetch(self.left[here])
            right = self.fetch(self.right[here])
        n = right.shape[1]
        rows, columns = group_sum(n)
        new = (left @ right.transpose(0, 2, 1))[:, rows, columns].reshape(-1, n // 2)  # (threads, registers)
        threads, keep = self.threads[here].reshape(-1), np.repeat(self.accumulate[here], 128)
        for name, more in zip(self.sums, new.T, strict=True):
            old = machine.registers.get(name)
            value = np.zeros(machine.n, np.uint32) if old is None else old.copy()
            value.view(np.float32)[threads] = np.where(keep, value.view(np.float32)[threads], 0) + more
            machine.registers[name] = value
        for alias, name in self.aliases.items():
            value = machine.registers[alias].copy()
            value[threads] = machine.registers[name][threads]
            machine.registers[alias] = value
        self.blocks = self.blocks & ~blocks
        if not self.blocks.any():
            machine.under_way = [one for one in machine.under_way if one is not self]

    def fetch(self, at: np.ndarray) -> np.ndarray:
        shared = self.machine.shared
        shared.note_operand(at, self.start, self.machine.clock)
        size = 4 if self.kind == "tf32" else 2
        numbers = shared.data.view(UNSIGNED[size])[at // size]
        return tf32(numbers) if self.kind == "tf32" else widen(numbers, self.kind)


def check_sums(machine, ins: Instruction, active: Active) -> None:
    """Nobody may use a sum before its wait, but for what becomes a name for it, and other products that add to it."""
    if ins.parts[0] == "mov":
        return
    writes = frozenset() if ins.parts[0] == "wgmma" else ins.writes
    blocks = machine.blocks_of(active)
    for product in machine.under_way:
        names = {*product.sums, *product.aliases}
        if (ins.reads & names or writes & set(product.sums)) and (product.blocks & blocks).any():
            machine.fault("sum of a product used before its wait")
        for name in writes & product.aliases.keys():
            del product.aliases[name]


@does(r"wgmma\.fence\.sync\.aligned")
def fence(machine, ins, active):
    """Orders a warp group's registers, which are in order here."""


@does(r"wgmma\.commit_group\.sync\.aligned")
def commit(machine, ins, active):
    machine.products.commit(machine.blocks_of(active))


@does(r"wgmma\.wait_group\.sync\.aligned")
def wait(machine, ins, active):
    machine.products.wait(machine.blocks_of(active), ins.operands[0].bits)


@does(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+(k16\.f32\.(bf16\.bf16|f16\.f16)|k8\.f32\.tf32\.tf32)")
def start(machine, ins, active):
    n, k = (int(number) for number in ins.parts[4][4:].split("k"))
    kind, (sums, a, b, accumulate) = ins.parts[-1], ins.operands[:4]
    flags = [one.bits for one in ins.operands[4:]]  # signs of a and b, then which of those in memory is transposed
    if flags[:2] != [1, 1]:
        raise NotImplementedError("negated operands")
    threads = machine.which(active)
    if len(threads) % 128 or (threads.reshape(-1, 128) != threads[::128, None] + np.arange(128)).any():
        raise Fault("a warp group's threads are not all there")
    threads = threads.reshape(-1, 128)
    block = machine.block[threads[:, 0]]

    def locate(descriptor: Address, span: int, transposed: bool) -> np.ndarray:
        size = 4 if kind == "tf32" else 2
        each = machine.full(descriptor, "u64")[threads[:, 0]]
        at = np.stack([operand_addresses(int(one), span, k, size, transposed) for one in each])
        if (at + size > machine.shared.limit).any():
            raise Fault("operand outside of shared memory")
        at = at + (block * machine.shared.size)[:, None, None]
        machine.shared.note_product(at, machine.clock)
        return at

    right = locate(b, n, flags[-1] == 1 if len(flags) > 2 else False)
    if isinstance(a, tuple):
        left = np.empty((len(threads), 64, k), np.float32)
        registers = np.stack([machine.full(one, "b32") for one in a], 1)[threads]  # (G, 128, 4)
        left[:, *group_fragment(k)] = unpacked(registers, kind)
    else:
        left = locate(a, 64, flags[2] == 1 if len(flags) > 3 else False)
    product = Product(
        machine=machine,
        source=machine.source,
        start=machine.clock,
        kind=kind,
        blocks=machine.blocks_of(active),
        threads=threads,
        left=left,
        right=right,
        accumulate=machine.full(accumulate, "pred")[threads[:, 0]],
        sums=[one.name for one in sums],
    )
    machine.under_way.append(product)
    machine.products.start(product.blocks, product)
