"""The emulator of `tests.kernels.ptx`: that it computes what PTX says."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.ptx.machine import Machine
from tests.kernels.ptx.memory import GlobalMemory
from tests.kernels.ptx.parse import kernels, parse
from tests.kernels.ptx.programs import run
from tests.kernels.ptx.values import narrow, tf32, widen


def compute(code: str, *inputs: np.ndarray, wide=False) -> np.ndarray:
    """What becomes of %r0, or %d30, where inputs of 32 numbers are in %r1 and on."""
    out = np.zeros(32, np.uint64 if wide else np.uint32)
    inputs = tuple(np.ascontiguousarray(one).view(np.uint32) for one in inputs)
    loads = [f"ld.global.b32 %r{i}, [%d{i}];" for i in range(1, len(inputs) + 1)]
    store = "mad.wide.u32 %d31, %r90, 8, %d20; st.global.b64 [%d31], %d30;" if wide else "st.global.b32 [%d0], %r0;"
    machine = run("\n".join([*loads, code, store]), out, *inputs)
    assert not machine.faults
    return out


RANDOM = np.random.default_rng(0)
INTEGERS = RANDOM.integers(-(2**31), 2**31, (3, 32)).astype(np.int32)
INTEGERS[:, :4] = [[0, -1, -(2**31), 2**31 - 1], [7, -1, 3, -9], [1, 2, 3, -1]]
A, B, C = INTEGERS
FLOATS = RANDOM.standard_normal((3, 32)).astype(np.float32)
FLOATS[0, :4], FLOATS[1, :4] = [np.nan, 1, np.nan, -0.0], [1, np.nan, np.nan, 2]
X, Y, Z = FLOATS
PLACES = np.arange(32, dtype=np.uint32) * 2  # 0 to 62


def truncated(a, b):
    return (np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64)) * np.sign(a) * np.sign(b)).astype(np.int32)


COMPUTED = {
    "add": ("add.s32 %r0, %r1, %r2;", (A, B), A + B),
    "unsigned minimum": ("min.u32 %r0, %r1, %r2;", (A, B), np.minimum(A.view(np.uint32), B.view(np.uint32))),
    "mul.hi": ("mul.hi.s32 %r0, %r1, %r2;", (A, B), A.astype(np.int64) * B >> 32),
    "mul.hi unsigned": (
        "mul.hi.u32 %r0, %r1, %r2;",
        (A, B),
        A.view(np.uint32).astype(np.uint64) * B.view(np.uint32) >> np.uint64(32),
    ),
    "mad.lo": ("mad.lo.s32 %r0, %r1, %r2, %r3;", (A, B, C), A * B + C),
    "div": ("div.s32 %r0, %r1, %r2;", (B, C), truncated(B, C)),
    "rem": ("rem.s32 %r0, %r1, %r2;", (B, C), B - truncated(B, C) * C),
    "div by zero": ("div.s32 %r0, %r1, 0;", (A,), np.full(32, -1)),
    "shl": ("shl.b32 %r0, %r1, %r2;", (A, PLACES), A.astype(np.int64) << PLACES),
    "shr unsigned": ("shr.u32 %r0, %r1, %r2;", (A, PLACES), A.view(np.uint32).astype(np.uint64) >> PLACES),
    "shr signed": ("shr.s32 %r0, %r1, %r2;", (A, PLACES), A.astype(np.int64) >> PLACES),
    "bfe signed": ("bfe.s32 %r0, %r1, 5, 7;", (A,), (A << 20) >> 25),
    "bfe unsigned": ("bfe.u32 %r0, %r1, 5, 7;", (A,), A >> 5 & 127),
    "bfe past the end": ("bfe.s32 %r0, %r1, 28, 9;", (A,), A >> 28),
    "bfe of nothing": ("bfe.s32 %r0, %r1, 28, 0;", (A,), 0 * A),
    "bfi": ("bfi.b32 %r0, %r1, %r2, 5, 7;", (A, B), (B & ~(127 << 5)) | (A & 127) << 5),
    "bfi of all": ("bfi.b32 %r0, %r1, %r2, 0, 32;", (A, B), A),
    "brev": ("brev.b32 %r0, %r1;", (A,), [int(f"{one:032b}"[::-1], 2) for one in A.view(np.uint32)]),
    "bfind": ("bfind.shiftamt.u32 %r0, %r1;", (A,), [32 - len(f"{one:b}") if one else -1 for one in A.view("u4")]),
    "prmt": ("prmt.b32 %r0, %r1, %r2, 0x1076U;", (A, B), (A << 16) | (B >> 16 & 0xFFFF)),
    "prmt of signs": ("prmt.b32 %r0, %r1, %r2, 0xbb10U;", (A, B), (A & 0xFFFF) | np.where(A < 0, -65536, 0)),
    "popc": ("popc.b32 %r0, %r1;", (A,), [f"{one:b}".count("1") for one in A.view(np.uint32)]),
    "selp, setp": ("setp.lt.u32 %p1, %r1, %r2; selp.b32 %r0, 1, 2, %p1;", (A, B), 2 - (A.view("u4") < B.view("u4"))),
    "setp of NaN": ("setp.neu.f32 %p1, %r1, %r2; selp.b32 %r0, 1, 2, %p1;", (X, X), 2 - np.isnan(X)),
    "setp ordered": ("setp.ne.f32 %p1, %r1, %r2; selp.b32 %r0, 1, 2, %p1;", (X, Y), 2 - ((X < Y) | (X > Y))),
    "max": ("max.f32 %r0, %r1, %r2;", (X, Y), np.fmax(X, Y)),
    "max.NaN": ("max.NaN.f32 %r0, %r1, %r2;", (X, Y), np.maximum(X, Y)),
    "fma": ("fma.rn.f32 %r0, %r1, %r2, %r3;", (X, Y, Z), (X.astype(np.float64) * Y + Z).astype(np.float32)),
    "fma downwards": (
        "fma.rm.f32 %r0, %r1, 0f3F800000, 0f4B800000;",  # + 2 ** 24, where every other integer is a number
        (np.arange(32, dtype=np.float32),),
        (2**24 + np.arange(32) // 2 * 2).astype(np.float32),
    ),
    "cvt.sat": ("cvt.sat.f32.f32 %r0, %r1;", (X,), np.where(np.isnan(X), 0, np.clip(X, 0, 1)).astype(np.float32)),
    "cvt to bf16": ("cvt.rn.bf16.f32 %h1, %r1; cvt.u32.u16 %r0, %h1;", (X,), narrow(X, "bf16")),
    "cvt to integer": ("cvt.rzi.s32.f32 %r0, %r1;", (X * 9,), np.where(np.isnan(X), 0, X * 9).astype(np.int32)),
    "cvt saturates": ("cvt.rni.s32.f32 %r0, 0fCF800000;", (), np.full(32, -(2**31))),
    "floor": ("cvt.rmi.f32.f32 %r0, %r1;", (X * 9,), np.floor(X * 9)),
    "sign of a narrow number": ("cvt.s32.s8 %r0, %r1;", (A,), A.astype(np.int8)),
    "predicates": ("setp.lt.s32 %p1, %r1, 0; mov.b32 %r0, 1; @!%p1 mov.b32 %r0, 2;", (A,), np.where(A < 0, 1, 2)),
    "a register taken apart": (
        "mov.b32 {%h1, %h2}, %r1; mov.b32 %r0, {%h2, %h1};",
        (A,),
        (A << 16) | (A >> 16 & 0xFFFF),
    ),
    "branch": (
        "setp.lt.s32 %p1, %r1, 0; @%p1 bra LOW; mov.b32 %r0, 5; bra END;"
        "LOW: mov.b32 %r0, 7; END: add.s32 %r0, %r0, 1;",
        (A,),
        np.where(A < 0, 8, 6),
    ),
    "loop": (
        "mov.b32 %r0, 0; mov.b32 %r5, 0; TOP: add.s32 %r0, %r0, %r5; add.s32 %r5, %r5, 1; setp.le.s32 %p1, %r5, %r90;"
        "@%p1 bra TOP; redux.sync.max.s32 %r6, %r0, -1; sub.s32 %r0, %r6, %r0;",
        (),
        496 - np.arange(32) * np.arange(1, 33) // 2,
    ),
    "shfl.bfly": ("shfl.sync.bfly.b32 %r0, %r1, 5, 31, -1;", (A,), A[np.arange(32) ^ 5]),
    "shfl.up": ("shfl.sync.up.b32 %r0, %r1, 3, 0, -1;", (A,), [*A[:3], *A[:-3]]),
    "shfl.down": ("shfl.sync.down.b32 %r0|%p1, %r1, 3, 31, -1; @!%p1 mov.b32 %r0, 0;", (A,), [*A[3:], 0, 0, 0]),
    "shfl.idx in eights": ("shfl.sync.idx.b32 %r0, %r1, 3, 0x1807, -1;", (A,), A[np.arange(32) // 8 * 8 + 3]),
    "redux": ("redux.sync.min.s32 %r0, %r1, -1;", (A,), np.full(32, A.min())),
    "vote": (
        "setp.lt.s32 %p1, %r1, 0; vote.sync.ballot.b32 %r0, %p1, -1;",
        (A,),
        np.full(32, sum(1 << i for i in range(32) if A[i] < 0)),
    ),
    "elect": ("elect.sync _|%p1, -1; selp.b32 %r0, 1, 0, %p1;", (), [1] + 31 * [0]),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPUTED)
def test_computes(name):
    code, inputs, wanted = COMPUTED[name]
    found, wanted = compute(code, *inputs), np.asarray(wanted)
    if wanted.dtype == np.float32:
        np.testing.assert_array_equal(found.view(np.float32), wanted)
    else:
        np.testing.assert_array_equal(found, wanted.astype(np.int64).astype(np.uint32))


def test_wide_products():
    found = compute("mul.wide.s32 %d30, %r1, %r2; add.s64 %d30, %d30, -1;", A, B, wide=True)
    np.testing.assert_array_equal(found.view(np.int64), A.astype(np.int64) * B - 1)
    found = compute("mad.wide.u32 %d30, %r1, %r2, %d20;", A, B, wide=True)
    least = A.view(np.uint32).astype(np.uint64) * B.view(np.uint32)
    assert len(np.unique(found - least)) == 1  # what was added


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_halves_are_rounded_to_even(kind):
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F801000, 0x3F803000, 0x7F7FFFFF, 0xC2F00001] * 5)[:32]
    numbers = bits.astype(np.uint32).view(np.float32)
    found = compute(f"cvt.rn.{kind}x2.f32 %r0, %r1, %r2;", numbers, Z).view(np.uint16).reshape(32, 2)
    np.testing.assert_array_equal(found, np.stack([narrow(Z, kind), narrow(numbers, kind)], 1))
    known = {"bf16": [0x3F80, 0x3F82, 0x3F81], "f16": [0x3C04, 0x3C0C, 0x3C04, 0x3C00, 0x3C02]}[kind]
    np.testing.assert_array_equal(found[: len(known), 1], known)
    back = compute(f"mov.b32 {{%h1, %h2}}, %r1; cvt.f32.{kind} %r0, %h2;", np.ascontiguousarray(found).view(np.uint32))
    np.testing.assert_array_equal(back.view(np.float32), widen(found[:, 1].copy(), kind))
    total = compute(f"add.rn.{kind}x2 %r0, %r1, %r1;", np.ascontiguousarray(found).view(np.uint32))
    np.testing.assert_array_equal(total.view(np.uint16), narrow(2 * widen(found.reshape(-1), kind), kind))


def test_an_instruction_it_does_not_know():
    with pytest.raises(NotImplementedError, match=r"add\.sat\.s32 %r0, %r1, %r2 \(line \d+\)"):
        compute("add.sat.s32 %r0, %r1, %r2;")


def test_faults_name_the_line_of_python():
    machine = run(".loc 1 7 3 // kernel.py:7:3 @[ other.py:9:1 ]\n ld.shared.b32 %r1, [%r91];", shared=128)
    assert machine.faults == {"read of what nobody wrote (kernel.py:7)": 32}
    assert machine.wavefronts == {"kernel.py:7": (1, 1)} and machine.counts["ld.shared"] == 1


def test_blocks_have_a_number_and_a_memory_each():
    out = np.zeros(40, np.uint32)
    code = """
        mov.u32 %r1, %ctaid.x; setp.eq.s32 %p1, %r90, 0; @%p1 st.shared.b32 [global_smem], %r1; bar.sync 0;
        ld.shared.b32 %r2, [global_smem]; mad.wide.u32 %d1, %r1, 4, %d20; @%p1 st.global.b32 [%d1], %r2;
    """
    assert not run(code, out, threads=64, shared=4, blocks=40).faults
    np.testing.assert_array_equal(out, np.arange(40))


MODULE = """
.entry first() { ret; }
.visible .entry second(
    .param .u64 second_param_0,
    .param .u8 second_param_1
)
{
    .reg .b32 %r<9>;
    .reg .b64 %d<9>;
    .shared .align 4 .b8 odd[6];
    .shared .align 8 .b8 even[8];
    ld.param.u64 %d0, [second_param_0];
    ld.param.u8 %r0, [second_param_1];
    mov.u32 %r1, even;
    .loc 1 7 3, function_name $L__info_string0, inlined_at 1 9 5
    st.shared.u32 [even+4], %r0;
    st.shared.u32 [%r1+OFFSET], %r1;
    ld.shared.u32 %r2, [even+4];
    st.global.v2.u32 [%d0], {%r1, %r2};
    ret;
}
.file 1 "folder/kernels.cu"
"""


@pytest.mark.parametrize("offset", [0, 8])
def test_variables_in_shared_memory_of_the_second_kernel_of_a_module(offset):
    out, memory = np.zeros(2, np.uint32), GlobalMemory()
    memory.add(out.ctypes.data, out.nbytes)
    texts = kernels(MODULE.replace("OFFSET", str(offset)))
    assert list(texts) == ["first", "second"]
    machine = Machine(parse(texts["second"], threads=1), memory, [out.ctypes.data, 1 + 256])
    machine.run((1, 1, 1))
    if offset:
        assert list(machine.faults) == ["access outside of shared memory (kernels.cu:7)"]
    else:
        assert not machine.faults and out.tolist() == [8, 1]


def test_wavefronts_count_conflicts_of_banks():
    machine = run("mul.lo.s32 %r1, %r90, 128; st.shared.b32 [%r1], %r90;", shared=4096)
    assert list(machine.wavefronts.values()) == [(32, 1)]
    machine = run("st.shared.v4.b32 [%r92], {%r90, %r90, %r90, %r90};", shared=512)
    assert list(machine.wavefronts.values()) == [(4, 4)]


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_go_and_come(transposed):
    numbers, out = RANDOM.integers(0, 2**16, (4, 8, 8)).astype(np.uint16), np.zeros((32, 4), np.uint32)
    trans, registers = ".trans" if transposed else "", "{%r1, %r2, %r3, %r4}"
    code = f"""
        ld.global.v4.b32 {registers}, [%d10]; st.shared.v4.b32 [%r92], {registers};
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {registers}, [%r92];
        st.global.v4.b32 [%d11], {registers};
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r92], {registers};
        ld.shared.v4.b32 {registers}, [%r92]; st.global.v4.b32 [%d12], {registers};
    """
    again = np.zeros_like(numbers)
    assert not run(code, numbers, out, again, shared=512).faults
    lane = np.arange(32)[:, None]
    wanted = (numbers.transpose(0, 2, 1) if transposed else numbers)[:, lane // 4, lane % 4 * 2 + np.arange(2)]
    np.testing.assert_array_equal(out.view(np.uint16).reshape(32, 4, 2), wanted.transpose(1, 0, 2))
    np.testing.assert_array_equal(again, numbers)


def test_product_of_a_warp():
    a, b, c = RANDOM.standard_normal((16, 16)), RANDOM.standard_normal((16, 8)), RANDOM.standard_normal((16, 8))
    a, b, c = narrow(a, "bf16"), narrow(b, "bf16"), c.astype(np.float32)
    lane, pair = np.arange(32)[:, None], np.arange(2)
    row, column = lane // 4, lane % 4 * 2 + pair
    left = np.stack([a[row, column], a[row + 8, column], a[row, column + 8], a[row + 8, column + 8]], 1)
    right = np.stack([b[column, row], b[column + 8, row]], 1)
    total = np.concatenate([c[row, column], c[row + 8, column]], 1)
    out = np.zeros((32, 4), np.float32)
    code = """
        ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d11]; mad.wide.u32 %d2, %r90, 8, %d22;
        ld.global.v2.b32 {%r5, %r6}, [%d2]; ld.global.v4.b32 {%f1, %f2, %f3, %f4}, [%d13];
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
            {%f1, %f2, %f3, %f4}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%f1, %f2, %f3, %f4};
        st.global.v4.b32 [%d10], {%f1, %f2, %f3, %f4};
    """.replace("f32\n", "f32")
    assert not run(code, out, left, right, total).faults
    wanted = widen(a, "bf16") @ widen(b, "bf16") + c
    np.testing.assert_allclose(out, np.concatenate([wanted[row, column], wanted[row + 8, column]], 1), 1e-5, 1e-5)


# Operands of a warp group's product in shared memory: a (64, k) at 0, b (n, k) at 8192, 64 bytes of each a thread.


def test_tf32_drops_the_low_bits():
    assert (tf32(np.array([0x3F801FFF], np.uint32)) == 1).all()
