"""`permute` and `unpermute` by the extension: csrc/permute.cu. The functions are those of `_triton`."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe_kernels.cuda_support import TYPES, address, extension, stream_of


def permute_fwd(x: Tensor, token_indices: Tensor, group_offsets: Tensor) -> Tensor:
    """(T, D) -> (R, D): row r is token ``token_indices[r]``; not written past the last group."""
    out = x.new_empty(token_indices.shape[0], x.shape[1])
    tensors = map(address, (x, token_indices, group_offsets, out))
    extension.permute_fwd(*tensors, group_offsets.shape[0], *out.shape, TYPES[x.dtype], stream_of(x))
    return out


def unpermute_fwd(rows: Tensor, gates: Tensor | None, token_offsets: Tensor, token_rows: Tensor) -> Tensor:
    """(R, D) -> (T, D): each token's rows, weighted and summed in float32 in a fixed order."""
    out = rows.new_empty(token_offsets.shape[0] - 1, rows.shape[1])
    tensors = map(address, (rows, gates, token_offsets, token_rows, out))
    extension.unpermute_fwd(*tensors, *out.shape, TYPES[rows.dtype], stream_of(rows))
    return out


def unpermute_bwd(
    grad_out: Tensor, rows: Tensor, gates: Tensor, token_indices: Tensor, group_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `unpermute_fwd` by its rows (R, D) and gates (R,); 0 past the last group."""
    grad_rows, grad_gates = torch.empty_like(rows), torch.empty_like(gates)
    tensors = map(address, (rows, gates, token_indices, group_offsets, grad_out, grad_rows, grad_gates))
    extension.unpermute_bwd(*tensors, group_offsets.shape[0], *rows.shape, TYPES[rows.dtype], stream_of(rows))
    return grad_rows, grad_gates
