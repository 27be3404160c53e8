"""The definition of the `adaln` ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe_kernels.checks import at_least_float32


def adaln_reference(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, norm: str, eps: float, dtype: torch.dtype
) -> Tensor:
    """(B, N, D), (B, D), (B, D) -> norm(x) * (1 + scale) + shift, in float32 until the end."""
    normed = normalize(at_least_float32(x), norm, weight, None, eps)
    shift, scale = (vector.to(normed.dtype).unsqueeze(1) for vector in (shift, scale))
    return torch.addcmul(shift, normed, 1 + scale).to(dtype)


def gated_residual_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """(B, N, D), (B, N, D), (B, D) -> x + gate * y, in float32 until the end."""
    stream = at_least_float32(x)
    return torch.addcmul(stream, gate.to(stream.dtype).unsqueeze(1), y.to(stream.dtype)).to(x.dtype)


def gated_residual_adaln_reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    norm: str,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Both, the norm that of the rounded sum."""
    stream = gated_residual_reference(x, y, gate)
    return stream, adaln_reference(stream, shift, scale, weight, norm, eps, dtype)


def normalize(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm or RMSNorm over the last dimension, with optional scale and shift, in x's dtype."""
    weight, bias = (vector if vector is None else vector.to(x.dtype) for vector in (weight, bias))
    if norm == "layernorm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    x = F.rms_norm(x, x.shape[-1:], weight, eps)
    return x if bias is None else x + bias
