"""How a time is read.

On a GPU: a CUDA graph holds a few runs, each on other inputs and after a pass over a buffer that drives them out of the
L2 cache; a time is what a replay takes, less what the passes take by themselves, over the runs. What no graph can hold,
since it waits for the host, is timed by CUDA events around one run, its waits included; what users launch themselves,
by events around a few runs, so that the host is ahead of the GPU where it can be. On a CPU it is wall time.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.registry import Where

SECONDS = float(os.environ.get("BENCHMARK_SECONDS", 0.2))  # that one case is measured for, about
FEWEST_ROUNDS, MOST_ROUNDS = 5, 100
REPLAY = 1e-3  # seconds of runs that a graph holds at least, so that the events' own time does not count
MOST_RUNS = 48  # that a graph holds
IN_A_ROW, MOST_IN_A_ROW = 0.25, 8  # seconds of runs at least, and runs at most, that follow one another as users' do

# Captures that failed, kept: PyTorch's allocator and random numbers stay as in a capture (pytorch/pytorch#180395), so
# that nothing more is to be timed in this process.
BROKEN: list[object] = []

Step = Callable[[], object]


class Clock:
    """Seconds that the runs have taken: the timer that pytest-benchmark reads before and after each."""

    __name__ = "device_time"

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


CLOCK = Clock()


def rounds_of(run: Step, seconds: float = SECONDS) -> int:
    """How often to run it, from one run."""
    before = CLOCK()
    run()
    return min(max(math.ceil(seconds / max(CLOCK() - before, 1e-9)), FEWEST_ROUNDS), MOST_ROUNDS)


def timed(
    steps: Sequence[Step], captured: bool, on_gpu: bool, *, in_a_row: bool = False
) -> tuple[Callable[[], None], str]:
    """The steps, one after another, as a function that adds the time of one to `CLOCK`, and in words what it reads.

    Args:
        steps: the same work on inputs of its own each.
        captured: in a CUDA graph.
        in_a_row: if not, as many runs as last a while, as the host launches them.
    """
    if not on_gpu:
        following = itertools.cycle(steps)
        return _on_host(lambda: next(following)()), "wall time"
    if not captured:
        following = itertools.cycle(steps)
        run = _between_events(lambda: next(following)(), before=_clear_cache)
        run()
        if not in_a_row:
            return run, "CUDA events around one run, L2 cache cleared"
        before = CLOCK()
        run()
        runs = min(max(math.ceil(IN_A_ROW / (CLOCK() - before)), 1), MOST_IN_A_ROW)

        def several() -> None:
            for step in itertools.islice(following, runs):
                step()

        return _between_events(several, runs=runs), f"CUDA events around {runs} runs in a row"
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in itertools.islice(itertools.cycle(steps), max(3, len(steps))):  # compiles, allocates
            step()
    torch.cuda.synchronize()
    once = _between_events(_graph([steps[0]], stream).replay)
    once()
    before = CLOCK()
    once()
    runs = runs_of(CLOCK() - before, len(steps))
    clearing = _clearing(runs)
    parts = [part for step in itertools.islice(itertools.cycle(steps), runs) for part in (_clear_cache, step)]
    run = _between_events(_graph(parts, stream).replay, runs=runs, less=clearing)
    before = CLOCK()
    run()
    assert CLOCK() > before, "shorter than clearing the cache varies: no time"
    return run, f"CUDA graph of {runs} runs, L2 cache cleared before each, the clearing's time taken off"


def runs_of(seconds: float, inputs: int) -> int:
    """How many runs of that length a graph holds: each input as often, `REPLAY` in all if that is not too many."""
    times = max(math.ceil(REPLAY / max(seconds, 1e-9) / inputs), 1)
    return min(times, max(MOST_RUNS // inputs, 1)) * inputs


def keep(benchmark: Any, node: Any, facts: dict[str, Any]) -> None:
    """Files the facts, with the percentiles, where pytest-benchmark's JSON and the tables at the end find them.

    Args:
        benchmark: pytest-benchmark's fixture, after its run.
        node: the test.
    """
    if benchmark.stats is None:
        return  # --benchmark-disable
    stats = benchmark.stats.stats
    benchmark.extra_info |= facts | {f"p{at}_ms": float(np.percentile(stats.data, at)) * 1e3 for at in (20, 80)}
    node.user_properties += [("facts", dict(benchmark.extra_info)), ("stats", {"median": stats.median})]


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
        run, _ = timed([step], True, on_gpu)
        times = []
        for _ in range(10):
            before = CLOCK()
            run()
            times.append(CLOCK() - before)
        found[name] = amount / statistics.median(times)
    return found


def _clear_cache() -> None:
    """Reads enough to drive all else out of the L2 cache; nothing is written that the next run would have to evict."""
    torch.amax(_filler(torch.cuda.current_device()))


@functools.cache
def _filler(device: int) -> Tensor:
    size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.zeros(size // 4, device=f"cuda:{device}")


@functools.cache
def _clearing(runs: int) -> float:
    """Seconds that clearing the cache takes, so many times in a graph."""
    _clear_cache()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    replay = _between_events(_graph([_clear_cache] * runs, stream).replay)
    times = []
    for _ in range(20):
        before = CLOCK()
        replay()
        times.append(CLOCK() - before)
    return statistics.median(times)


def _graph(steps: Sequence[Step], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """The steps in a graph; raises what a step raised, which the end of the capture would hide."""
    graph = torch.cuda.CUDAGraph()
    first: list[Exception] = []
    try:
        with torch.cuda.graph(graph, stream=stream):
            try:
                for step in steps:
                    step()
            except Exception as error:
                first.append(error)
                raise
    except Exception as error:
        BROKEN.append(graph)
        raise (first or [error])[0] from None
    return graph


def _between_events(run: Step, *, before: Step | None = None, runs: int = 1, less: float = 0.0) -> Callable[[], None]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measured() -> None:
        if before is not None:
            before()
        start.record()
        run()
        end.record()
        end.synchronize()
        CLOCK.seconds += max(start.elapsed_time(end) / 1e3 - less, 0.0) / runs

    return measured


def _on_host(run: Step) -> Callable[[], None]:
    def measured() -> None:
        start = time.perf_counter()
        run()
        CLOCK.seconds += time.perf_counter() - start

    return measured
