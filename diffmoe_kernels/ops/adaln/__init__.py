"""Adaptive layer norm (adaLN-Zero, arXiv:2212.09748): norm + modulate, the gated residual, and both at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffmoe_kernels.backend import Backend, Implementation, pytorch_only, run
from diffmoe_kernels.checks import check_choice, check_floating, check_same_device, check_shape
from diffmoe_kernels.measured import fastest, movement_class
from diffmoe_kernels.ops.adaln.reference import (
    adaln_reference,
    gated_residual_adaln_reference,
    gated_residual_reference,
)
from diffmoe_kernels.triton_support import HAS_TRITON

NORMS = ("layernorm", "rmsnorm")


def adaln(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    norm: str = "layernorm",
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """``norm(x) * weight * (1 + scale) + shift``, the norm over the last dimension.

    Args:
        x: (B, N, D) floating.
        shift, scale: (B, D) floating, one per sample; they may have another dtype than x.
        weight: (D,) floating, learnable scale of the norm.
        norm: "layernorm" or "rmsnorm".
        eps: added to the mean square.
        dtype: of the result, floating, such as that of the product that reads it; x's where None.
        backend: see `diffmoe_kernels.backend`.

    Returns:
        (B, N, D) in ``dtype``; arithmetic is float32 (float64 for float64).

    Raises:
        TypeError: tensors or a dtype that are not floating.
        ValueError: shapes, devices or a norm that do not fit.
    """
    check_choice("norm", norm, NORMS)
    _check(x, weight=weight, shift=shift, scale=scale)
    return run("adaln", backend, _ADALN, x, shift, scale, weight, norm, eps, _floating(dtype or x.dtype))


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, *, backend: Backend = "auto") -> Tensor:
    """``x + gate * y``.

    Args:
        x: (B, N, D) floating, the residual stream.
        y: (B, N, D) floating, the branch's output; it may have another dtype than x.
        gate: (B, D) floating, one per sample.
        backend: see `diffmoe_kernels.backend`.

    Returns:
        (B, N, D) in x's dtype; arithmetic is float32 (float64 for float64).

    Raises:
        TypeError: tensors that are not floating.
        ValueError: shapes or devices that do not fit.
    """
    _check(x, y=y, gate=gate)
    return run("gated_residual", backend, _GATED_RESIDUAL, x, y, gate)


def gated_residual_adaln(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    norm: str = "layernorm",
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`gated_residual`, then `adaln` of its result, in one pass.

    Args:
        x, y, gate: see `gated_residual`.
        shift, scale, weight, norm, eps, dtype: see `adaln`; dtype is of the second result.
        backend: see `diffmoe_kernels.backend`.

    Returns:
        (x + gate * y, its modulated norm), each (B, N, D), the first in x's dtype, the second in ``dtype``; the norm is
        of the first as it is rounded.

    Raises:
        TypeError: tensors or a dtype that are not floating.
        ValueError: shapes, devices or a norm that do not fit.
    """
    check_choice("norm", norm, NORMS)
    _check(x, y=y, weight=weight, gate=gate, shift=shift, scale=scale)
    kind = _floating(dtype or x.dtype)
    return run("gated_residual_adaln", backend, _BOTH, x, y, gate, shift, scale, weight, norm, eps, kind)


def _check(x: Tensor, *, weight: Tensor | None = None, **tensors: Tensor) -> None:
    """Refuses what does not fit: y is like x, the others are one vector a sample."""
    check_floating("x", x)
    check_shape("x", x, "B", "N", "D")
    for name, tensor in tensors.items():
        check_floating(name, tensor)
        check_shape(name, tensor, *(x.shape if name == "y" else (x.shape[0], x.shape[2])))
    check_floating("weight", weight, optional=True)
    check_shape("weight", weight, x.shape[2])
    check_same_device(x=x, weight=weight, **tensors)


def _floating(dtype: torch.dtype) -> torch.dtype:
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
    return dtype


def _shape_class(x: Tensor, *_: object) -> str:
    return movement_class(x.shape[0] * x.shape[1], x.dtype)


_ADALN = pytorch_only(adaln_reference)
_GATED_RESIDUAL = pytorch_only(gated_residual_reference)
_BOTH = pytorch_only(gated_residual_adaln_reference)
if HAS_TRITON:
    from diffmoe_kernels.ops.adaln import _library

    def _kernel(op: str, function: Callable[..., Any]) -> dict[str, Implementation]:
        return {"triton": Implementation(function, _library.why_not, automatic=fastest(op, "triton", _shape_class))}

    _ADALN = _kernel("adaln", _library.adaln_triton) | _ADALN
    _GATED_RESIDUAL = _kernel("gated_residual", _library.gated_residual_triton) | _GATED_RESIDUAL
    _BOTH = _kernel("gated_residual_adaln", _library.gated_residual_adaln_triton) | _BOTH
