"""Instructions that warps and blocks do together, and accesses to memory."""

from __future__ import annotations

import numpy as np

from tests.kernels.ptx.matrix import multiply
from tests.kernels.ptx.memory import ATOMIC, Fault
from tests.kernels.ptx.table import does
from tests.kernels.ptx.values import TYPES, UNSIGNED


@does(r"shfl\.sync\.(up|down|bfly|idx)\.b32")
def shuffle(machine, ins, active):
    machine.warps_of(active, ins.operands[4])
    to, value, mode, lane = ins.operands[0], machine.full(ins.operands[1], "b32"), ins.parts[2], machine.lane
    by, clamp = (machine.read(one, "u32").astype(np.int64) for one in ins.operands[2:4])
    by, segment, clamp = by & 31, clamp >> 8 & 31, clamp & 31
    first = lane & segment
    last = first | (clamp & ~segment)
    other = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": first | (by & ~segment)}[mode]
    inside = other >= last if mode == "up" else other <= last
    if isinstance(to, tuple):
        machine.write(to[1], inside, active)
        to = to[0]
    machine.write(to, value[np.arange(machine.n) + np.where(inside, other - lane, 0)], active)


REDUCTIONS = {
    **{"add": np.add, "min": np.minimum, "max": np.maximum},
    **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor},
}


@does(r"redux\.sync\.((add|min|max)\.[su]32|(and|or|xor)\.b32)")
def reduce(machine, ins, active):
    machine.warps_of(active, ins.operands[2])
    values = machine.full(ins.operands[1], ins.parts[-1]).reshape(-1, 32)
    found = REDUCTIONS[ins.parts[2]].reduce(values, axis=1, dtype=values.dtype)
    machine.write(ins.operands[0], np.repeat(found, 32), active)


@does(r"vote\.sync\.(ballot\.b32|(any|all)\.pred)")
def vote(machine, ins, active):
    machine.warps_of(active, ins.operands[2])
    votes = machine.full(ins.operands[1], "pred").reshape(-1, 32)
    if ins.parts[2] == "ballot":
        found = np.packbits(votes, axis=1, bitorder="little").view(np.uint32)[:, 0]
    else:
        found = getattr(votes, ins.parts[2])(1)
    machine.write(ins.operands[0], np.repeat(found, 32), active)


@does(r"elect\.sync")
def elect(machine, ins, active):
    """The first of the warp, as any may be."""
    machine.warps_of(active, ins.operands[1])
    machine.write(ins.operands[0][0], np.zeros(1, np.uint32), active)
    machine.write(ins.operands[0][1], machine.lane == 0, active)


@does(r"bar\.warp\.sync")
def warp_barrier(machine, ins, active):
    machine.warps_of(active, ins.operands[0])


@does(r"bar\.sync|barrier\.sync(\.aligned)?")
def barrier(machine, ins, active):
    if len(ins.operands) > 1:
        raise NotImplementedError("a barrier of some warps")
    blocks = machine.blocks_of(active)
    if active is not None and ((active != machine.alive) & blocks[machine.block]).any():
        raise Fault("a block's threads are not all at the barrier")
    machine.shared.barrier[blocks] = machine.clock


@does(r"fence\.proxy\.async(\.shared::cta)?")
def fence(machine, ins, active):
    which = machine.warps_of(active)
    machine.shared.fence[machine.block[which], machine.warp[which]] = machine.clock


def listed(operand) -> tuple:
    return operand if isinstance(operand, tuple) else (operand,)


KIND = r"(\.v[248])?\.([bsu](8|16|32|64)|f32|f64)"


@does(r"ld\.param\.([bsu](8|16|32|64)|f32|f64)")
def load_parameter(machine, ins, active):
    value, dtype = machine.arguments[ins.operands[1].base.name], TYPES[ins.parts[-1]]
    if isinstance(value, float):
        found = np.array([value], {4: np.float32, 8: np.float64}[dtype.itemsize])
    else:
        found = np.array([value & (1 << 8 * dtype.itemsize) - 1], UNSIGNED[dtype.itemsize])
    machine.write(ins.operands[0], found.view(dtype), active)


@does(rf"ld\.(global|shared)(\.nc|\.ca|\.cg|\.cs|\.L[12]::\w+)*{KIND}")
def load(machine, ins, active):
    to, dtype, which = listed(ins.operands[0]), TYPES[ins.parts[-1]], machine.which(active)
    if ins.parts[1] == "global":
        found = machine.memory.load(machine.addresses(ins.operands[1], which, "u64"), dtype.itemsize, len(to))
    else:
        block, warp, at = machine.block[which], machine.warp[which], machine.addresses(ins.operands[1], which)
        found = machine.shared.load(block, warp, at, dtype.itemsize, len(to), machine.clock)
        machine.count_wavefronts(which, at, dtype.itemsize * len(to))
    for one, values in zip(to, found.view(dtype).T, strict=True):
        machine.write_some(one, which, values, active)


@does(rf"st\.(global|shared)(\.wb|\.cg|\.cs|\.L[12]::\w+)*{KIND}")
def store(machine, ins, active):
    which, kind = machine.which(active), f"b{8 * TYPES[ins.parts[-1]].itemsize}"
    values = np.stack([machine.full(one, kind)[which] for one in listed(ins.operands[1])], 1)
    if ins.parts[1] == "global":
        machine.memory.store(machine.addresses(ins.operands[0], which, "u64"), values)
    else:
        block, warp, at = machine.block[which], machine.warp[which], machine.addresses(ins.operands[0], which)
        machine.shared.store(block, warp, at, values, machine.clock)
        machine.count_wavefronts(which, at, values.itemsize * values.shape[1])


@does(r"atom\.shared\.(add\.u32|or\.b32)")
def change_atomically(machine, ins, active):
    which, shared = machine.which(active), machine.shared
    block, warp = machine.block[which], machine.warp[which]
    flat = shared.locate(block, machine.addresses(ins.operands[1], which), 4)
    shared.note_write(block, warp, flat, 4, machine.clock, ATOMIC)
    numbers, more = shared.data.view(np.uint32), machine.full(ins.operands[2], "u32")[which]
    old = np.empty(len(which), np.uint32)
    for i, at in enumerate(flat // 4):
        old[i] = numbers[at]
        numbers[at] = REDUCTIONS[ins.parts[2]](old[i], more[i])
    machine.write_some(ins.operands[0], which, old, active)


def matrices(machine, ins, address, active) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Of ldmatrix and stmatrix: their threads, those that say where a row is, and where; how many matrices."""
    count = int(ins.parts[4][1:])
    which = machine.warps_of(active)
    with_rows = which[machine.lane[which] < 8 * count]
    at = machine.addresses(address, with_rows)
    machine.count_wavefronts(with_rows, at, 16)
    return which, with_rows, at, count


def pairs(transposed: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows and columns of the two numbers that each thread has of an 8x8 matrix."""
    lane = np.arange(32)
    places = [(lane // 4, lane % 4 * 2 + i) for i in range(2)]
    return [place[::-1] for place in places] if transposed else places


@does(r"ldmatrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared(::cta)?\.b16")
def load_matrices(machine, ins, active):
    which, rows, at, count = matrices(machine, ins, ins.operands[1], active)
    found = machine.shared.load(machine.block[rows], machine.warp[rows], at, 4, 4, machine.clock)
    numbers = found.view(np.uint16).reshape(-1, count, 8, 8)
    for i, one in enumerate(listed(ins.operands[0])):
        both = np.stack([numbers[:, i, row, column] for row, column in pairs("trans" in ins.parts)], -1)
        machine.write_some(one, which, both.view(np.uint32).reshape(-1), active)


@does(r"stmatrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared(::cta)?\.b16")
def store_matrices(machine, ins, active):
    which, rows, at, count = matrices(machine, ins, ins.operands[0], active)
    numbers = np.empty((len(which) // 32, count, 8, 8), np.uint16)
    for i, one in enumerate(listed(ins.operands[1])):
        both = np.ascontiguousarray(machine.full(one, "b32")[which]).view(np.uint16).reshape(-1, 32, 2)
        for j, (row, column) in enumerate(pairs("trans" in ins.parts)):
            numbers[:, i, row, column] = both[..., j]
    values = numbers.reshape(-1, 8).view(np.uint32)
    machine.shared.store(machine.block[rows], machine.warp[rows], at, values, machine.clock)


@does(r"mma\.sync\.aligned\.(m16n8k16\.row\.col\.f32\.(bf16\.bf16|f16\.f16)|m16n8k8\.row\.col\.f32\.tf32\.tf32)\.f32")
def multiply_in_warp(machine, ins, active):
    which = machine.warps_of(active)
    a, b, c = (
        np.stack([machine.full(one, "b32")[which] for one in operand], 1).reshape(len(which) // 32, 32, -1)
        for operand in ins.operands[1:4]
    )
    found = multiply(a, b, c, ins.parts[-2], int(ins.parts[3].split("k")[1])).reshape(len(which), -1)
    for one, values in zip(ins.operands[0], found.T, strict=True):
        machine.write_some(one, which, values, active)
