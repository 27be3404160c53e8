"""CUDA graphs and streams on a CPU: the memory and the random numbers of steps that are captured and replayed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from models import cuda_graphs, sample
from models.cuda_graphs import Captured
from models.training import trainer


class Stream:
    """Work of all streams is done in turn."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait_stream(self, other: Stream) -> None:
        pass


class Graph:
    """What a capture saw, done again by `replay`, from the same inputs into the same results."""

    current: Graph | None = None
    replays = 0

    def record(self, compute, inputs, parameters):
        """As on a GPU nothing is computed yet: the results hold whatever is there, here NaN."""
        state = torch.get_rng_state()
        results = compute(*inputs)
        torch.set_rng_state(state)
        kept = [one for one in tree_leaves(results) if isinstance(one, torch.Tensor)]
        gradients = [one.grad for one in parameters]
        for one in (*kept, *gradients):
            one.detach().fill_(torch.nan if one.is_floating_point() else -1)

        def replay() -> None:
            Graph.replays += 1
            for parameter in parameters:
                parameter.grad = None
            new = [one for one in tree_leaves(compute(*inputs)) if isinstance(one, torch.Tensor)]
            for old, one in zip((*kept, *gradients), (*new, *(one.grad for one in parameters)), strict=True):
                old.detach().copy_(one.detach())
            for parameter in parameters:
                parameter.grad = None  # which a graph knows nothing of

        self.replay = replay
        return results


def emulate(setattr: Callable[[Any, str, Any], None]) -> Callable[..., Captured]:
    """Lets trainers and samplers on a CPU capture what they compute.

    Args:
        setattr: as a monkeypatch has it.

    Returns:
        What takes the place of `Captured`.
    """

    @contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        Graph.current = graph
        try:
            yield
        except Exception:
            raise RuntimeError("operation failed due to a previous error during capture") from None
        finally:
            Graph.current = None

    @contextmanager
    def on_stream(stream):
        yield

    def captured(compute, device, parameters=()):
        def run(*inputs):
            return Graph.current.record(compute, inputs, parameters) if Graph.current else compute(*inputs)

        return Captured(run, device, parameters)

    names = {"Stream": Stream, "CUDAGraph": Graph, "graph": capture, "stream": on_stream, "current_stream": Stream}
    names["graph_pool_handle"] = tuple
    for name, one in names.items():
        setattr(torch.cuda, name, one)
    captured.WARM_UP, captured.check_device = Captured.WARM_UP, lambda device: None
    setattr(Graph, "replays", 0)
    for module in (trainer, cuda_graphs, sample):
        setattr(module, "Captured", captured)
    return captured
