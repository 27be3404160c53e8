"""The definition of `grouped_gemm`."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_gemm_reference(x: Tensor, w: Tensor, offs: Tensor | None, bias: Tensor | None) -> Tensor:
    """One matrix product per group; 0 where no group reaches."""
    if offs is None:
        return x @ w  # (E, M, K) @ (E, K, N)
    if offs.is_meta:  # there are no values to read, and only the shape matters
        offs = torch.zeros_like(offs, device="cpu")
    ends = offs.tolist()
    groups = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    if x.dim() == 2 and w.dim() == 3:
        rows = [x[group] @ w[e] for e, group in enumerate(groups)]
        if bias is not None:
            rows = [row + bias[e] for e, row in enumerate(rows)]
        return torch.cat([*rows, x.new_zeros(x.shape[0] - ends[-1], w.shape[2])])  # (R, N)
    if x.dim() == 3:
        columns = [x[e] @ w[:, group] for e, group in enumerate(groups)]
        return torch.cat([*columns, x.new_zeros(x.shape[1], w.shape[1] - ends[-1])], dim=1)  # (M, R)
    return torch.stack([x[:, group] @ w[group] for group in groups])  # (E, M, N)
