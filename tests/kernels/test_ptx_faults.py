"""The emulator of `tests.kernels.ptx`: copies and products under way, and each fault that it sees."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.ptx.copies import TensorMap
from tests.kernels.ptx.machine import Machine
from tests.kernels.ptx.programs import kinds, run
from tests.kernels.ptx.values import narrow, widen

RANDOM = np.random.default_rng(0)
FILL = "mul.lo.s32 %r1, %r90, 64;\n" + "".join(
    f"mad.wide.u32 %d30, %r90, 64, %d{20 + i};\n"
    + "".join(
        f"ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%d30+{at}];\n"
        f"st.shared.v4.b32 [%r1+{8192 * i + at}], {{%r2, %r3, %r4, %r5}};\n"
        for at in (0, 16, 32, 48)
    )
    for i in (0, 1)
)
READY = FILL + "fence.proxy.async.shared::cta; bar.sync 0;\n"
SUMS = ",".join(f"%f{i}" for i in range(8))
ZERO = "".join(f"mov.b32 %f{i}, 0f3F800000; " for i in range(8))
COMMIT, WAIT = "wgmma.commit_group.sync.aligned;\n", "wgmma.wait_group.sync.aligned 0;\n"
KEEP = "mad.wide.u32 %d30, %r90, 32, %d22;" + "".join(f"st.global.b32 [%d30+{4 * i}], %f{i};" for i in range(8))


def descriptor(start: int, leading: int, stride: int, mode: int) -> int:
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def product(a: int | str, b: int, accumulate: str = "0", trans: tuple[int, ...] = (0, 0), n: int = 16) -> str:
    code = f"mov.b64 %d40, {a}; " if isinstance(a, int) else ""
    return code + (
        f"mov.b64 %d41, {b}; wgmma.fence.sync.aligned; wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 "
        f"{{{SUMS}}}, {a if isinstance(a, str) else '%d40'}, %d41, {accumulate}, 1, 1, {', '.join(map(str, trans))};\n"
    )


def laid_out(numbers: np.ndarray, row: int, transposed: bool) -> tuple[np.ndarray, int, int, int]:
    """A (span, k) operand's 8192 bytes as CUTLASS lays it out; the leading and stride offsets, and the mode.

    row: bytes of a swizzled one; 16: none.
    """
    span, k = numbers.shape
    out = np.zeros(4096, np.uint16)
    unit = row // 2
    for i in range(span):
        for j in range(k):
            if not transposed:  # 8 rows of k, and then the next 8
                at = (
                    (i // 8 * 8 + i % 8) * row + j * 2
                    if row > 16
                    else i // 8 * 128 + i % 8 * 16 + j // 8 * 1024 + j % 8 * 2
                )
            else:  # 8 of k with a row of span each, and then the next 8; the next rows of span after both
                at = (i // unit * 2 + j // 8) * 8 * row + j % 8 * row + i % unit * 2
            if row > 16:  # its bits 4 and up change with those from 7
                at ^= (at >> 7) % (row // 16) << 4
            out[at // 2] = numbers[i, j]
    if not transposed:
        offsets = (1024, 128) if row == 16 else (16, 8 * row)
    else:  # of 16 bytes the two change places
        offsets = (8 * row, 16 * row) if row == 16 else (16 * row, 8 * row)
    return out, *offsets, {16: 0, 32: 3, 64: 2, 128: 1}[row]


def group_product(a: np.ndarray, b: np.ndarray, total: float = 0) -> np.ndarray:
    """(64, 16) of (64, k) and (n, k), as the threads have it: (128, 8)."""
    wanted = widen(a, "bf16") @ widen(b, "bf16").T + np.float32(total)
    thread, i = np.arange(128)[:, None], np.arange(8)
    return wanted[thread // 32 * 16 + thread % 32 // 4 + i % 4 // 2 * 8, i // 4 * 8 + thread % 4 * 2 + i % 2]


def operands(a_row: int = 128, b_row: int = 128, a_transposed: bool = False, b_transposed: bool = False):
    a, b = (narrow(RANDOM.standard_normal(shape), "bf16") for shape in ((64, 16), (16, 16)))
    a_bytes, *a_place = laid_out(a, a_row, a_transposed)
    padded = np.concatenate([b, np.zeros((48, 16), np.uint16)]) if b_transposed else b
    b_bytes, *b_place = laid_out(padded, b_row, b_transposed)
    return a, b, a_bytes, b_bytes, descriptor(0, *a_place), descriptor(8192, *b_place)


@pytest.mark.parametrize("a_transposed,b_transposed", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("row", [16, 32, 64, 128])
def test_product_of_a_warp_group(row, a_transposed, b_transposed):
    a, b, a_bytes, b_bytes, left, right = operands(row, row, a_transposed, b_transposed)
    out = np.zeros((128, 8), np.float32)
    code = ZERO + READY + product(left, right, "-1", (int(a_transposed), int(b_transposed))) + COMMIT + WAIT + KEEP
    assert not run(code, a_bytes, b_bytes, out, threads=128, shared=16384).faults
    np.testing.assert_allclose(out, group_product(a, b, 1), 1e-5, 1e-5)


def test_product_with_an_operand_in_registers_and_one_after_another():
    a, b, a_bytes, b_bytes, left, right = operands()
    thread = np.arange(128)[:, None, None]
    r, pair = np.arange(4)[:, None], np.arange(2)
    fragment = a[thread // 32 * 16 + thread % 32 // 4 + r % 2 * 8, thread % 4 * 2 + pair + r // 2 * 8]  # (128, 4, 2)
    out = np.zeros((128, 8), np.float32)
    code = READY + "ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d13]; setp.ne.s32 %p1, %r90, %r90;" + ZERO
    code += product("{%r10, %r11, %r12, %r13}", right, "%p1", (0,)) + product(left, right, "1") + COMMIT + WAIT + KEEP
    assert not run(code, a_bytes, b_bytes, out, np.ascontiguousarray(fragment), threads=128, shared=16384).faults
    np.testing.assert_allclose(out, 2 * group_product(a, b), 1e-5, 1e-5)


def test_a_sum_moved_before_its_wait_is_the_sum():
    a, b, a_bytes, b_bytes, left, right = operands()
    out = np.zeros((128, 8), np.float32)
    moves = ["".join(f"mov.b32 %f{to + i}, %f{source + i};" for i in range(8)) for to, source in ((20, 0), (0, 20))]
    code = ZERO + READY + product(left, right) + COMMIT + moves[0] + WAIT + moves[1] + KEEP
    assert not run(code, a_bytes, b_bytes, out, threads=128, shared=16384).faults
    np.testing.assert_allclose(out, group_product(a, b), 1e-5, 1e-5)


def test_a_sum_moved_in_another_block_moves_nothing_here():
    """Block 1 has waited and moves; block 0, whose product goes on meanwhile, has other numbers there."""
    a, b, a_bytes, b_bytes, left, right = operands()
    out = np.zeros((2, 128, 8), np.float32)
    ones, moves = ("".join(f"mov.b32 %f{20 + i}, %f{i};" for i in range(8)) for _ in range(2))  # before and after
    keep = "mov.u32 %r6, %ctaid.x; mad.lo.s32 %r6, %r6, 128, %r90; mad.wide.u32 %d30, %r6, 32, %d22;"
    keep += "".join(f"st.global.b32 [%d30+{4 * i}], %f{20 + i};" for i in range(8))
    branch = "mov.u32 %r7, %ctaid.x; setp.eq.s32 %p2, %r7, 0; @%p2 bra LATER;\n"
    code = ZERO + ones + READY + product(left, right) + COMMIT + branch + WAIT + moves + "\nLATER:\n" + WAIT + keep
    assert not run(code, a_bytes, b_bytes, out, threads=128, shared=16384, blocks=2).faults
    np.testing.assert_array_equal(out[0], 1)
    np.testing.assert_allclose(out[1], group_product(a, b), 1e-5, 1e-5)


def test_copies_fill_up_with_zeros():
    numbers, out = RANDOM.integers(1, 2**32, (32, 4)).astype(np.uint32), np.zeros((32, 4), np.uint32)
    code = """
        and.b32 %r1, %r90, 3; mul.lo.s32 %r1, %r1, 4; cp.async.cg.shared.global [%r92], [%d10], 0x10, %r1;
        cp.async.commit_group; cp.async.wait_group 0;
        ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%r92]; st.global.v4.b32 [%d11], {%r2, %r3, %r4, %r5};
    """
    assert not run(code, numbers, out, shared=512).faults
    np.testing.assert_array_equal(out, np.where(np.arange(4) < np.arange(32)[:, None] % 4, numbers, 0))


MAP = 0x7F00_0000_0000
BULK = """
    setp.eq.s32 %p1, %r90, 0; mov.b32 %r1, 4096; mov.b32 %r2, -1; mov.b32 %r3, 3; mov.b32 %r4, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r1], 1; bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 1024;
    @%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r4], [%d22, {%r2, %r3}], [%r1];
    bar.sync 0;
"""
WAIT_FOR_BULK = """
    {
    .reg .pred complete;
    waitLoop:
    mbarrier.try_wait.parity.shared::cta.b64 complete, [%r1], 0;
    @!complete bra.uni waitLoop;
    }
"""
READ_BULK = "ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r92]; st.global.v4.b32 [%d11], {%r5, %r6, %r7, %r8};"


def run_bulk(code: str) -> tuple[Machine, np.ndarray, np.ndarray]:
    """A box of (8, 64) numbers from row 3 and column -1 on of (10, 64)."""
    numbers, out = RANDOM.integers(1, 2**16, (10, 64)).astype(np.uint16), np.zeros((8, 64), np.uint16)
    tensor_map = TensorMap(numbers.ctypes.data, 2, [10, 64], [128, 2], [8, 64], 128)
    return run(code, numbers, out, threads=64, shared=4104, maps={MAP: tensor_map}), numbers, out


def test_bulk_copies():
    machine, numbers, out = run_bulk(BULK + WAIT_FOR_BULK + READ_BULK)
    assert not machine.faults
    wanted = np.pad(numbers[3:], ((0, 1), (1, 0)))[:8, :64].reshape(8, 8, 8)
    for row in range(8):
        np.testing.assert_array_equal(out[row].reshape(8, 8)[np.arange(8) ^ row], wanted[row])


STORE, LOAD, BARRIER = "st.shared.b32 [%r91], %r90;\n", "ld.shared.b32 %r5, [%r91];\n", "bar.sync 0;\n"
LOAD_FIRST = "ld.shared.b32 %r5, [global_smem];"
OTHER = "xor.b32 %r6, %r91, 128;\n"  # the place of a thread in the other warp
LOAD_OTHER, STORE_OTHER = "ld.shared.b32 %r5, [%r6];\n", "st.shared.b32 [%r6], %r90;\n"
COPY = "cp.async.ca.shared.global [%r91], [%d0], 0x4;\ncp.async.commit_group;\n"
DONE = "cp.async.wait_group 0;\n"
READ, WRITTEN = "read after write without a barrier", "write after read without a barrier"
TWICE = "write after write without a barrier"
# fault -> code that has it, and that has it not; two warps
FAULTS = {
    READ: (OTHER + STORE + LOAD_OTHER, OTHER + STORE + LOAD + BARRIER + LOAD_OTHER),
    WRITTEN: (
        OTHER + STORE + BARRIER + LOAD_OTHER + STORE,
        OTHER + STORE + BARRIER + LOAD_OTHER + BARRIER + STORE,
    ),
    TWICE: (OTHER + STORE + STORE_OTHER, OTHER + STORE + STORE + BARRIER + STORE_OTHER),
    "read of what nobody wrote": (LOAD, STORE + LOAD),
    "different values written to one place at once": (
        "st.shared.b32 [global_smem], %r90;",
        "st.shared.b32 [global_smem], 7;",
    ),
    "read of a copy in flight": (COPY + LOAD + DONE, COPY + DONE + LOAD),
    "write over a copy in flight": (COPY + STORE + DONE, COPY + DONE + STORE),
    "ends with copies or products in flight": (COPY, COPY + DONE),
    "access outside of the arguments": ("ld.global.b32 %r5, [%d0+4];", "ld.global.b32 %r5, [%d0];"),
    "misaligned access of global memory": ("st.global.b32 [%d0+-2], %r5;", "st.global.b16 [%d0+2], %h5;"),
    "access outside of shared memory": ("st.shared.b32 [%r91+4], %r90;", STORE),
    "misaligned access of shared memory": ("st.shared.b32 [%r91+2], %r90;", "st.shared.b16 [%r91+2], %h5;"),
    "a block's threads are not all at the barrier": (
        "setp.lt.s32 %p1, %r90, 32; @%p1 bra SKIP; bar.sync 0; SKIP: mov.b32 %r5, 0;",
        "setp.lt.s32 %p1, %r90, 32; @%p1 ret; bar.sync 0;",  # those that are gone need not come
    ),
    "a warp's threads are not all there": (
        "setp.lt.s32 %p1, %r90, 16; @%p1 shfl.sync.bfly.b32 %r5, %r90, 1, 31, -1;",
        "setp.lt.s32 %p1, %r90, 32; @%p1 shfl.sync.bfly.b32 %r5, %r90, 1, 31, -1;",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_sees(fault):
    wrong, right = (f"mov.b16 %h5, 0; mov.b32 %r5, 0;\n{code}" for code in FAULTS[fault])
    numbers = np.zeros(64, np.uint32)
    assert kinds(run(wrong, numbers, threads=64, shared=256)) == {fault}
    assert not run(right, numbers, threads=64, shared=256).faults


def test_sees_threads_that_add_and_others_that_read_at_once():
    add = "atom.shared.add.u32 %r5, [global_smem], 1;\n"
    start = "setp.eq.s32 %p1, %r90, 0; @%p1 st.shared.b32 [global_smem], 0; bar.sync 0;\n"
    assert kinds(run(start + add + LOAD_FIRST, threads=64, shared=4)) == {READ}
    machine = run(start + add + add + BARRIER + LOAD_FIRST, threads=64, shared=4)
    assert not machine.faults and (machine.registers["%r5"] == 128).all()
    machine = run(
        start + add.replace("add.u32", "or.b32").replace("1;", "%r90;") + BARRIER + LOAD_FIRST, threads=64, shared=4
    )
    assert not machine.faults and (machine.registers["%r5"] == 63).all()


# what makes `READY`, a product, its wait: fault -> code, all of it for operands in shared memory
PRODUCT_FAULTS = {
    "product of what was written since the last proxy fence": lambda one: FILL + BARRIER + one + COMMIT + WAIT,
    "product of what was written since the last barrier": lambda one: (
        FILL + "fence.proxy.async.shared::cta;\n" + one + COMMIT + WAIT
    ),
    "product of what nobody wrote": lambda one: one + COMMIT + WAIT,
    "operand overwritten while the product was under way": lambda one: (
        READY + one + COMMIT + BARRIER + "st.shared.b32 [%r91], 0;\n" + WAIT
    ),
    "sum of a product used before its wait": lambda one: READY + one + COMMIT + KEEP + WAIT,
    "ends with copies or products in flight": lambda one: READY + one + COMMIT,
    "a warp group's threads are not all there": lambda one: (
        READY + "setp.lt.s32 %p1, %r90, 64; @%p1 bra SKIP;" + one + COMMIT + WAIT + "SKIP: mov.b32 %r1, 0;"
    ),
}


@pytest.mark.parametrize("fault", PRODUCT_FAULTS)
def test_sees_of_products(fault):
    _, _, a_bytes, b_bytes, left, right = operands()
    code = ZERO + PRODUCT_FAULTS[fault](product(left, right))
    machine = run(code, a_bytes, b_bytes, np.zeros((128, 8), np.float32), threads=128, shared=16384)
    assert kinds(machine) == {fault}


def test_a_fence_of_one_warp_is_not_that_of_the_others():
    _, _, a_bytes, b_bytes, left, right = operands()
    code = ZERO + FILL + "setp.lt.s32 %p1, %r90, 32; @%p1 fence.proxy.async.shared::cta;\n" + BARRIER
    code += product(left, right) + COMMIT + WAIT
    machine = run(code, a_bytes, b_bytes, np.zeros((128, 8), np.float32), threads=128, shared=16384)
    assert kinds(machine) == {"product of what was written since the last proxy fence"}


def test_sees_products_of_copies_in_flight_and_what_they_read():
    _, _, a_bytes, b_bytes, left, right = operands()
    copy = "cp.async.cg.shared.global [%r92], [%d10], 0x10; cp.async.commit_group;\n"
    for code, fault in (
        (READY + BARRIER + copy + product(left, right) + COMMIT + WAIT + DONE, "product of a copy in flight"),
        (
            READY + product(left, right) + COMMIT + BARRIER + copy + WAIT + DONE,
            "operand overwritten while the product was under way",
        ),
    ):
        machine = run(ZERO + code, a_bytes, b_bytes, np.zeros((128, 8), np.float32), threads=128, shared=16384)
        assert fault in kinds(machine)


def test_sees_of_bulk_copies():
    machine, _, _ = run_bulk(BULK + READ_BULK + WAIT_FOR_BULK)
    assert kinds(machine) == {"read of a copy in flight"}
    assert kinds(run_bulk(BULK)[0]) == {"ends with copies or products in flight"}
    again = WAIT_FOR_BULK.replace("], 0;", "], 1;").replace("waitLoop", "again")
    assert kinds(run_bulk(BULK + WAIT_FOR_BULK + again)[0]) == {"waits for ever at an mbarrier"}
