"""How time and memory are measured.

On a GPU a time is read from CUDA events around the replay of a CUDA graph that holds one or more runs, or around one
run where no graph can hold it, its waits for the host included. Inputs are the same in every run and what fits in the
L2 cache is found there, as right after the kernel that made it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.registry import BOTH, Case, Provider, Where

SECONDS = float(os.environ.get("BENCHMARK_SECONDS", 0.2))  # that one case is measured for, about
FEWEST_ROUNDS, MOST_ROUNDS = 5, 100
REPLAY = 1e-3  # runs shorter than this share a graph, so that events and launches do not count


class Clock:
    """Seconds that the runs have taken: the timer that pytest-benchmark reads before and after each."""

    __name__ = "device_time"

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


CLOCK = Clock()


def outcome(module: nn.Module, x: Tensor, direction: str) -> dict[str, Any]:
    """What a case computes: "result", and in BOTH the gradients of the input and of the parameters by name."""
    if direction != BOTH:
        return {"result": forward(module, x)()}
    result = forward_and_backward(module, x)()
    grads = {f"grad of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"result": result, "grad of x": x.grad, **grads}


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


def prepare(case: Case, provider: Provider, where: Where) -> tuple[Callable[[], object], dict[str, Any]]:
    """The step to time, its result checked, and what was measured of it on the way.

    Raises:
        AssertionError: its result is wrong.
    """
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
    if case.direction != BOTH:
        return forward(module, x), {}
    saved = saved_bytes(module, x, compiled=provider.compiled)
    return forward_and_backward(module, x), {"saved_mib": round(saved / 2**20, 1)}


def saved_bytes(module: nn.Module, x: Tensor, *, compiled: bool = False) -> int:
    """What autograd keeps for the backward besides the parameters, each piece of memory once.

    Compiled or not, all of it counts: the input, the result and buffers too, index arrays among them, where kept.
    """
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

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


def rounds_of(run: Callable[[], object], seconds: float = SECONDS) -> int:
    """How often to run it, from one run."""
    before = CLOCK()
    run()
    return min(max(math.ceil(seconds / max(CLOCK() - before, 1e-9)), FEWEST_ROUNDS), MOST_ROUNDS)


def timed(step: Callable[[], object], captured: bool, on_gpu: bool) -> tuple[Callable[[], None], str]:
    """The step as a function that adds its time to `CLOCK`, warmed up; and how that time is read, in words."""
    if not on_gpu:
        return _on_host(step), "wall time"
    if not captured:
        step()
        return _with_events(step, 1), "CUDA events around one run"
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, allocates
            step()
    torch.cuda.synchronize()
    run = _with_events(_graph(step, 1, stream).replay, 1)
    run()
    before = CLOCK()
    run()
    repeats = min(max(math.ceil(REPLAY / (CLOCK() - before)), 1), 50)
    if repeats > 1:
        run = _with_events(_graph(step, repeats, stream).replay, repeats)
        run()
    return run, f"CUDA events around a CUDA graph of {repeats} run{'s' * (repeats > 1)}"


def _graph(step: Callable[[], object], repeats: int, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            step()
    return graph


def _with_events(run: Callable[[], object], repeats: int) -> Callable[[], None]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measured() -> None:
        start.record()
        run()
        end.record()
        end.synchronize()
        CLOCK.seconds += start.elapsed_time(end) / 1e3 / repeats

    return measured


def _on_host(run: Callable[[], object]) -> Callable[[], None]:
    def measured() -> None:
        start = time.perf_counter()
        run()
        CLOCK.seconds += time.perf_counter() - start

    return measured


def ceilings(where: Where) -> dict[str, float]:
    """The two ceilings of this machine: bytes a second of a copy, read and written, and operations of a product."""
    on_gpu = where.device == "cuda"
    source = torch.randn(2**28 if on_gpu else 2**23, device=where.device)
    target = torch.empty_like(source)
    size = 8192 if on_gpu else 512
    a, b = (torch.randn(size, size, device=where.device).to(where.dtype) for _ in range(2))
    found = {}
    for name, step, amount in (
        ("copy_bytes_per_second", lambda: target.copy_(source), 2 * source.nbytes),
        ("product_flops_per_second", lambda: a @ b, 2 * size**3),
    ):
        run, _ = timed(step, True, on_gpu)
        times = []
        for _ in range(10):
            before = CLOCK()
            run()
            times.append(CLOCK() - before)
        found[name] = amount / sorted(times)[len(times) // 2]
    return found
