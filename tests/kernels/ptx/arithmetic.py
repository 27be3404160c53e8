"""Instructions that compute from a thread's own registers.

Approximate ones are as exact as numpy. Denormals are not flushed, whatever .ftz says. fma of float32 is rounded from
float64, which differs from one rounding in a last bit at times.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.kernels.ptx.parse import Instruction, Not, Register
from tests.kernels.ptx.table import computes, does
from tests.kernels.ptx.values import HALVES, SIGNED, TYPES, UNSIGNED, halves, narrow, pack, widen

FLOAT, HALF, INTEGER = r"(\.rn|\.ftz|\.approx|\.full)*\.f(32|64)", r"(\.rn|\.ftz)*\.b?f16(x2)?", r"\.[su](16|32|64)"


def lifted(function: Callable[..., np.ndarray]):
    """Of numbers of the instruction's type; of 16 bits in float32, rounded once more."""

    def compute(machine, ins: Instruction) -> np.ndarray:
        kind = ins.parts[-1]
        values = [machine.read(one, kind) for one in ins.operands[1:]]
        if kind not in HALVES:
            return function(*values)
        return pack(narrow(function(*(widen(halves(one), kind) for one in values)), kind))

    return compute


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) * b + c).astype(np.float32)


def fused_down(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Rounded towards minus infinity."""
    exact = a.astype(np.float64) * b + c
    near = exact.astype(np.float32)
    return np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)


def propagating(function):
    """NaN where one is, as .NaN asks; in the canonical form."""
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), np.float32(np.nan), function(a, b))


for pattern, function in {
    rf"add({FLOAT}|{HALF}|{INTEGER})": np.add,
    rf"sub({FLOAT}|{HALF}|{INTEGER})": np.subtract,
    rf"mul({FLOAT}|{HALF})": np.multiply,
    r"fma\.rn(\.ftz)?\.(f32|b?f16(x2)?)": fused,
    r"fma\.rm(\.ftz)?\.f32": fused_down,
    rf"div{FLOAT}": np.divide,
    rf"min({FLOAT}|{HALF})": np.fmin,  # the number where the other is none
    rf"max({FLOAT}|{HALF})": np.fmax,
    r"min(\.ftz)?\.NaN\.(f32|b?f16(x2)?)": propagating(np.minimum),
    r"max(\.ftz)?\.NaN\.(f32|b?f16(x2)?)": propagating(np.maximum),
    rf"min{INTEGER}": np.minimum,
    rf"max{INTEGER}": np.maximum,
    r"and\.(pred|b16|b32|b64)": np.bitwise_and,
    r"or\.(pred|b16|b32|b64)": np.bitwise_or,
    r"xor\.(pred|b16|b32|b64)": np.bitwise_xor,
    r"not\.(pred|b16|b32|b64)": np.invert,
    rf"neg({FLOAT}|{HALF}|\.s(16|32|64))": np.negative,
    rf"abs({FLOAT}|{HALF}|\.s(16|32|64))": np.abs,
    rf"ex2({FLOAT}|\.approx{HALF})": np.exp2,
    rf"lg2{FLOAT}": np.log2,
    rf"sin{FLOAT}": np.sin,
    rf"cos{FLOAT}": np.cos,
    rf"tanh({FLOAT}|\.approx{HALF})": np.tanh,
    rf"sqrt{FLOAT}": np.sqrt,
    rf"rsqrt{FLOAT}": lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(a.dtype),
    rf"rcp{FLOAT}": lambda a: a.dtype.type(1) / a,
}.items():
    computes(pattern)(lifted(function))


def product(machine, ins: Instruction) -> np.ndarray:
    mode, kind = ins.parts[1:]
    a, b = (machine.read(one, kind) for one in ins.operands[1:3])
    if mode == "lo":
        return a * b
    size = a.dtype.itemsize
    wide = (SIGNED if a.dtype.kind == "i" else UNSIGNED)[2 * size]
    full = a.astype(wide) * b.astype(wide)
    return full if mode == "wide" else (full >> wide(8 * size)).astype(a.dtype)


MULTIPLIES = r"\.(lo\.[su](16|32|64)|hi\.[su](16|32)|wide\.[su](16|32))"
computes(f"mul{MULTIPLIES}")(product)


@computes(f"mad{MULTIPLIES}")
def multiply_add(machine, ins):
    a = product(machine, ins)
    return a + machine.read(ins.operands[3], f"{ins.parts[-1][0]}{8 * a.dtype.itemsize}")


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero. By zero PTX leaves it open; here it is all ones."""
    a, b = np.broadcast_arrays(a, b)
    divisor = np.where(b == 0, b.dtype.type(1), b)
    down = a // divisor
    if a.dtype.kind == "i":
        down = down + ((down * divisor != a) & ((a < 0) != (divisor < 0))).astype(a.dtype)
    return np.where(b == 0, ~np.zeros_like(a), down)


computes(rf"div{INTEGER}")(lifted(quotient))
computes(rf"rem{INTEGER}")(lifted(lambda a, b: a - quotient(a, b) * b))  # of the dividend's sign; by zero the dividend


@computes(r"popc\.(b32|b64)")
def popc(machine, ins):
    bits = np.ascontiguousarray(machine.read(ins.operands[1], ins.parts[-1]))
    return np.unpackbits(bits[:, None].view(np.uint8), axis=1).sum(1).astype(np.uint32)


@computes(r"shl\.b(16|32|64)")
@computes(r"shr\.[bsu](16|32|64)")
def shift(machine, ins):
    """By as many places as the type has and more: nothing is left, or the sign."""
    a, places = machine.read(ins.operands[1], ins.parts[-1]), machine.read(ins.operands[2], "u32")
    bits = 8 * a.dtype.itemsize
    function = np.left_shift if ins.parts[0] == "shl" else np.right_shift
    value = function(a, np.minimum(places, bits - 1).astype(a.dtype))
    return value if a.dtype.kind == "i" else np.where(places >= bits, a.dtype.type(0), value)


@computes(r"bfe\.[su](32|64)")
def extract_bits(machine, ins):
    a = machine.read(ins.operands[1], ins.parts[-1])
    position, length = (machine.read(one, "u32").astype(np.int64) & 255 for one in ins.operands[2:4])
    a, position, length = np.broadcast_arrays(a, position, length)
    wide = a.astype(np.int64 if a.dtype.kind == "i" else np.uint64)  # past the end come signs, or zeros
    found = wide >> np.minimum(position, 63).astype(wide.dtype)
    if a.dtype.kind == "u":
        found = np.where(position > 63, np.uint64(0), found)
    rest = (64 - np.clip(length, 1, 64)).astype(wide.dtype)
    return np.where(length == 0, wide.dtype.type(0), (found << rest) >> rest).astype(a.dtype)


@computes(r"bfi\.b32")
def insert_bits(machine, ins):
    a, b = (machine.read(one, "u32").astype(np.uint64) for one in ins.operands[1:3])
    position, length = (machine.read(one, "u32").astype(np.uint64) & np.uint64(255) for one in ins.operands[3:5])
    one = np.uint64(1)
    mask = (one << np.minimum(length, np.uint64(32))) - one << np.minimum(position, np.uint64(32))
    return (b & ~mask | a << np.minimum(position, np.uint64(32)) & mask).astype(np.uint32)


@computes(r"brev\.b32")
def reverse_bits(machine, ins):
    bits = np.unpackbits(machine.full(ins.operands[1], "b32").copy()[:, None].view(np.uint8), axis=1, bitorder="little")
    return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(np.uint32)[:, 0]


@computes(r"bfind\.shiftamt\.u32")
def places_to_highest_bit(machine, ins):
    """By how many places it is shifted to the left until the highest bit is set; of 0 all ones."""
    a = machine.read(ins.operands[1], "u32")
    return np.where(a == 0, np.uint32(0xFFFFFFFF), 31 - np.log2(np.maximum(a, 1).astype(np.float64)).astype(np.uint32))


@computes(r"prmt\.b32")
def permute_bytes(machine, ins):
    a, b, selector = (machine.full(one, "b32") for one in ins.operands[1:4])
    data = np.stack([a, b], 1).view(np.uint8)  # (n, 8)
    pick = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & np.uint32(15)  # (n, 4)
    found = np.take_along_axis(data, (pick & 7).astype(np.int64), 1)
    return np.where(pick & 8, (found.view(np.int8) >> 7).view(np.uint8), found).view(np.uint32)[:, 0]


@computes(r"selp\.([bsu](16|32|64)|f32|f64)")
def select(machine, ins):
    a, b = (machine.read(one, ins.parts[-1]) for one in ins.operands[1:3])
    return np.where(machine.read(ins.operands[3], "pred"), a, b)


COMPARISONS = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater},
    **{"ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},
}


def compare(test: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where one is NaN: true if the name ends in u."""
    if a.dtype.kind != "f":
        return COMPARISONS[test](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if test in ("num", "nan"):
        return unordered == (test == "nan")
    if test.endswith("u"):
        return COMPARISONS[test[:-1]](a, b) | unordered
    return COMPARISONS[test](a, b) & ~unordered


@computes(
    r"setp\.((eq|ne)(\.and|\.or|\.xor)?\.b(16|32|64)|(eq|ne|lt|le|gt|ge|lo|ls|hi|hs)(\.and|\.or|\.xor)?\.[su](16|32|64)"
    r"|(eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan)(\.and|\.or|\.xor)?(\.ftz)?\.(f32|f64|b?f16))"
)
def compare_and_combine(machine, ins):
    kind = ins.parts[-1]
    values = [machine.read(one, kind) for one in ins.operands[1:3]]
    if kind in HALVES:
        values = [widen(one, kind) for one in values]
    value = compare(ins.parts[1], *values)
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(ins.parts[2])
    return value if combine is None else combine(value, machine.read(ins.operands[3], "pred"))


@does(r"mov\.(pred|[bsu](16|32|64)|f32|f64)")
def move(machine, ins, active):
    """Also takes a register apart, and puts one together."""
    to, source = ins.operands
    kind = ins.parts[1]
    if isinstance(to, tuple):
        whole = np.ascontiguousarray(machine.full(source, kind))
        parts = whole[:, None].view(UNSIGNED[whole.dtype.itemsize // len(to)])
        for i, one in enumerate(to):
            machine.write(one, parts[:, i], active)
    elif isinstance(source, tuple):
        size = TYPES[kind].itemsize // len(source)
        parts = np.stack([machine.full(one, f"b{8 * size}") for one in source], 1)
        machine.write(to, parts.view(TYPES[kind])[:, 0], active)
    else:
        machine.write(to, machine.read(source, kind), active)
        if isinstance(source, Register) and not isinstance(to, Not):
            machine.note_move(to.name, source.name, active)


@computes(r"cvta(\.to|\.param)?(\.global|\.shared)?\.u64")
def convert_address(machine, ins):
    return machine.read(ins.operands[1], "u64")


@computes(r"cvt(\.ftz)?\.sat\.f32\.f32")
def saturate(machine, ins):
    """To 0 and 1; NaN to 0."""
    return np.fmin(np.fmax(machine.read(ins.operands[1], "f32"), np.float32(0)), np.float32(1))


ROUNDED = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
INTEGERS = r"[su](8|16|32|64)"


@computes(rf"cvt\.{INTEGERS}\.{INTEGERS}|cvt\.rn\.f(32|64)\.{INTEGERS}|cvt\.f64\.f32|cvt\.rn(\.ftz)?\.f32\.f64")
def convert(machine, ins):
    return machine.read(ins.operands[1], ins.parts[-1]).astype(TYPES[ins.parts[-2]])


@computes(rf"cvt\.(rni|rzi|rmi|rpi)(\.ftz)?\.({INTEGERS}|f32)\.f32|cvt\.(rni|rzi|rmi|rpi)\.({INTEGERS}|f64)\.f64")
def round_to_integer(machine, ins):
    """To the nearest that the type has; NaN to 0."""
    to = TYPES[ins.parts[-2]]
    value = ROUNDED[ins.parts[1]](machine.read(ins.operands[1], ins.parts[-1]))
    if to.kind == "f":
        return value
    limits = np.iinfo(to)
    inside = np.where((value >= float(limits.min)) & (value < float(limits.max + 1)), value, 0).astype(to)
    high, low = value >= float(limits.max + 1), value < float(limits.min)
    return np.where(high, to.type(limits.max), np.where(low, to.type(limits.min), inside))


@computes(r"cvt(\.ftz)?\.f32\.b?f16")
def convert_to_wide(machine, ins):
    return widen(machine.read(ins.operands[1], "b16"), ins.parts[-1])


@computes(r"cvt\.rn\.b?f16(x2)?\.f32")
def convert_to_halves(machine, ins):
    """Of two, the first goes above the second."""
    numbers = np.broadcast_arrays(*(machine.read(one, "f32") for one in reversed(ins.operands[1:])))
    return pack(np.stack([narrow(one, ins.parts[2]) for one in numbers], 1))


@computes(r"cvt\.rna\.tf32\.f32")
def convert_to_tf32(machine, ins):
    return (machine.read(ins.operands[1], "b32") + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
