"""`grouped_gemm` through `torch.nn.functional.grouped_mm`: no host sync."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def grouped_gemm_torch(x: Tensor, w: Tensor, offs: Tensor | None, bias: Tensor | None) -> Tensor:
    out = F.grouped_mm(x, w, offs=offs)
    if offs is None or x.dim() == w.dim():
        return out
    # grouped_mm leaves what no group reaches uninitialised, in its input gradient too: the mask stops both.
    dim = 0 if x.dim() == 2 else 1
    places = torch.arange(out.shape[dim], device=out.device, dtype=torch.int32)
    if bias is not None:
        group = torch.searchsorted(offs, places, right=True).clamp(max=offs.shape[0] - 1)
        out = out + bias.index_select(0, group)
    valid = places < offs[-1]
    return out.where(valid.unsqueeze(1 - dim), 0)


def why_not(x: Tensor, w: Tensor, offs: Tensor | None, bias: Tensor | None) -> str | None:
    # The sizes that are strides of an operand, of the result or of a gradient: all but the one that offs divides.
    sizes = {(2, 3): (*x.shape[1:], *w.shape[2:]), (3, 2): x.shape[1:], (2, 2): (x.shape[0], w.shape[1])}
    for tensor in (x, w):
        if any(stride != 1 and stride * tensor.element_size() % 16 for stride in tensor.stride()):
            return f"grouped_mm wants strides of whole 16 bytes, got {tensor.stride()} in {tensor.dtype}"
    return why_not_sizes(x, min(x.numel(), w.numel()), *sizes.get((x.dim(), w.dim()), (*x.shape[1:], w.shape[2])))


def why_not_sizes(x: Tensor, rows: int, *sizes: int) -> str | None:
    """Why grouped_mm can't multiply ``rows`` rows of x's dtype between matrices of these sizes, or None."""
    if x.dtype not in _DTYPES:
        return f"grouped_mm takes bfloat16, float16 and float32, not {x.dtype}"
    if torch.compiler.is_compiling() and x.dtype != torch.bfloat16:
        return "under torch.compile grouped_mm takes bfloat16 only"
    if rows == 0:
        return "grouped_mm takes no empty operand"
    for size in sizes:
        if size * x.element_size() % 16:
            return f"grouped_mm wants strides of whole 16 bytes, got a size of {size} in {x.dtype}"
    return None
