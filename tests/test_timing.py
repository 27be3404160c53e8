"""How times are read, with a GPU whose kernels take the time that they are told to."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing

CLEARING = 7e-5  # seconds


class Gpu:
    """Stands for `torch.cuda`: what runs adds to ``now``; while a graph is captured it is noted instead."""

    def __init__(self) -> None:
        self.now = 0.0
        self.captured: list[float] | None = None
        self.graphs = 0

    def spend(self, seconds: float) -> None:
        if self.captured is None:
            self.now += seconds
        else:
            self.captured.append(seconds)

    def module(self) -> SimpleNamespace:
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) * 1e3

        class CUDAGraph:
            def replay(self) -> None:
                gpu.now += sum(self.held)

        class Graph:
            def __init__(self, graph: CUDAGraph, stream: object) -> None:
                self.graph = graph

            def __enter__(self) -> None:
                gpu.captured = []
                gpu.graphs += 1

            def __exit__(self, *_: object) -> None:
                self.graph.held, gpu.captured = gpu.captured, None

        class Stream:
            def wait_stream(self, other: object) -> None:
                pass

            def __enter__(self) -> None:
                pass

            def __exit__(self, *_: object) -> None:
                pass

        names = {"Event": Event, "CUDAGraph": CUDAGraph, "graph": Graph, "Stream": Stream, "stream": lambda one: one}
        return SimpleNamespace(**names, synchronize=lambda: None, current_stream=Stream)


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(timing.torch, "cuda", gpu.module())
    monkeypatch.setattr(timing, "_clear_cache", lambda: gpu.spend(CLEARING))
    timing._clearing.cache_clear()
    yield gpu
    timing._clearing.cache_clear()


def seconds_of(run) -> float:
    before = timing.CLOCK()
    run()
    return timing.CLOCK() - before


@pytest.mark.parametrize("seconds", [2e-6, 3e-5, 4e-4, 0.05])
def test_a_time_is_of_one_run_without_the_clearing(gpu, seconds) -> None:
    turns = []
    steps = [lambda one=one: (turns.append(one), gpu.spend(seconds * (1 + one))) for one in range(3)]
    run, words = timing.timed(steps, captured=True, on_gpu=True)
    assert seconds_of(run) == pytest.approx(2 * seconds)  # the mean of its three inputs
    runs = timing.runs_of(seconds, 3)
    assert f"graph of {runs} runs" in words
    assert turns[-runs:] == list(range(3)) * (runs // 3)


def test_each_run_in_a_graph_follows_a_clearing(gpu, monkeypatch) -> None:
    order = []
    monkeypatch.setattr(timing, "_clear_cache", lambda: (order.append("clear"), gpu.spend(CLEARING)))
    timing.timed([lambda: (order.append("run"), gpu.spend(1e-3))], captured=True, on_gpu=True)
    assert order[-2:] == ["clear", "run"] and order.count("clear") >= 1


def test_what_waits_for_the_host_is_timed_run_by_run(gpu) -> None:
    steps = [lambda: gpu.spend(1e-3), lambda: gpu.spend(3e-3)]
    run, words = timing.timed(steps, captured=False, on_gpu=True)
    assert {round(seconds_of(run), 9), round(seconds_of(run), 9)} == {1e-3, 3e-3}
    assert gpu.graphs == 0 and "around one run" in words


@pytest.mark.parametrize(("seconds", "runs"), [(0.3, 1), (0.09, 3), (1e-3, 8)])
def test_what_the_host_launches_is_timed_over_a_few_runs(gpu, seconds, runs) -> None:
    """As in training, where the GPU is at work on a step when the next is launched. The first compiles."""
    turns, costs = [], itertools.chain([60.0], itertools.repeat(seconds))
    steps = [lambda one=one: (turns.append(one), gpu.spend(next(costs))) for one in range(3)]
    run, words = timing.timed(steps, captured=False, on_gpu=True, in_a_row=True)
    turns.clear()
    assert seconds_of(run) == pytest.approx(seconds) and len(turns) == runs
    assert turns == [(turns[0] + place) % 3 for place in range(runs)], "each input in its turn"
    assert gpu.graphs == 0 and f"around {runs} runs in a row" in words


def test_a_step_that_no_graph_can_hold_is_named_and_ends_the_process_s_times(gpu, monkeypatch) -> None:
    """PyTorch's own error at the end of a capture says nothing of what broke it."""
    monkeypatch.setattr(timing, "BROKEN", [])
    kind = timing.torch.cuda.graph

    class Broken(kind):
        def __exit__(self, *error: object) -> None:
            super().__exit__()
            if error[0] is not None:
                raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(timing.torch.cuda, "graph", Broken)

    def waits() -> None:
        gpu.spend(1e-3)
        if gpu.captured is not None:
            raise ValueError("an item was asked for")

    with pytest.raises(ValueError, match="an item was asked for"):
        timing.timed([waits], captured=True, on_gpu=True)
    assert len(timing.BROKEN) == 1


def test_a_run_shorter_than_the_clearing_varies_has_no_time(gpu, monkeypatch) -> None:
    clearing = timing._clearing
    monkeypatch.setattr(timing, "_clearing", lambda runs: 1.01 * clearing(runs))
    with pytest.raises(AssertionError, match="no time"):
        timing.timed([lambda: gpu.spend(1e-8)], captured=True, on_gpu=True)
    monkeypatch.setattr(timing, "_clearing", clearing)


def test_runs_in_a_graph() -> None:
    assert timing.runs_of(1.0, 3) == 3  # each input once
    assert timing.runs_of(1e-4, 3) == 12  # a millisecond in all
    assert timing.runs_of(1e-7, 3) == timing.MOST_RUNS
    assert timing.runs_of(0.0, 1) == timing.MOST_RUNS


def test_on_a_cpu_the_clock_counts_runs_alone() -> None:
    calls = []
    run, words = timing.timed([lambda: calls.append(0), lambda: calls.append(1)], captured=True, on_gpu=False)
    assert words == "wall time"
    assert seconds_of(run) > 0 and seconds_of(run) > 0 and calls == [0, 1]
    assert timing.FEWEST_ROUNDS <= timing.rounds_of(run, seconds=0.0) <= timing.MOST_ROUNDS


def test_ceilings_are_rates_of_a_copy_and_a_product(gpu, monkeypatch) -> None:
    """On a machine whose every step takes a millisecond."""
    where = SimpleNamespace(device="cpu", dtype=torch.float32)
    monkeypatch.setattr(
        timing, "timed", lambda steps, *_: (lambda: setattr(timing.CLOCK, "seconds", timing.CLOCK() + 1e-3), "")
    )
    found = timing.ceilings(where)
    assert found["copy_bytes_per_second"] == pytest.approx(2 * 4 * 2**23 / 1e-3)
    assert found["product_flops_per_second"] == pytest.approx(2 * 512**3 / 1e-3)
