"""Copies to shared memory that go on while the threads do: they arrive when they are waited for, and not before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tests.kernels.ptx.matrix import swizzled
from tests.kernels.ptx.memory import ENGINE, IN_FLIGHT, Fault, GlobalMemory
from tests.kernels.ptx.table import does
from tests.kernels.ptx.values import UNSIGNED

PATIENCE = 10_000  # waits for one phase of an mbarrier


@does(r"cp\.async\.(ca|cg)\.shared\.global(\.L2::\w+)*")
def start(machine, ins, active):
    """With a size of the source that is less, zeros follow."""
    which, shared, source = machine.which(active), machine.shared, machine.source
    size = ins.operands[2].bits
    block, warp = machine.block[which], machine.warp[which]
    to, origin = machine.addresses(ins.operands[0], which), machine.addresses(ins.operands[1], which, "u64")
    taken = machine.full(ins.operands[3] if len(ins.operands) > 3 else ins.operands[2], "u32")[which]
    flat = shared.locate(block, to, size)
    shared.note_write(block, warp, flat, size, machine.clock, IN_FLIGHT)
    machine.count_wavefronts(which, to, size)

    def arrive(blocks: np.ndarray) -> None:
        here = blocks[block]
        values = np.zeros((len(which), size), np.uint8)
        with machine.blaming(source):
            for n in np.unique(taken[here]):
                if n:
                    some = here & (taken == n)
                    width = 4 if n % 4 == 0 else 1
                    found = machine.memory.load(origin[some], width, int(n) // width, alignment=size)
                    values[some, :n] = found.view(np.uint8)
        shared.data[flat[here][:, None] + np.arange(size)] = values[here]
        shared.note_arrival(flat[here], size, warp[here][:, None], machine.clock)

    machine.copies.start(machine.blocks_of(active), arrive)


@does(r"cp\.async\.commit_group")
def commit(machine, ins, active):
    machine.copies.commit(machine.blocks_of(active))


@does(r"cp\.async\.wait_group")
def wait(machine, ins, active):
    machine.copies.wait(machine.blocks_of(active), ins.operands[0].bits)


@does(r"cp\.async\.wait_all")
def wait_for_all(machine, ins, active):
    commit(machine, ins, active)
    machine.copies.wait(machine.blocks_of(active), 0)


@dataclass
class TensorMap:
    """A tensor and the boxes that are copied of it, outermost dimension first.

    size: of a number. strides: in bytes. row: bytes of the rows within which units of 16 are swizzled; 16: not.
    """

    pointer: int
    size: int
    shape: list[int]
    strides: list[int]
    box: list[int]
    row: int

    def fetch(self, memory: GlobalMemory, start: list[int]) -> np.ndarray:
        """A box's bytes, (rows, bytes), with zeros outside of the tensor."""
        places = np.meshgrid(*(np.arange(n) + at for n, at in zip(self.box, start, strict=True)), indexing="ij")
        inside, at = np.ones(self.box, bool), np.full(self.box, self.pointer, np.int64)
        for place, n, stride in zip(places, self.shape, self.strides, strict=True):
            inside &= (place >= 0) & (place < n)
            at += place * stride
        out = np.zeros(self.box, UNSIGNED[self.size])
        if inside.any():
            out[inside] = memory.load(at[inside].astype(np.uint64), self.size, 1)[:, 0]
        return out.reshape(-1, self.box[-1]).view(np.uint8)

    def places(self, to: int) -> np.ndarray:
        """Where each of those bytes goes in shared memory."""
        width = self.box[-1] * self.size
        if self.row != 16 and width != self.row:
            raise NotImplementedError("a box whose rows are not those of its swizzle")
        return swizzled(to + np.arange(int(np.prod(self.box[:-1])) * width).reshape(-1, width), self.row)


@dataclass
class Mbarrier:
    """count: of threads that arrive in a phase. arrivals and bytes: that the phase still lacks. copies: under way."""

    count: int
    arrivals: int
    phase: int = 0
    bytes: int = 0
    copies: list[Callable[[], None]] = field(default_factory=list)
    waits: int = 0

    def move_on(self) -> None:
        if self.arrivals == 0 and self.bytes == 0:
            self.phase, self.arrivals, self.waits = self.phase + 1, self.count, 0


def each(machine, address, active):
    """For each thread: its number and the key of its mbarrier."""
    which = machine.which(active)
    for lane, at in zip(which, machine.addresses(address, which), strict=True):
        yield int(lane), (int(machine.block[lane]), int(at))


def of(machine, key: tuple[int, int]) -> Mbarrier:
    if key not in machine.mbarriers:
        raise Fault("use of an mbarrier that is none")
    return machine.mbarriers[key]


@does(r"mbarrier\.init(\.shared(::cta)?)?\.b64")
def initialize(machine, ins, active):
    for lane, key in each(machine, ins.operands[0], active):
        count = int(machine.full(ins.operands[1], "u32")[lane])
        machine.mbarriers[key] = Mbarrier(count, count)
        flat = machine.shared.locate(np.array([key[0]]), np.array([key[1]]), 8)
        machine.shared.note_arrival(flat, 8, ENGINE, machine.clock)


@does(r"mbarrier\.inval(\.shared(::cta)?)?\.b64")
def invalidate(machine, ins, active):
    for _, key in each(machine, ins.operands[0], active):
        if of(machine, key).copies:
            machine.fault("end of an mbarrier with copies in flight")
        del machine.mbarriers[key]


@does(r"mbarrier\.arrive(\.expect_tx)?(\.shared(::cta)?)?\.b64")
def arrive(machine, ins, active):
    for lane, key in each(machine, ins.operands[1], active):
        state = of(machine, key)
        if "expect_tx" in ins.parts:
            state.bytes += int(machine.full(ins.operands[2], "u32")[lane])
        elif len(ins.operands) > 2:
            raise NotImplementedError("several arrivals at once")
        state.arrivals -= 1
        state.move_on()


@does(r"mbarrier\.try_wait\.parity(\.shared(::cta)?)?\.b64")
def try_wait(machine, ins, active):
    """The copies that a phase waits for arrive now. It is over if the parity of the next is another."""
    which = machine.which(active)
    keys = np.stack([machine.block[which], machine.addresses(ins.operands[1], which)], 1)
    parity, done = machine.full(ins.operands[2], "u32")[which], np.empty(len(which), bool)
    for key in np.unique(keys, axis=0):
        state = of(machine, (int(key[0]), int(key[1])))
        copies, state.copies = state.copies, []
        for copy in copies:
            copy()
        if copies:
            state.move_on()
        state.waits += 1
        if state.waits > PATIENCE:
            raise Fault("waits for ever at an mbarrier")
        mine = (keys == key).all(1)
        done[mine] = state.phase % 2 != parity[mine]
        if done[mine].all():
            state.waits = 0
    machine.write_some(ins.operands[0], which, done, active)


@does(r"cp\.async\.bulk\.tensor\.[1-5]d\.shared::(cta|cluster)\.global\.mbarrier::complete_tx::bytes")
def start_bulk(machine, ins, active):
    source, shared = machine.source, machine.shared
    for lane, key in each(machine, ins.operands[2], active):
        state, address = of(machine, key), ins.operands[1]
        tensor_map = machine.maps[int(machine.full(address.base, "u64")[lane])]
        first = [int(machine.full(one, "s32")[lane]) for one in address.coordinates]
        at = tensor_map.places(int(machine.addresses(ins.operands[0], np.array([lane]))[0]))
        if (at < 0).any() or (at >= shared.limit).any():
            raise Fault("copy outside of shared memory")
        at = at + key[0] * shared.size
        starts = np.unique(at // shared.granule) * shared.granule
        block, warp = np.full(len(starts), key[0]), np.full(len(starts), machine.warp[lane])
        shared.note_write(block, warp, starts, shared.granule, machine.clock, IN_FLIGHT)

        def bring(tensor_map=tensor_map, first=first, at=at, starts=starts, state=state) -> None:
            with machine.blaming(source):
                shared.data[at] = tensor_map.fetch(machine.memory, first[::-1])
            shared.note_arrival(starts, shared.granule, ENGINE, machine.clock)
            state.bytes -= at.size

        state.copies.append(bring)
