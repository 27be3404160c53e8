"""`grouped_gemm` through `torch.nn.functional.grouped_mm`, and where that synchronizes with the host."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe_kernels.measured import capability_of
from diffmoe_kernels.ops.grouped_gemm._traced import has_no_values, products

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FEWEST_ROWS = 16  # below it a CPU's matrix product takes another routine, whose rounding is another
_DIVIDED = {(2, 3): (0, None), (2, 2): (1, 0), (3, 2): (None, 1), (3, 3): (None, None)}  # by offs, of x and of w


def grouped_gemm_torch(x: Tensor, w: Tensor, offs: Tensor | None, bias: Tensor | None) -> Tensor:
    dim_x, dim_w = _DIVIDED[x.dim(), w.dim()]
    if offs is not None and not traces(x):
        return products(x, w, offs, bias, False)
    # grouped_mm's input gradients are uninitialised where no group reaches: the masks stop them here.
    x, w = _reached(x, offs, dim_x), _reached(w, offs, dim_w)
    if (x.dim(), w.dim()) == (2, 3):
        return multiply_rows(x, w, offs, bias)
    if (x.dim(), w.dim()) == (3, 2):
        # Transposed: in columns of its result, too, grouped_mm asserts that groups begin at whole 16 bytes.
        return multiply_rows(w.mT, x.mT, offs, None).mT
    if offs is None and not traces(x):
        return torch.bmm(x, w)
    return _AlignedGradient.apply(F.grouped_mm(_aligned(x, dim_x), _aligned(w, dim_w), offs=offs), None)


def multiply_rows(x: Tensor, w: Tensor, offs: Tensor, bias: Tensor | None) -> Tensor:
    """(R, K), (E, K, N) -> (R, N), 0 past the last group; there the gradient of x is uninitialised."""
    if not pads_groups(x):
        return _reached(multiply_groups(x, w, offs, bias), offs, 0)
    places, offs_padded = pad_groups(offs, x.shape[0])
    padded = x.new_zeros(padded_rows(x.shape[0], offs), x.shape[1]).index_copy(0, places.long(), x)
    return _reached(multiply_groups(padded, w, offs_padded, bias).index_select(0, places), offs, 0)


def multiply_groups(x: Tensor, w: Tensor, offs: Tensor, bias: Tensor | None) -> Tensor:
    """The same with anything past the last group, which gets no bias and gives it no gradient."""
    offs = offs.int()  # a record may have others
    if not traces(x):
        return products(x, w, offs, bias, False)
    if not torch.compiler.is_compiling() and torch.is_anomaly_enabled():
        # It looks at gradients past the last group, too, which nothing writes and nothing reads.
        offs = torch.cat([offs[:-1], offs.new_tensor([x.shape[0]])])
    out = F.grouped_mm(_aligned(x, 0), _aligned(w, None), offs=offs)
    if not pads_groups(x):  # else its gradient is new memory, laid out well
        out = _AlignedGradient.apply(out, 0)  # breaks Dynamo where a size comes from a float
    if bias is not None:
        group = torch.searchsorted(offs, _arange(x.shape[0], offs), right=True)  # past the last one there is one more
        out = out + F.pad(bias, (0, 0, 0, 1)).index_select(0, group)
    return out


def pads_groups(x: Tensor) -> bool:
    """Whether products of x want `pad_groups`."""
    return x.device.type == "cpu"


def padded_rows(num_rows: int, offs: Tensor) -> int:
    """How many rows there are at most once `pad_groups` has made room."""
    return num_rows + _FEWEST_ROWS * len(offs)


def pad_groups(offs: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Where rows lie once small groups have room for more, so that a row's bits do not depend on how many are with it.

    Returns:
        places: (R,), of rows past the last group, too.
        offs: (E,), where the groups end then.
    """
    offs = offs.int()
    sizes = offs.diff(prepend=offs.new_zeros(1))
    added = (_FEWEST_ROWS - sizes).clamp(min=0).where(sizes > 0, 0)
    added_before = F.pad(added.cumsum(0, dtype=offs.dtype), (1, 0))  # (E + 1,), the last for rows past all groups
    rows = _arange(num_rows, offs)
    places = rows + added_before.index_select(0, torch.searchsorted(offs, rows, right=True))
    return places, offs + added_before[1:]


def why_not(x: Tensor, w: Tensor, offs: Tensor | None, bias: Tensor | None) -> str | None:
    sizes = [size for dim, size in enumerate(x.shape[-2:]) if dim != _DIVIDED[x.dim(), w.dim()][0]]
    sizes += [size for dim, size in enumerate(w.shape[-2:]) if dim != _DIVIDED[x.dim(), w.dim()][1]]
    return why_not_sizes(x, min(x.numel(), w.numel()), *sizes)


def traces(x: Tensor) -> bool:
    """Whether PyTorch can trace grouped_mm for x, if it has to."""
    return x.dtype == torch.bfloat16 or not has_no_values(x)


def why_not_sizes(x: Tensor, rows: int, *sizes: int) -> str | None:
    """Why grouped_mm can't multiply ``rows`` rows of x's dtype between matrices of these sizes, or None."""
    if x.dtype not in _DTYPES:
        return f"grouped_mm takes bfloat16, float16 and float32, not {x.dtype}"
    if rows == 0:
        return "grouped_mm takes no empty operand"
    for size in sizes:
        if size * x.element_size() % 16:
            return f"grouped_mm wants strides of whole 16 bytes, got a size of {size} in {x.dtype}"
    return None


def syncs_with_host(x: Tensor) -> bool:
    """Whether grouped_mm reads the offsets back to the host: PyTorch has a fast path in bfloat16 on Hopper and
    Blackwell only, else `_grouped_mm_fallback` (`GroupedMMUtils.h`), one product a group."""
    capability = capability_of(x.device)
    return capability is not None and not (x.dtype == torch.bfloat16 and capability.split(".")[0] in ("9", "10"))


class _AlignedGradient(torch.autograd.Function):
    """The identity; its gradient comes back laid out as grouped_mm's backward takes it."""

    @staticmethod
    def forward(ctx, out: Tensor, divided: int | None) -> Tensor:
        ctx.divided = divided
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _aligned(grad, ctx.divided), None


def _aligned(matrix: Tensor, divided: int | None) -> Tensor:
    """The same numbers from 16 bytes on, with one stride of 1 and one of whole 16 bytes, the latter on dim ``divided``.

    There groups may begin anywhere; on the other one grouped_mm wants every group to begin at whole 16 bytes.
    """
    rows, columns = matrix.shape[-2:]
    row_major, column_major = (-2, -1, columns), (-1, -2, rows)
    for long, short, size in {0: [row_major], 1: [column_major], None: [row_major, column_major]}[divided]:
        stride = matrix.stride(long)
        is_aligned = stride * matrix.element_size() % 16 == 0 and _begins_aligned(matrix)
        if matrix.stride(short) == 1 and stride >= size and is_aligned:
            return matrix
    if divided == 1:
        return matrix.mT.clone(memory_format=torch.contiguous_format).mT
    return matrix.clone(memory_format=torch.contiguous_format)


def _begins_aligned(matrix: Tensor) -> bool:
    """At whole 16 bytes of its storage. Dynamo can't tell; what inductor allocates does."""
    return torch.compiler.is_compiling() or matrix.storage_offset() * matrix.element_size() % 16 == 0


def _reached(matrix: Tensor, offs: Tensor | None, dim: int | None) -> Tensor:
    """The matrix with 0 past the last group on dimension ``dim``, if that is divided."""
    if dim is None:
        return matrix
    reached = _arange(matrix.shape[dim], offs) < offs[-1]
    return matrix.where(reached.unsqueeze(1) if dim == 0 else reached, 0)


def _arange(length: int, like: Tensor) -> Tensor:
    return torch.arange(length, device=like.device, dtype=torch.int32)
