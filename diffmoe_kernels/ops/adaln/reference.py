"""The definition of the `adaln` ops."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe_kernels.checks import at_least_float32


def adaln_reference(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, norm: str, eps: float) -> Tensor:
    """(B, N, D), (B, D), (B, D) -> norm(x) * (1 + scale) + shift, in float32 until the end."""
    normed = normalize(at_least_float32(x), norm, weight, None, eps)
    return (normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)).to(x.dtype)


def gated_residual_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """(B, N, D), (B, N, D), (B, D) -> x + gate * y, in float32 until the end."""
    return (at_least_float32(x) + gate.unsqueeze(1) * at_least_float32(y)).to(x.dtype)


def normalize(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm or RMSNorm over the last dimension, with optional scale and shift."""
    if norm == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias
