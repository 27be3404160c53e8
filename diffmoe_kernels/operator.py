"""How kernels become torch operators.

`torch.library.custom_op` would do the same for more than twice the host's time (benchmarks/NOTES.md). These register
with the dispatcher as it does, but for its check that a kernel returns new memory, which opcheck makes. Where nothing
would see the call pass, they call the kernel without it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import re
import typing
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library

from diffmoe_kernels.version import __version__

# The overload's name has the version: torch.compile's cache on disk knows a backward graph by the forward's operators
# alone. So what torch.export saved, and a checkpointing policy that names operators, is of one release.
OVERLOAD = "v" + re.sub(r"\W", "_", __version__)
_LIBRARIES: dict[str, Library] = globals().get("_LIBRARIES", {})  # a module that is reloaded defines its operators anew
_dynamo = torch._C._dynamo.eval_frame.get_eval_frame_callback
_num_dispatch_modes, _num_function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transform, _tracer = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state
_profiler_is_on = torch._C._autograd._profiler_enabled


class Operator:
    """The operator ``diffmoe_kernels::<name>``, which writes to none of its arguments.

    Called eagerly it runs its function directly, unless something must intercept the operator: a compiler or a graph
    that it broke, a mode, a subclass of tensors, a functorch transform, a profiler, a tracer. Those meet ``overload``.

    Attributes:
        overload: as the dispatcher knows it.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        if name in _LIBRARIES:
            _LIBRARIES.pop(name)._destroy()
        schema = f"{name}.{OVERLOAD}{torch.library.infer_schema(function, mutates_args=())}"
        if not re.match(r"[\w.]+\(Tensor \w+[,)]", schema) or re.search(r"[=*]|\[\]", schema):
            raise TypeError(f"{schema}: expected a tensor first, no defaults, no lists and no keyword-only arguments")
        library = _LIBRARIES[name] = Library("diffmoe_kernels", "FRAGMENT")
        library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        self.overload = getattr(getattr(torch.ops.diffmoe_kernels, name), OVERLOAD)
        hints = typing.get_type_hints(function)
        # Of each argument. Others, an int for a float among them, are the dispatcher's to convert or refuse.
        self._types = [_types_of(hints[name]) for name in inspect.signature(function).parameters]
        self._tensors_at: dict[tuple[type, ...], tuple[int, ...] | None] = {}  # by the arguments' types
        self._function = function
        self._gradient = _gradient_of(self)
        for method, key in ((self._on_its_device, "CompositeExplicitAutograd"), (self._differentiable, "Autograd")):
            library.impl(self.overload, functools.partial(method), key)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or kwargs or not self._unobserved(args):
            return self.overload(*args, **kwargs)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return self._gradient.apply(*args)
        return self._on_its_device(*args)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """`torch.library.register_fake`."""
        return torch.library.register_fake(self.overload)(fake)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """As `torch.library.register_autograd`; without it the operator's backward raises.

        ``backward`` is called where any output has a gradient, None for those that have none. It may leave out the
        gradients of the last inputs, and return one alone; those of inputs that need none are dropped.
        """

        def of_inputs(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            found = None if all(grad is None for grad in grads) else backward(ctx, *grads)
            found = found if isinstance(found, tuple) else (found,)
            return tuple(grad if need else None for need, grad in itertools.zip_longest(ctx.needs_input_grad, found))

        self._gradient.backward, self._gradient.save = staticmethod(of_inputs), staticmethod(setup_context)

    def _on_its_device(self, first: Tensor, *args: Any) -> Any:
        """The function, with its first tensor's GPU the current one: kernels are launched there."""
        if not first.is_cuda or first.get_device() == torch._C._cuda_getDevice():
            return self._function(first, *args)
        with torch.cuda.device_of(first):
            return self._function(first, *args)

    def _differentiable(self, *args: Any) -> Any:
        """As autograd calls it."""
        # With forward-mode derivatives about, a Function refuses them; below autograd they would be lost.
        if forward_ad._current_level >= 0 or torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return self._gradient.apply(*args)
        return self._below_autograd(*args)

    def _below_autograd(self, *args: Any) -> Any:
        if self._unobserved(args):
            return self._on_its_device(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)

    def _unobserved(self, args: tuple[Any, ...]) -> bool:
        """Whether nothing would intercept an operator with these arguments."""
        types = tuple(map(type, args))
        if types not in self._tensors_at:
            self._tensors_at[types] = self._find_tensors(types)
        places = self._tensors_at[types]
        if places is None:
            return False
        for place in places:
            tensor = args[place]
            # The dispatcher has another kernel for these, or their memory does not hold their values.
            if tensor.is_meta or tensor.is_neg() or tensor._is_zerotensor():
                return False
        return (
            _dynamo() is None
            and not _num_dispatch_modes()
            and not _num_function_modes()
            and _transform() is None
            and forward_ad._current_level < 0
            and not _profiler_is_on()
            and _tracer() is None
        )

    def _find_tensors(self, types: tuple[type, ...]) -> tuple[int, ...] | None:
        """Which of arguments of these types are tensors; None where they are for the dispatcher."""
        if len(types) != len(self._types) or any(t not in known for t, known in zip(types, self._types, strict=True)):
            return None
        return tuple(place for place, one in enumerate(types) if issubclass(one, Tensor))


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Makes a function the `Operator` of that name.

    Its first argument is a tensor; it has no defaults and no lists.

    Raises:
        TypeError: other arguments.
    """
    return functools.partial(Operator, name)


# Where a graph broke, the first would be traced once for every operator, and tracing would go on inside the launchers.
# It is Dynamo's `skip_code` and `disable`, without its import and, called from a compiled graph, at no cost.
_frames = torch._C._dynamo.eval_frame
for skipped, of_what_they_call in (
    ((Operator.__call__, Operator._unobserved, Operator._find_tensors), _frames._FrameAction.DEFAULT),
    ((Operator._on_its_device, Operator._differentiable), _frames._FrameAction.SKIP),
):
    for method in skipped:
        strategy = _frames._FrameExecStrategy(_frames._FrameAction.SKIP, of_what_they_call)
        _frames.set_code_exec_strategy(method.__code__, strategy)


def empty_for_none(like: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """What an operator returns that has no optional results: an empty tensor for each that there is not."""
    return tuple(like.new_empty(0) if one is None else one for one in tensors)


def _types_of(hint: Any) -> frozenset[type]:
    types = frozenset(typing.get_args(hint) or (hint,))
    return types | {torch.nn.Parameter} if Tensor in types else types


def _gradient_of(operator: Operator) -> type[torch.autograd.Function]:
    """What autograd's graph holds of it: a class of its own, by which profilers and errors name it."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = operator._below_autograd(*args)
        ctx.set_materialize_grads(False)
        operator._gradient.save(ctx, args, output)
        return output

    def refuse(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(f"{operator.overload}: no autograd formula was registered")

    members = {"forward": forward, "backward": refuse, "save": lambda *_: None}
    members = {name: staticmethod(member) for name, member in members.items()}
    return type(operator.overload._opname, (torch.autograd.Function,), members)


@functools.cache
def launchers(op: str, backend: str) -> ModuleType:
    """The module of an op's folder whose functions launch that backend's kernels: "triton" or "cuda"."""
    return importlib.import_module(f"diffmoe_kernels.ops.{op}._{backend}")
