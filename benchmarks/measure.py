"""What is timed of a case once its result is known to be right, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.registry import BOTH, Case, Provider, Where

INPUTS = 3  # that runs take in turn


def outcome(module: nn.Module, x: Tensor, direction: str) -> dict[str, Any]:
    """What a case computes: "result", and in BOTH the gradients of the input and of the parameters by name.

    A module whose parameters are laid out in its own way has a function ``gradients`` that gives them as others do.
    """
    if direction != BOTH:
        return {"result": forward(module, x)()}
    result = forward_and_backward(module, x)()
    grads = {"x": x.grad, **{name: parameter.grad for name, parameter in module.named_parameters()}}
    if hasattr(module, "gradients"):
        grads |= module.gradients()
    return {"result": result, **{f"grad of {name}": grad for name, grad in grads.items() if grad is not None}}


def forward(module: nn.Module, x: Tensor) -> Callable[[], Any]:
    """A step that keeps nothing for a backward."""

    def step() -> Any:
        with torch.no_grad():
            return module(x)

    return step


def forward_and_backward(module: nn.Module, x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A step that ends with the gradients in ``.grad``, of a fixed weighting of the result and of its loss, if any."""
    weightings: dict[tuple[torch.Size, torch.dtype], Tensor] = {}  # made in the first run, before any graph is captured

    def weighting(one: Tensor) -> Tensor | None:
        key = one.shape, one.dtype
        if one.dim() and key not in weightings:
            generator = torch.Generator(x.device).manual_seed(2)
            weightings[key] = torch.randn(one.shape, device=x.device, generator=generator).to(x.dtype).to(one.dtype)
        return weightings.get(key)

    def step() -> tuple[Tensor, ...]:
        x.grad = None
        module.zero_grad(set_to_none=True)
        y = module(x)
        results = y if isinstance(y, tuple) else (y,)
        torch.autograd.backward(results, [weighting(one) for one in results])
        return tuple(one.detach() for one in results)

    return step


def prepare(case: Case, provider: Provider, where: Where) -> tuple[list[Callable[[], object]], dict[str, Any]]:
    """The steps to time, the same work on one input each, and what was measured of it on the way.

    Raises:
        AssertionError: its result is wrong.
    """
    if case.prepare is not None:
        return case.prepare(case, provider, where)
    shape = where.resize(case.shape)
    x = case.inputs(shape, where)
    module = provider.module(shape, where)
    found = outcome(module, x, case.direction)
    if not provider.ceiling:
        torch.manual_seed(0)
        with torch.device(where.device):
            right = case.reference(shape, where, where.dtype)
        case.agree(found, outcome(right, x, case.direction), where.dtype)
        del right
    del found
    measured = {}
    if case.direction == BOTH and (provider.fullgraph or not provider.compiled):  # of parts neither way finds all
        measured["saved_mib"] = mib(saved_bytes(module, x, compiled=provider.compiled))
    step_of = forward_and_backward if case.direction == BOTH else forward
    steps = [step_of(module, one) for one in in_other_orders(x)]
    if where.device == "cuda":
        steps[0]()  # makes its weightings
        module.zero_grad(set_to_none=True)
        x.grad = None
        measured["peak_mib"] = mib(peak_bytes(steps[0]))
    return steps, measured


def in_other_orders(x: Tensor, count: int = INPUTS) -> list[Tensor]:
    """x and copies of it with its rows in another order each: other numbers elsewhere in memory, of the same kind."""
    generator = torch.Generator().manual_seed(3)
    orders = [torch.randperm(len(x), generator=generator).to(x.device) for _ in range(count - 1)]
    return [x, *(x.detach()[order].requires_grad_(x.requires_grad) for order in orders)]


def peak_bytes(step: Callable[[], object]) -> int:
    """The most that the GPU's allocator holds in a run, beyond what it held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def mib(size: int) -> float:
    return round(size / 2**20, 1)


def saved_bytes(module: nn.Module, x: Tensor, *, compiled: bool = False) -> int:
    """What autograd keeps for the backward besides the parameters, each piece of memory once.

    Compiled or not, all of it counts: the input, the result and buffers too, index arrays among them, where kept.
    """
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself, it would keep the graph that saved it for ever

    if compiled:  # hooks would have it compiled anew
        result = module(x)
        for tensor in _saved_by_nodes(result if isinstance(result, tuple) else (result,)):
            keep(tensor)
    else:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = module(x)
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    del result
    return sum(size for pointer, size in kept.items() if pointer not in own)


def _saved_by_nodes(results: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """Of the autograd functions written in Python that the results came by, as what torch.compile makes is."""
    seen, waiting = {None}, [one.grad_fn for one in results]
    while waiting:
        if (node := waiting.pop()) in seen:
            continue
        seen.add(node)
        saved = *getattr(node, "saved_tensors", ()), *getattr(node, "_tensors_no_vc_check", ())
        yield from (tensor for tensor in saved if tensor is not None)
        waiting += [before for before, _ in node.next_functions]
