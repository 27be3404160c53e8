"""Adaptive layer norm (adaLN-Zero, arXiv:2212.09748): norm + modulate, and the gated residual."""

from __future__ import annotations

from torch import Tensor

from diffmoe_kernels.backend import Backend, Implementation, run
from diffmoe_kernels.checks import check_choice, check_floating, check_same_device, check_shape
from diffmoe_kernels.ops.adaln.reference import adaln_reference, gated_residual_reference

NORMS = ("layernorm", "rmsnorm")


def adaln(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    norm: str = "layernorm",
    eps: float = 1e-6,
    backend: Backend = "auto",
) -> Tensor:
    """``norm(x) * weight * (1 + scale) + shift``, the norm over the last dimension.

    Args:
        x: (B, N, D) floating.
        shift, scale: (B, D) floating, one per sample; they may have another dtype than x.
        weight: (D,) floating, learnable scale of the norm.
        norm: "layernorm" or "rmsnorm".
        eps: added to the mean square.
        backend: see `diffmoe_kernels.backend`.

    Returns:
        (B, N, D) in x's dtype; arithmetic is float32 (float64 for float64).

    Raises:
        TypeError: tensors that are not floating.
        ValueError: shapes, devices or a norm that do not fit.
    """
    check_choice("norm", norm, NORMS)
    _check(x, shift=shift, scale=scale)
    check_floating("weight", weight)
    check_shape("weight", weight, x.shape[2])
    check_same_device(x=x, weight=weight)
    return run("adaln", backend, _ADALN, x, shift, scale, weight, norm, eps)


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
    _check(x, gate=gate)
    check_floating("y", y)
    check_shape("y", y, *x.shape)
    check_same_device(x=x, y=y)
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
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`gated_residual`, then `adaln` of its result: (x + gate * y, its modulated norm), each (B, N, D) in x's dtype."""
    x = gated_residual(x, y, gate, backend=backend)
    return x, adaln(x, shift, scale, weight=weight, norm=norm, eps=eps, backend=backend)


def _check(x: Tensor, **per_sample: Tensor) -> None:
    check_floating("x", x)
    check_shape("x", x, "B", "N", "D")
    for name, tensor in per_sample.items():
        check_floating(name, tensor)
        check_shape(name, tensor, x.shape[0], x.shape[2])
    check_same_device(x=x, **per_sample)


_ADALN = {"reference": Implementation(adaln_reference)}
_GATED_RESIDUAL = {"reference": Implementation(gated_residual_reference)}
