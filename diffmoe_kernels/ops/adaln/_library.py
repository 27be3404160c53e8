"""The `adaln` ops on the Triton kernels as torch operators; they keep inputs and outputs, no moments."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe_kernels.operator import empty_for_none, operator
from diffmoe_kernels.ops.adaln._triton import adaln_bwd, adaln_fwd
from diffmoe_kernels.triton_support import DTYPES, why_not_triton

MAX_WIDTH = 4096  # of a row, which a program holds whole


@operator("adaln")
def _adaln(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, norm: str, eps: float, dtype: torch.dtype
) -> Tensor:
    return adaln_fwd(x, None, (shift, scale), weight, norm, eps, dtype)[1]


@_adaln.register_fake
def _(x, shift, scale, weight, norm, eps, dtype):
    return torch.empty_like(x, dtype=dtype)


@operator("adaln_backward")
def _adaln_backward(
    grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor | None, norm: str, eps: float, shift_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = adaln_bwd(None, grad.contiguous(), x, None, scale, weight, norm, eps, shift_dtype)
    return empty_for_none(x, grads[0], *grads[3:])


@_adaln_backward.register_fake
def _(grad, x, scale, weight, norm, eps, shift_dtype):
    by_shift, by_scale = (x.new_empty(scale.shape, dtype=dtype) for dtype in (shift_dtype, scale.dtype))
    return empty_for_none(
        x, torch.empty_like(x), by_shift, by_scale, None if weight is None else torch.empty_like(weight)
    )


def _save_for_adaln(ctx, inputs, output):
    x, shift, scale, weight, norm, eps, _ = inputs
    ctx.save_for_backward(x, scale, weight)
    ctx.options = norm, eps, shift.dtype


def _backward_of_adaln(ctx, grad):
    return _adaln_backward(grad, *ctx.saved_tensors, *ctx.options)


_adaln.register_autograd(_backward_of_adaln, setup_context=_save_for_adaln)


@operator("gated_residual")
def _gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return adaln_fwd(x, (y, gate), None, None, "none", 0.0)[0]


@_gated_residual.register_fake
def _(x, y, gate):
    return torch.empty_like(x)


@operator("gated_residual_backward")
def _gated_residual_backward(grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous()
    return adaln_bwd(grad, None, grad, (y, gate), None, None, "none", 0.0)[1:3]


@_gated_residual_backward.register_fake
def _(grad, y, gate):
    return torch.empty_like(y), gate.new_empty(gate.shape)


def _save_for_gated_residual(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _backward_of_gated_residual(ctx, grad):
    return grad, *_gated_residual_backward(grad, *ctx.saved_tensors)


_gated_residual.register_autograd(_backward_of_gated_residual, setup_context=_save_for_gated_residual)


@operator("gated_residual_adaln")
def _gated_residual_adaln(
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
    return adaln_fwd(x, (y, gate), (shift, scale), weight, norm, eps, dtype)


@_gated_residual_adaln.register_fake
def _(x, y, gate, shift, scale, weight, norm, eps, dtype):
    return torch.empty_like(x), torch.empty_like(x, dtype=dtype)


@operator("gated_residual_adaln_backward")
def _gated_residual_adaln_backward(
    grad: Tensor,
    grad_stream: Tensor | None,
    stream: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    norm: str,
    eps: float,
    shift_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_stream = None if grad_stream is None else grad_stream.contiguous()
    options = weight, norm, eps, shift_dtype
    return empty_for_none(stream, *adaln_bwd(grad_stream, grad.contiguous(), stream, (y, gate), scale, *options))


@_gated_residual_adaln_backward.register_fake
def _(grad, grad_stream, stream, y, gate, scale, weight, norm, eps, shift_dtype):
    vectors = (stream.new_empty(scale.shape, dtype=dtype) for dtype in (gate.dtype, shift_dtype, scale.dtype))
    by_weight = None if weight is None else torch.empty_like(weight)
    return empty_for_none(stream, torch.empty_like(stream), torch.empty_like(y), *vectors, by_weight)


def _save_for_both(ctx, inputs, output):
    _, y, gate, shift, scale, weight, norm, eps, _ = inputs
    ctx.save_for_backward(output[0], y, gate, scale, weight)
    ctx.options = norm, eps, shift.dtype


def _backward_of_both(ctx, grad_stream, grad):
    if grad is None:
        _, y, gate, *_ = ctx.saved_tensors
        return grad_stream, *_gated_residual_backward(grad_stream, y, gate)
    return _gated_residual_adaln_backward(grad, grad_stream, *ctx.saved_tensors, *ctx.options)


_gated_residual_adaln.register_autograd(_backward_of_both, setup_context=_save_for_both)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None else tensor.contiguous()


def adaln_triton(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, norm: str, eps: float, dtype: torch.dtype
) -> Tensor:
    return _adaln(x.contiguous(), shift, scale, _contiguous(weight), norm, eps, dtype)


def gated_residual_triton(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return _gated_residual(x.contiguous(), y.contiguous(), gate)


def gated_residual_adaln_triton(
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
    tokens = x.contiguous(), y.contiguous()
    return _gated_residual_adaln(*tokens, gate, shift, scale, _contiguous(weight), norm, eps, dtype)


def why_not(x: Tensor, *others: object) -> str | None:
    if x.shape[2] > MAX_WIDTH:
        return f"the kernels take up to {MAX_WIDTH} channels, not {x.shape[2]}"
    dtype = others[-1]
    if isinstance(dtype, torch.dtype) and dtype not in DTYPES:
        return f"the kernels give {', '.join(map(str, DTYPES))}, not {dtype}"
    return why_not_triton(x)
