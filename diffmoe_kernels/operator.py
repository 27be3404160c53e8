"""How kernels become torch operators.

`torch.library.custom_op` would do the same for about twice the host's time (benchmarks/NOTES.md). These register with
the dispatcher as it does, but for its check that a kernel returns new memory, which opcheck makes.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.library import Library

from diffmoe_kernels.version import __version__

# Of the operators: torch.compile keeps backward graphs on disk by the operators in the forward one alone. So what
# torch.export saved, and a checkpointing policy that names operators, is of one release.
OVERLOAD = "v" + re.sub(r"\W", "_", __version__)
_LIBRARIES: dict[str, Library] = globals().get("_LIBRARIES", {})  # a module that is reloaded defines its operators anew
_GRADIENTS: dict[OpOverload, type[torch.autograd.Function]] = {}


def operator(name: str) -> Callable[[Callable[..., Any]], OpOverload]:
    """Registers a function as the operator ``diffmoe_kernels::<name>``, which writes to none of its arguments.

    Its first argument is a tensor, whose GPU is the current one while the function runs: kernels are launched there.
    It has no defaults and no lists. `torch.library.register_fake` and `register_autograd` make it whole; without the
    latter its backward raises.

    Raises:
        TypeError: other arguments.
    """

    def register(function: Callable[..., Any]) -> OpOverload:
        @torch._disable_dynamo  # where a graph broke, its tracing would go on inside the launcher
        def on_its_device(first: Tensor, *args: Any) -> Any:
            with torch.cuda.device_of(first):
                return function(first, *args)

        if name in _LIBRARIES:
            _LIBRARIES.pop(name)._destroy()
        schema = f"{name}.{OVERLOAD}{torch.library.infer_schema(function, mutates_args=())}"
        if not re.match(r"[\w.]+\(Tensor \w+[,)]", schema) or re.search(r"[=*]|\[\]", schema):
            raise TypeError(f"{schema}: expected a tensor first, no defaults, no lists and no keyword-only arguments")
        library = _LIBRARIES[name] = Library("diffmoe_kernels", "FRAGMENT")
        library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        overload = getattr(getattr(torch.ops.diffmoe_kernels, name), OVERLOAD)
        library.impl(overload, on_its_device, "CompositeExplicitAutograd")
        library.impl(overload, _differentiable(overload), "Autograd")
        return overload

    return register


def register_autograd(
    overload: OpOverload, backward: Callable[..., Any], *, setup_context: Callable[..., None]
) -> None:
    """`torch.library.register_autograd` of an `operator`."""
    gradient = _GRADIENTS[overload]
    gradient.backward, gradient.save = staticmethod(backward), staticmethod(setup_context)


def _differentiable(overload: OpOverload) -> Callable[..., Any]:
    """The operator as autograd calls it."""

    def below_autograd(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    def forward(ctx: Any, *args: Any) -> Any:
        output = below_autograd(*args)
        gradient.save(ctx, args, output)
        return output

    def refuse(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(f"{overload}: no autograd formula was registered")

    members = {"forward": forward, "backward": refuse, "save": lambda *_: None}
    members = {name: staticmethod(member) for name, member in members.items()}
    gradient = _GRADIENTS[overload] = type(overload._opname, (torch.autograd.Function,), members)

    @torch._disable_dynamo
    def differentiable(*args: Any) -> Any:
        # With forward-mode derivatives about, a Function refuses them; below autograd they would be lost.
        if forward_ad._current_level >= 0 or torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return gradient.apply(*args)
        return below_autograd(*args)

    return differentiable


@functools.cache
def launchers(op: str, backend: str) -> ModuleType:
    """The module of an op's folder whose functions launch that backend's kernels: "triton" or "cuda"."""
    return importlib.import_module(f"diffmoe_kernels.ops.{op}._{backend}")
