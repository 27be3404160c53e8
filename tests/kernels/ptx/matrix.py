"""Where the matrix instructions have their operands: in which thread's registers, and where in shared memory.

As the PTX ISA has them: the fragments of mma.m16n8k16 and mma.m16n8k8, of wgmma's accumulator and of its operand in
registers, and the matrix descriptor. The canonical layouts are those of CUTLASS's ``mma_sm90_desc.hpp``.
"""

from __future__ import annotations

import functools

import numpy as np

from tests.kernels.ptx.values import unpacked


@functools.cache
def fragment(which: str, k: int) -> list[np.ndarray]:
    """Rows and columns of the numbers that a warp's threads have of an operand of mma.m16n8: (32, registers, numbers).

    k: 16 of 16 bits, two in a register, or 8 of tf32.
    """
    lane, per = np.arange(32)[:, None, None], 2 if k == 16 else 1
    group, in_group, number = lane // 4, lane % 4, np.arange(per)
    if which == "a":
        r = np.arange(4)[:, None]
        return np.broadcast_arrays(group + 8 * (r % 2), in_group * per + number + k // 2 * (r // 2))
    if which == "b":
        r = np.arange(2)[:, None]
        return np.broadcast_arrays(in_group * per + number + k // 2 * r, group)
    r = np.arange(4)[:, None]
    return np.broadcast_arrays(group + 8 * (r // 2), in_group * 2 + r % 2)


def multiply(a: np.ndarray, b: np.ndarray, c: np.ndarray, kind: str, k: int) -> np.ndarray:
    """mma.m16n8 of warps: a (W, 32, 4), b (W, 32, 2), c (W, 32, 4), and the result as c; all uint32."""
    left, right, total = (np.empty((len(a), *shape), np.float32) for shape in ((16, k), (k, 8), (16, 8)))
    left[:, *fragment("a", k)] = unpacked(a, kind)
    right[:, *fragment("b", k)] = unpacked(b, kind)
    total[:, *fragment("c", k)] = unpacked(c, "f32")
    rows, columns = fragment("c", k)
    return (left @ right + total)[:, rows, columns][..., 0].view(np.uint32)


@functools.cache
def group_sum(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a warp group's accumulator: (128, n / 2)."""
    thread, i = np.arange(128)[:, None], np.arange(n // 2)
    warp, lane = thread // 32, thread % 32
    return 16 * warp + lane // 4 + 8 * (i % 4 // 2), 8 * (i // 4) + lane % 4 * 2 + i % 2


@functools.cache
def group_fragment(k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a warp group's first operand where it is in registers: (128, 4, numbers)."""
    rows, columns = fragment("a", k)
    return np.concatenate([rows + 16 * warp for warp in range(4)]), np.tile(columns, (4, 1, 1))


@functools.lru_cache(1024)
def operand_addresses(descriptor: int, span: int, k: int, size: int, transposed: bool) -> np.ndarray:
    """Byte addresses of a warp group's operand in shared memory: (span, k), where span is M or N.

    size: of a number. transposed: M or N lie side by side, rather than K.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise NotImplementedError("the base offset of a matrix descriptor")
    mode = descriptor >> 62
    row = (16, 128, 64, 32)[mode]  # bytes of a swizzled row
    unit = row // size
    i, j = np.arange(span)[:, None], np.arange(k)
    if transposed:
        between_spans, between_k = (stride, leading) if mode == 0 else (leading, stride)
        at = i % unit * size + i // unit * between_spans + j % 8 * row + j // 8 * between_k
    elif mode == 0:
        at = i % 8 * row + i // 8 * stride + j % unit * size + j // unit * leading
    else:
        at = i % 8 * row + i // 8 * stride + j * size
    return swizzled(start + at, row)


def swizzled(addresses: np.ndarray, row: int) -> np.ndarray:
    """Units of 16 bytes change places within rows of so many bytes, by the number of the row of 128."""
    return addresses ^ ((addresses >> 7 & (row // 16 - 1)) << 4)
