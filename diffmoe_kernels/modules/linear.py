"""Linear layers: one whose weights may be float32 masters, and the routers', whose product is float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe_kernels.checks import at_least_float32, autocast_is_on, autocast_off


class Linear(nn.Linear):
    """``nn.Linear`` that computes in its input's dtype, as the ops do; the gradients keep the weights' dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return _linear(x, self.weight, self.bias)


def side_by_side(x: Tensor, *layers: nn.Module) -> Tensor:
    """(..., in_features) -> (..., sum of out_features): what each layer makes of x, by one product if all are plain.

    Layers with hooks, of another class (adapters) or with weights that are no ordinary tensors are called.
    """
    biases = [layer.bias for layer in layers if getattr(layer, "bias", None) is not None]
    if len(biases) not in (0, len(layers)) or not all(map(_is_plain, layers)):
        return torch.cat([layer(x) for layer in layers], dim=-1)
    with autocast_off(x):  # which would have the other 16-bit type stop here
        weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat(biases) if biases else None
    return _linear(x, weight, bias)


def float32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """(..., in_features), (out_features, in_features) -> (..., out_features), in float32, under autocast too; float64
    stays."""
    if autocast_is_on(x):
        return _Float32Linear.apply(x, weight)
    x = at_least_float32(x)
    return F.linear(x, weight.to(x.dtype))


class _Float32Linear(torch.autograd.Function):
    """Under autocast. torch.compile takes the backward of a region without autocast for one under it, and rounds that
    to 16 bits (pytorch/pytorch#179804); this one's backward says itself that there is none."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        with autocast_off(x):
            x = at_least_float32(x)
            return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        by_x = by_weight = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                by_x = (grad @ weight.to(grad.dtype)).to(x.dtype)
            if ctx.needs_input_grad[1]:
                # Cast as a transposed one: another value to torch.compile than the forward's, which it would keep.
                rows = x.reshape(-1, x.shape[-1]).mT.to(grad.dtype).mT
                by_weight = (grad.reshape(-1, grad.shape[-1]).mT @ rows).to(weight.dtype)
        return by_x, by_weight


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if autocast_is_on(x) and x.dtype != torch.float64:  # which it leaves alone
        return F.linear(x, weight, bias)  # it caches its casts of parameters
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling it does no more than its product."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    is_own = type(layer) is Linear and "forward" not in vars(layer)  # accelerate's hooks put theirs in its place
    return is_own and not any(hooks) and type(layer.weight) in (nn.Parameter, Tensor)
