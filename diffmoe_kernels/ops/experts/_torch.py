"""`experts` on `torch.nn.functional.grouped_mm`, without a host sync where that has a fast path.

Where Triton's kernels run they gather, activate and combine, as one operator that keeps what the kernels of
`_triton.py` keep; elsewhere PyTorch does, on a CPU between products of groups that are padded once.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from diffmoe_kernels.checks import at_least_float32
from diffmoe_kernels.ops.experts.reference import activate, experts_reference
from diffmoe_kernels.ops.grouped_gemm._torch import (
    multiply_groups,
    multiply_rows,
    pad_groups,
    padded_rows,
    pads_groups,
    why_not_sizes,
)
from diffmoe_kernels.ops.grouped_gemm._traced import traceable_reference
from diffmoe_kernels.routing import Routing
from diffmoe_kernels.triton_support import HAS_TRITON


def experts_torch(x: Tensor, routing: Routing, up_proj: Tensor, down_proj: Tensor, **options: Any) -> Tensor:
    if routing.num_rows == 0:  # there is no product to make
        return experts_reference(x, routing, up_proj, down_proj, gemm=traceable_reference, **options)
    if takes_kernels(x, routing, up_proj, down_proj, **options):
        from diffmoe_kernels.ops.experts._library import experts_on_kernels

        return experts_on_kernels(x, routing, up_proj, down_proj, products="grouped_mm", **options)
    if pads_groups(x):
        return _experts_padded(x, routing, up_proj, down_proj, **options)
    return experts_reference(x, routing, up_proj, down_proj, gemm=multiply_rows, **options)


def _experts_padded(
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
) -> Tensor:
    """`experts_reference` with room in small groups. Rows that are none read one token more than there are, of zeros,
    and are added to it, with a gate of 0: nothing has to be masked."""
    up_proj, down_proj = up_proj.to(x.dtype), down_proj.to(x.dtype)
    up_bias, down_bias = (None if bias is None else bias.to(x.dtype) for bias in (up_bias, down_bias))
    places, offs = pad_groups(routing.group_offsets, routing.num_rows)
    places, size, valid = places.long(), padded_rows(routing.num_rows, offs), routing.row_is_valid
    tokens = routing.token_indices.where(valid, routing.num_tokens)
    tokens = tokens.new_full((size,), routing.num_tokens).index_copy(0, places, tokens)
    gates = routing.gates.new_zeros(size).index_copy(0, places, routing.gates.where(valid, 0))

    rows = F.pad(x, (0, 0, 0, 1)).index_select(0, tokens)  # (R + padding, D)
    hidden = activate(multiply_groups(rows, up_proj.mT, offs, up_bias), activation)
    hidden = F.dropout(hidden, dropout) if dropout else hidden
    rows = multiply_groups(hidden, down_proj.mT, offs, down_bias)
    weighted = at_least_float32(rows) * gates.unsqueeze(1)
    out = weighted.new_zeros(routing.num_tokens + 1, x.shape[1]).index_add(0, tokens, weighted)
    out = out[:-1].to(rows.dtype)
    return out if residual is None else out + residual


def takes_kernels(x: Tensor, *args: Any, **options: Any) -> bool:
    """Whether the kernels between the products can run."""
    if not HAS_TRITON or not x.is_cuda:
        return False
    from diffmoe_kernels.ops.experts import _library

    return _library.why_not(x, *args, **options) is None


def why_not(x: Tensor, routing: Routing, up_proj: Tensor, down_proj: Tensor, **options: Any) -> str | None:
    return why_not_sizes(x, max(routing.num_rows, 1), *up_proj.shape[1:], *down_proj.shape[1:])
