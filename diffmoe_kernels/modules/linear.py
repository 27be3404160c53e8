"""A linear layer whose weights may be float32 masters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe_kernels.checks import autocast_is_on, autocast_off


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


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if autocast_is_on(x) and x.dtype != torch.float64:  # which it leaves alone
        return F.linear(x, weight, bias)  # it caches its casts of parameters
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling it does no more than its product."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    is_own = type(layer) is Linear and "forward" not in vars(layer)  # accelerate's hooks put theirs in its place
    return is_own and not any(hooks) and type(layer.weight) in (nn.Parameter, Tensor)
