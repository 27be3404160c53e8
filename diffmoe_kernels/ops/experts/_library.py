"""`experts` on this project's kernels as one torch operator, which promises what is kept for the backward."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from diffmoe_kernels.operator import empty_for_none, operator
from diffmoe_kernels.ops.experts import _grouped_mm, _triton, _triton_backward
from diffmoe_kernels.ops.permute._triton import unpermute_fwd
from diffmoe_kernels.routing import Routing, for_kernels
from diffmoe_kernels.triton_support import why_not_products

# Who multiplies: (T, D) -> rows (R, D) and the pre-activation, and the way back.
PRODUCTS = {
    "triton": (_triton.experts_fwd, _triton_backward.experts_bwd),
    "grouped_mm": (_grouped_mm.experts_fwd, _grouped_mm.experts_bwd),
}


def _aligned(weights: Tensor) -> Tensor:
    """From 16 bytes on, as views into one flat parameter may not be: on CUDA grouped_mm refuses others, and our kernels
    would read them by 2 bytes, with sums on the stack."""
    return weights if weights.data_ptr() % 16 == 0 else weights.clone()


@operator("experts")
def _experts(
    x: Tensor,
    gates: Tensor,
    up_master: Tensor,
    down_master: Tensor,
    up_bias_master: Tensor | None,
    down_bias_master: Tensor | None,
    residual: Tensor | None,
    token_indices: Tensor,
    group_offsets: Tensor,
    token_offsets: Tensor,
    token_rows: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    keep_pre: bool,
    products: str,
) -> tuple[Tensor, Tensor]:
    """(T, D) and weights -> (T, D), and the pre-activation (R, U), empty unless it is kept.

    The masters are what gradients go to; up, down and the biases are the same in x's dtype.
    """
    forward, _ = PRODUCTS[products]
    routing = Routing(token_indices, gates, group_offsets, token_offsets, token_rows)
    rows, pre = forward(x, routing, _aligned(up), _aligned(down), up_bias, down_bias, activation, keep_pre=keep_pre)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return unpermute_fwd(rows, gates, token_offsets, token_rows, residual, dtype), pre


@_experts.register_fake
def _(x, gates, up_master, down_master, up_bias_master, down_bias_master, residual, token_indices, group_offsets,
      token_offsets, token_rows, up, down, up_bias, down_bias, activation, keep_pre, products):  # fmt: skip
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    pre = x.new_empty(token_indices.shape[0] if keep_pre else 0, up_master.shape[1])
    return x.new_empty(x.shape, dtype=dtype), pre


@operator("experts_backward")
def _experts_backward(
    grad: Tensor,
    x: Tensor,
    gates: Tensor,
    token_indices: Tensor,
    group_offsets: Tensor,
    token_offsets: Tensor,
    token_rows: Tensor,
    up: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    pre: Tensor,
    activation: str,
    needs_x: bool,
    needs_weights: bool,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    products: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to x, gates, up, down and their biases; empty where not asked for or not there."""
    _, backward = PRODUCTS[products]
    grads = backward(
        grad.to(x.dtype).contiguous(),
        x,
        Routing(token_indices, gates, group_offsets, token_offsets, token_rows),
        _aligned(up),
        _aligned(down),
        down_bias,
        pre,
        activation,
        needs_x=needs_x,
        needs_weights=needs_weights,
        weight_dtype=weight_dtype,
        bias_dtype=bias_dtype,
    )
    return empty_for_none(x, *grads)


@_experts_backward.register_fake
def _(grad, x, gates, token_indices, group_offsets, token_offsets, token_rows, up, down, down_bias, pre, activation,
      needs_x, needs_weights, weight_dtype, bias_dtype, products):  # fmt: skip
    def like(tensor, dtype, wanted):
        return tensor.new_empty(tensor.shape if wanted else (0,), dtype=dtype if wanted else x.dtype)

    biases = needs_weights and bias_dtype is not None
    return (
        like(x, x.dtype, needs_x),
        torch.empty_like(gates),
        like(up, weight_dtype, needs_weights),
        like(down, weight_dtype, needs_weights),
        like(up[:, :, 0], bias_dtype, biases),
        like(down[:, :, 0], bias_dtype, biases),
    )


class _Tied(torch.autograd.Function):
    """A tensor, as depending on others too: what is computed with it has no derivative."""

    @staticmethod
    def forward(ctx, tensor, *others):
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("experts: no autograd formula was registered for a second derivative")


def _save(ctx, inputs, output):
    x, gates, up_master, down_master, up_bias_master, down_bias_master, residual, *maps = inputs[:11]
    up, down, _, down_bias, activation, _, products = inputs[11:]
    ctx.mark_non_differentiable(output[1])
    ctx.masters = [one for one in inputs[2:6] if one is not None]  # parameters, which are there anyway
    ctx.activation, ctx.products = activation, products
    ctx.weight_dtype = torch.promote_types(up_master.dtype, down_master.dtype)  # autograd casts to each one's own
    biases = [bias.dtype for bias in (up_bias_master, down_bias_master) if bias is not None]
    ctx.bias_dtype = functools.reduce(torch.promote_types, biases) if biases else None
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(x, gates, *maps, up, down, down_bias, output[1])


def _backward(ctx, grad, _):
    needs = ctx.needs_input_grad
    *tensors, pre = ctx.saved_tensors
    needs_weights = any(needs[2:6])
    grad_residual = grad.to(ctx.residual_dtype) if needs[6] else None
    if not any(needs[:6]):
        return *(None,) * 6, grad_residual
    if torch.is_grad_enabled():  # the casts hang on no graph, and a second derivative would miss the weights
        pre = _Tied.apply(pre, *ctx.masters)
    arguments = (ctx.activation, needs[0], needs_weights, ctx.weight_dtype, ctx.bias_dtype, ctx.products)
    return *_experts_backward(grad, *tensors, pre, *arguments), grad_residual


_experts.register_autograd(_backward, setup_context=_save)


def experts_on_kernels(
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
    products: str,
) -> Tensor:
    """`experts` with the products of ``PRODUCTS[products]``."""
    routing = for_kernels(routing)
    masters = up_proj, down_proj, up_bias, down_bias
    inputs = (x, routing.gates, *masters, residual)
    keeps = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in inputs[:6])
    cast = [None if one is None else one.detach().to(x.dtype).contiguous() for one in masters]
    y, _ = _experts(
        x.contiguous(),
        routing.gates,
        *masters,
        None if residual is None else residual.contiguous(),
        routing.token_indices,
        routing.group_offsets,
        routing.token_offsets,
        routing.token_rows,
        *cast,
        activation,
        keeps,
        products,
    )
    return y


def why_not(
    x: Tensor, routing: Routing, up_proj: Tensor, down_proj: Tensor, *, dropout: float, up_bias: Tensor | None,
    down_bias: Tensor | None, residual: Tensor | None, **_: object,
) -> str | None:  # fmt: skip
    if dropout:
        return "the kernels have no dropout"
    if (up_bias is None) != (down_bias is None):
        return "the kernels want both biases or none"
    if residual is not None and residual.dtype == torch.float64:
        return "the kernels sum in float32, the residual is torch.float64"
    return why_not_products(x)
