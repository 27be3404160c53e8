"""Rotary position tables: one angle per pair of channels."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

ROPES = ("1d", "2d", "2d_interleaved")


def rope_table(
    rope: str, head_dim: int, grid_size: tuple[int, int] | int, *, base: float = 10000.0, device=None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding (arXiv:2104.09864), as `rope_attention` takes them.

    Args:
        rope: "1d": pair j of position n turns by n * base^(-2j / head_dim). "2d" and "2d_interleaved": the first half
            of the pairs turns by the row, the second by the column, each by base^(-4j / head_dim).
        head_dim: channels of a head; even for "1d", a multiple of 4 for the others.
        grid_size: (rows, columns) of the token grid in row-major order, or one int: the number of positions for "1d",
            the side of a square for the others.
        base: frequencies fall geometrically from 1 towards 1 / base.

    Returns:
        cos, sin: (N, head_dim / 2) float32.

    Raises:
        TypeError: a grid_size that is not made of integers.
        ValueError: an unknown rope, a head_dim that does not divide, or a grid_size that is not one or two sizes of 0
            or more.
    """
    check_rope(rope, head_dim)
    rows, columns = grid_of(rope, grid_size)
    if rope == "1d":
        angles = _angles(rows * columns, head_dim, base, device)  # (N, head_dim / 2)
    else:
        by_row = _angles(rows, head_dim // 2, base, device).repeat_interleave(columns, dim=0)
        by_column = _angles(columns, head_dim // 2, base, device).repeat(rows, 1)
        angles = torch.cat([by_row, by_column], dim=1)
    return angles.cos(), angles.sin()


def grid_of(rope: str | None, grid_size: tuple[int, int] | int) -> tuple[int, int]:
    """(rows, columns) of a grid_size as `rope_table` takes it, which raises for others as told there."""
    sizes = grid_size if isinstance(grid_size, tuple | list) else (1, grid_size) if rope == "1d" else (grid_size,) * 2
    try:
        # What is an int already stays: index() would fix a size that a compiler traces.
        sizes = tuple(size if isinstance(size, int | torch.SymInt) else operator.index(size) for size in sizes)
    except TypeError:
        raise TypeError(f"grid_size: expected integers, got {grid_size!r}") from None
    if len(sizes) != 2 or min(sizes) < 0:
        raise ValueError(f"grid_size: expected one or two sizes of 0 or more, got {grid_size!r}")
    return sizes


def check_rope(rope: str, head_dim: int) -> None:
    """Raises ValueError where ``rope`` is unknown or can't turn heads of ``head_dim`` channels."""
    if rope not in ROPES:
        raise ValueError(f"rope: expected one of {', '.join(map(repr, ROPES))} or None, got {rope!r}")
    multiple = 2 if rope == "1d" else 4
    if head_dim < multiple or head_dim % multiple:
        raise ValueError(f"head_dim: expected a multiple of {multiple} for rope {rope!r}, got {head_dim}")


def _angles(length: int, dim: int, base: float, device) -> Tensor:
    """(length, dim / 2): position times frequency base^(-2j / dim), in float32 as the official code computes it."""
    frequencies = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    return torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
