"""The `adaln` ops in Triton: one pass forward, one and a sum of parts backward, no atomics, the same bits every run.

B samples, N tokens, D = hidden size. A program takes some tokens of one sample, a few at a time, each row whole, so the
norm's moments cost no further pass; the backward computes them again and nothing is kept for it but inputs and outputs.
Shapes of a kernel's pointers stand above it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmoe_kernels.triton_support import cdiv, next_power_of_2

# Tokens of a program, that share its sample's vectors: few where there are not BUSY. MOST in the backward of both ops,
# whose registers leave room for three programs on a multiprocessor: DSMoE-L's 16,384 tokens in one wave of an H200.
MOST, MANY, FEW, BUSY = 48, 32, 8, 8192
FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 32, 16  # of each tensor that a thread holds at a time
SUMMED_PARTS, SUMMED_COLUMNS = 8, 64  # of a block of the second kernel


@triton.jit
def _load_vector(vector, columns, D: tl.constexpr):
    return tl.load(vector + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _standardize(values, in_rows, columns, eps, D: tl.constexpr, NORM: tl.constexpr):
    """The norm before any scale, and its reciprocal (BLOCK_N, 1), finite where there is no row."""
    if NORM == "layernorm":
        values = tl.where((columns < D)[None, :], values - (tl.sum(values, 1) / D)[:, None], 0.0)
    variance = tl.sum(values * values, 1) / D
    reciprocal = (1.0 / tl.sqrt(tl.where(in_rows, variance + eps, 1.0)))[:, None]
    return values * reciprocal, reciprocal


# x, y (B, N, D), gate, shift, scale (B, D), weight (D,) -> stream = x + gate * y, out = its modulated norm, (B, N, D).
# None: y and gate without a residual, shift and scale without a norm, weight where the norm has none
@triton.jit
def _adaln_fwd_kernel(
    x,
    y,
    gate,
    shift,
    scale,
    weight,
    stream,
    out,
    gate_stride,
    shift_stride,
    scale_stride,
    num_tokens,
    eps,
    D: tl.constexpr,
    NORM: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    num_chunks = tl.cdiv(num_tokens, TOKENS)
    sample, first = (tl.program_id(0) // num_chunks).to(tl.int64), tl.program_id(0) % num_chunks * TOKENS
    columns = tl.arange(0, BLOCK_D)
    if gate is not None:
        gates = _load_vector(gate + sample * gate_stride, columns, D)
    if scale is not None:
        factors = 1.0 + _load_vector(scale + sample * scale_stride, columns, D)
        if weight is not None:
            factors *= _load_vector(weight, columns, D)
        shifts = _load_vector(shift + sample * shift_stride, columns, D)
    for start in range(0, TOKENS, BLOCK_N):
        tokens = first + start + tl.arange(0, BLOCK_N)
        in_rows = tokens < num_tokens
        mask = in_rows[:, None] & (columns < D)[None, :]
        at = (sample * num_tokens + tokens)[:, None] * D + columns[None, :]
        values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if gate is not None:
            rounded = (values + gates * tl.load(y + at, mask=mask, other=0.0).to(tl.float32)).to(x.dtype.element_ty)
            tl.store(stream + at, rounded, mask=mask)
            values = rounded.to(tl.float32)  # the norm is of what is written
        if scale is not None:
            normed, _ = _standardize(values, in_rows, columns, eps, D, NORM)
            tl.store(out + at, (normed * factors + shifts).to(out.dtype.element_ty), mask=mask)


# grad_stream, grad_out, stream, y (B, N, D), gate, scale (B, D), weight (D,) -> grad_x, grad_y (B, N, D), and
# parts (B * chunks, KINDS, D): sums over a chunk's tokens of grad_stream * y, grad_out and grad_out * norm. None as
# above, and a gradient that there is not
@triton.jit
def _adaln_bwd_kernel(
    grad_stream,
    grad_out,
    stream,
    y,
    gate,
    scale,
    weight,
    grad_x,
    grad_y,
    parts,
    gate_stride,
    scale_stride,
    num_tokens,
    eps,
    D: tl.constexpr,
    NORM: tl.constexpr,
    KINDS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    num_chunks = tl.cdiv(num_tokens, TOKENS)
    sample, first = (tl.program_id(0) // num_chunks).to(tl.int64), tl.program_id(0) % num_chunks * TOKENS
    columns = tl.arange(0, BLOCK_D)
    if gate is not None:
        gates = _load_vector(gate + sample * gate_stride, columns, D)
        by_gate = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if scale is not None:
        factors = 1.0 + _load_vector(scale + sample * scale_stride, columns, D)
        if weight is not None:
            factors *= _load_vector(weight, columns, D)
        by_shift = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        by_factor = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, TOKENS, BLOCK_N):
        tokens = first + start + tl.arange(0, BLOCK_N)
        in_rows = tokens < num_tokens
        mask = in_rows[:, None] & (columns < D)[None, :]
        at = (sample * num_tokens + tokens)[:, None] * D + columns[None, :]
        # All that a step reads is under way before its first sum, which waits for every warp.
        if grad_stream is not None:
            streamed = tl.load(grad_stream + at, mask=mask, other=0.0)
        if gate is not None:
            branch = tl.load(y + at, mask=mask, other=0.0)
        if scale is not None:
            values = tl.load(stream + at, mask=mask, other=0.0)
            grads = tl.load(grad_out + at, mask=mask, other=0.0).to(tl.float32)
            normed, reciprocal = _standardize(values.to(tl.float32), in_rows, columns, eps, D, NORM)
            by_shift += grads
            by_factor += grads * normed
            grads *= factors
            by_values = grads - normed * (tl.sum(grads * normed, 1) / D)[:, None]
            if NORM == "layernorm":
                by_values -= (tl.sum(grads, 1) / D)[:, None]
            by_values *= reciprocal
            if grad_stream is not None:
                by_values += streamed.to(tl.float32)
            tl.store(grad_x + at, by_values.to(grad_x.dtype.element_ty), mask=mask)
        else:
            by_values = streamed.to(tl.float32)
        if gate is not None:
            by_gate += by_values * branch.to(tl.float32)
            tl.store(grad_y + at, (by_values * gates).to(grad_y.dtype.element_ty), mask=mask)
    parts += tl.program_id(0).to(tl.int64) * KINDS * D + columns
    if gate is not None:
        tl.store(parts, tl.sum(by_gate, 0), mask=columns < D)
    if scale is not None:
        tl.store(parts + (KINDS - 2) * D, tl.sum(by_shift, 0), mask=columns < D)
        tl.store(parts + (KINDS - 1) * D, tl.sum(by_factor, 0), mask=columns < D)


@triton.jit
def _sum_kind(parts, kind, num_chunks, columns, KINDS: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr):
    """(BLOCK_D,): one kind of a sample's parts, in the order of its chunks."""
    total = tl.zeros((BLOCK_C, columns.shape[0]), tl.float32)
    for start in range(0, num_chunks, BLOCK_C):
        chunks = start + tl.arange(0, BLOCK_C)
        mask = (chunks < num_chunks)[:, None] & (columns < D)[None, :]
        total += tl.load(parts + (chunks[:, None] * KINDS + kind) * D + columns[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


# parts (B * chunks, KINDS, D), scale (B, D), weight (D,) -> grad_gate, grad_shift, grad_scale, by_weight (B, D),
# the last one each sample's share of the weight's gradient. None as above
@triton.jit
def _adaln_sum_chunks_kernel(
    parts,
    scale,
    weight,
    grad_gate,
    grad_shift,
    grad_scale,
    by_weight,
    scale_stride,
    num_chunks,
    D: tl.constexpr,
    KINDS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_width, at = columns < D, sample * D + columns
    parts += sample * num_chunks * KINDS * D
    if grad_gate is not None:
        total = _sum_kind(parts, 0, num_chunks, columns, KINDS, D, BLOCK_C)
        tl.store(grad_gate + at, total.to(grad_gate.dtype.element_ty), mask=in_width)
    if grad_shift is not None:
        total = _sum_kind(parts, KINDS - 2, num_chunks, columns, KINDS, D, BLOCK_C)
        tl.store(grad_shift + at, total.to(grad_shift.dtype.element_ty), mask=in_width)
        total = _sum_kind(parts, KINDS - 1, num_chunks, columns, KINDS, D, BLOCK_C)
        if weight is not None:
            scales = tl.load(scale + sample * scale_stride + columns, mask=in_width, other=0.0).to(tl.float32)
            tl.store(by_weight + at, total * (1.0 + scales), mask=in_width)
            total *= tl.load(weight + columns, mask=in_width, other=0.0).to(tl.float32)
        tl.store(grad_scale + at, total.to(grad_scale.dtype.element_ty), mask=in_width)


def _tiles(batch: int, num_tokens: int, width: int, elements: int, many: int = MANY) -> dict[str, int]:
    """Warps for a whole row, and as many rows at a time as they have room for."""
    tokens = many if batch * num_tokens >= BUSY else FEW
    block_d = max(next_power_of_2(width), 16)
    warps = min(max(block_d // (32 * elements), 4), 16)
    steps_of = tokens & -tokens  # the greatest power of 2 that divides them
    block_n = max(min(warps * 32 * elements // block_d, next_power_of_2(num_tokens), steps_of), 1)
    return {"TOKENS": tokens, "BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": warps}


def _rows(vector: Tensor | None) -> Tensor | None:
    """(B, D) as the kernels read it: any distance between rows, as `chunk` leaves them, and none within."""
    return vector if vector is None or vector.stride(1) == 1 else vector.contiguous()


def _stride(vector: Tensor | None) -> int:
    return 0 if vector is None else vector.stride(0)


def adaln_fwd(
    x: Tensor,
    residual: tuple[Tensor, Tensor] | None,
    modulation: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    norm: str,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The stream in x's dtype and its modulated norm, (B, N, D).

    Args:
        x: (B, N, D) contiguous.
        residual: y (B, N, D) contiguous and gate (B, D); without, the stream is x.
        modulation: shift and scale (B, D); without, there is no norm and the second result is the stream.
        weight: (D,) contiguous, of the norm.
        norm, eps, dtype: see `adaln`.
    """
    batch, num_tokens, width = x.shape
    y, gate = (None, None) if residual is None else residual
    shift, scale = (None, None) if modulation is None else modulation
    gate, shift, scale = _rows(gate), _rows(shift), _rows(scale)
    stream = x if residual is None else torch.empty_like(x)
    out = stream if modulation is None else torch.empty_like(x, dtype=dtype)
    if x.numel() == 0:
        return stream, out
    tiles = _tiles(*x.shape, FORWARD_ELEMENTS)
    _adaln_fwd_kernel[(batch * cdiv(num_tokens, tiles["TOKENS"]),)](
        x,
        y,
        gate,
        shift,
        scale,
        weight,
        stream,
        out,
        *(_stride(one) for one in (gate, shift, scale)),
        num_tokens,
        eps,
        D=width,
        NORM=norm,
        **tiles,
    )
    return stream, out


def adaln_bwd(
    grad_stream: Tensor | None,
    grad_out: Tensor | None,
    stream: Tensor,
    residual: tuple[Tensor, Tensor] | None,
    scale: Tensor | None,
    weight: Tensor | None,
    norm: str,
    eps: float,
    shift_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of `adaln_fwd` by x, y, gate, shift, scale and weight; None for what it was not given.

    Args:
        grad_stream, grad_out: (B, N, D) contiguous. Without scale, and so without a norm, only the first; then x's
            gradient is grad_stream.
        stream: (B, N, D), the first result.
        residual, scale, weight, norm, eps: what `adaln_fwd` took.
        shift_dtype: of shift and its gradient.
    """
    batch, num_tokens, width = stream.shape
    y, gate = (None, None) if residual is None else residual
    gate, scale = _rows(gate), _rows(scale)
    has_norm = scale is not None

    def per_sample(exists: bool, dtype: torch.dtype | None) -> Tensor | None:
        return stream.new_empty(batch, width, dtype=dtype) if exists else None

    grad_x = torch.empty_like(stream) if has_norm else grad_stream
    grad_y = None if y is None else torch.empty_like(y)
    grad_gate = per_sample(gate is not None, None if gate is None else gate.dtype)
    grad_shift, grad_scale = per_sample(has_norm, shift_dtype), per_sample(has_norm, scale.dtype if has_norm else None)
    by_weight = per_sample(weight is not None, torch.float32)
    vectors = (grad_gate, grad_shift, grad_scale)
    if stream.numel() == 0:
        vectors = (None if one is None else one.zero_() for one in vectors)
        return grad_x, grad_y, *vectors, None if weight is None else torch.zeros_like(weight)
    many = MOST if has_norm and residual is not None else MANY
    tiles = _tiles(*stream.shape, BACKWARD_ELEMENTS if has_norm else FORWARD_ELEMENTS, many)
    num_chunks = cdiv(num_tokens, tiles["TOKENS"])
    kinds = (residual is not None) + 2 * has_norm
    parts = stream.new_empty(batch * num_chunks, kinds, width, dtype=torch.float32)
    _adaln_bwd_kernel[(batch * num_chunks,)](
        grad_stream,
        grad_out,
        stream,
        y,
        gate,
        scale,
        weight,
        grad_x,
        grad_y,
        parts,
        _stride(gate),
        _stride(scale),
        num_tokens,
        eps,
        D=width,
        NORM=norm,
        KINDS=kinds,
        **tiles,
    )
    _adaln_sum_chunks_kernel[(batch, cdiv(width, SUMMED_COLUMNS))](
        parts,
        scale,
        weight,
        *vectors,
        by_weight,
        _stride(scale),
        num_chunks,
        D=width,
        KINDS=kinds,
        BLOCK_C=SUMMED_PARTS,
        BLOCK_D=SUMMED_COLUMNS,
    )
    return grad_x, grad_y, *vectors, None if weight is None else by_weight.sum(0).to(weight.dtype)
