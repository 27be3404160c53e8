"""How kernels become torch operators.

`torch.library.custom_op` would do the same for about twice the host's time (benchmarks/NOTES.md). These register with
the dispatcher as it does, but for its check that a kernel returns new memory, which opcheck makes.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from diffmoe_kernels.version import __version__

# Of the operators: torch.compile keeps backward graphs on disk by the operators in the forward one alone.
OVERLOAD = "v" + __version__.replace(".", "_")
_LIBRARY = torch.library.Library("diffmoe_kernels", "FRAGMENT")
_GRADIENTS: dict[OpOverload, tuple[Callable[..., Any], Callable[..., None]]] = {}


def operator(name: str) -> Callable[[Callable[..., Any]], OpOverload]:
    """Registers a function as the operator ``diffmoe_kernels::<name>``, which writes to none of its arguments.

    Its first argument is a tensor, whose GPU is the current one while the function runs: kernels are launched there.
    `torch.library.register_fake` and `register_autograd` make it whole; without a gradient its backward raises.
    """

    def register(function: Callable[..., Any]) -> OpOverload:
        @torch._disable_dynamo  # where a graph broke, its tracing would go on inside the launcher
        def on_its_device(first: Tensor, *args: Any) -> Any:
            with torch.cuda.device_of(first):
                return function(first, *args)

        schema = f"{name}.{OVERLOAD}{torch.library.infer_schema(function, mutates_args=())}"
        _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
        overload = getattr(getattr(torch.ops.diffmoe_kernels, name), OVERLOAD)
        _LIBRARY.impl(overload, on_its_device, "CompositeExplicitAutograd")
        _LIBRARY.impl(overload, _differentiable(overload), "Autograd")
        return overload

    return register


def register_autograd(
    overload: OpOverload, backward: Callable[..., Any], *, setup_context: Callable[..., None]
) -> None:
    """`torch.library.register_autograd` of an `operator`."""
    _GRADIENTS[overload] = backward, setup_context


def _differentiable(overload: OpOverload) -> Callable[..., Any]:
    """The operator as autograd calls it."""

    def below_autograd(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = below_autograd(*args)
            if overload in _GRADIENTS:
                _GRADIENTS[overload][1](ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            if overload not in _GRADIENTS:
                raise RuntimeError(f"{overload}: no autograd formula was registered")
            return _GRADIENTS[overload][0](ctx, *grads)

    @torch._disable_dynamo
    def differentiable(*args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return Gradient.apply(*args)
        return below_autograd(*args)

    return differentiable


@functools.cache
def launchers(op: str, backend: str) -> ModuleType:
    """The module of an op's folder whose functions launch that backend's kernels: "triton" or "cuda"."""
    return importlib.import_module(f"diffmoe_kernels.ops.{op}._{backend}")
