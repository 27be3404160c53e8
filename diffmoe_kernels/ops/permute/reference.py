"""The definition of `permute` and `unpermute`."""

from __future__ import annotations

from torch import Tensor

from diffmoe_kernels.checks import at_least_float32
from diffmoe_kernels.routing import Routing


def permute_reference(x: Tensor, routing: Routing) -> Tensor:
    """(T, D) -> (R, D): row r is token ``token_indices[r]``; 0 past the true count."""
    return x.index_select(0, routing.token_indices).where(routing.row_is_valid.unsqueeze(1), 0)


def unpermute_reference(rows: Tensor, routing: Routing) -> Tensor:
    """(R, D) -> (T, D): each token's sum of ``gates[r] * rows[r]``, accumulated in float32."""
    rows_read = rows.where(routing.row_is_valid.unsqueeze(1), 0)  # past the count rows may hold anything, NaN too
    weighted = at_least_float32(rows_read) * routing.gates.unsqueeze(1)
    out = weighted.new_zeros(routing.num_tokens, rows.shape[1])
    return out.index_add(0, routing.token_indices, weighted).to(rows.dtype)
