"""Formats of numbers. Those of 16 bits are held as their bits, and computed with as float32."""

from __future__ import annotations

import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
TYPES: dict[str, np.dtype] = {
    **{f"s{8 * size}": np.dtype(SIGNED[size]) for size in SIGNED},
    **{f"{kind}{8 * size}": np.dtype(UNSIGNED[size]) for size in UNSIGNED for kind in "ub"},
    **{"f16": np.dtype(np.uint16), "bf16": np.dtype(np.uint16)},
    **{"f16x2": np.dtype(np.uint32), "bf16x2": np.dtype(np.uint32)},
    **{"f32": np.dtype(np.float32), "f64": np.dtype(np.float64), "pred": np.dtype(bool)},
}
HALVES = ("f16", "bf16", "f16x2", "bf16x2")


def widen(bits: np.ndarray, kind: str) -> np.ndarray:
    """uint16 to float32."""
    if kind.startswith("bf16"):
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)


def narrow(numbers: np.ndarray, kind: str) -> np.ndarray:
    """float32 to uint16, to nearest even."""
    numbers = np.ascontiguousarray(numbers, np.float32)
    if not kind.startswith("bf16"):
        with np.errstate(over="ignore"):
            return np.where(np.isnan(numbers), np.uint16(0x7FFF), numbers.astype(np.float16).view(np.uint16))
    bits = numbers.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(numbers), np.uint32(0x7FFF), rounded).astype(np.uint16)


def halves(packed: np.ndarray) -> np.ndarray:
    """The 16-bit numbers in each, lower first: (n,) to (n, 1) of uint16 or (n, 2) of uint32."""
    return np.ascontiguousarray(packed)[:, None].view(np.uint16)


def pack(parts: np.ndarray) -> np.ndarray:
    """What `halves` took apart."""
    return np.ascontiguousarray(parts).view(UNSIGNED[2 * parts.shape[-1]])[:, 0]


def tf32(bits: np.ndarray) -> np.ndarray:
    """What the tensor cores read of a float32."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def unpacked(registers: np.ndarray, kind: str) -> np.ndarray:
    """(..., registers) of uint32 to (..., registers, numbers) of float32."""
    if kind in ("tf32", "f32"):
        return (tf32(registers) if kind == "tf32" else registers.view(np.float32))[..., None]
    return widen(np.ascontiguousarray(registers)[..., None].view(np.uint16), kind)
