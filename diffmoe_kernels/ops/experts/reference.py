"""The definition of `experts`: gather, up-project, activate, down-project, weighted sum."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from diffmoe_kernels.ops.grouped_gemm.reference import grouped_gemm_reference
from diffmoe_kernels.ops.permute.reference import permute_reference, unpermute_reference
from diffmoe_kernels.routing import Routing


def experts_reference(
    x: Tensor,
    routing: Routing,
    up_proj: Tensor,
    down_proj: Tensor,
    *,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    dropout: float,
    residual: Tensor | None,
    gemm=grouped_gemm_reference,
) -> Tensor:
    """(T, D) -> (T, D); ``gemm`` multiplies rows (R, K) with weights (E, K, N)."""
    up_proj, down_proj = up_proj.to(x.dtype), down_proj.to(x.dtype)
    up_bias, down_bias = (None if bias is None else bias.to(x.dtype) for bias in (up_bias, down_bias))
    rows = permute_reference(x, routing)  # (R, D)
    hidden = activate(gemm(rows, up_proj.mT, routing.group_offsets, up_bias), activation)  # (R, I)
    hidden = F.dropout(hidden, dropout) if dropout else hidden
    rows = gemm(hidden, down_proj.mT, routing.group_offsets, down_bias)  # (R, D)
    out = unpermute_reference(rows, routing)
    return out if residual is None else out + residual


def activate(hidden: Tensor, activation: str) -> Tensor:
    """(..., 2I) -> (..., I) for "swiglu" (gate first), (..., I) -> (..., I) for the others."""
    if activation == "swiglu":
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate) * up
    return F.silu(hidden) if activation == "silu" else F.gelu(hidden, approximate="tanh")
