"""The benchmarks at tiny sizes: every case by every provider runs and is right; the table of goals is what a file says.

In bfloat16 as on a GPU, the Triton kernels interpreted; torch.compile's graphs are run as they are.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import goals, measure
from benchmarks.adaln import AdaLNShape
from benchmarks.cases import all_cases
from benchmarks.files import load
from benchmarks.launches import ON_HOST, OPS, calls
from benchmarks.registry import BOTH, FORWARD, GPU, AttentionShape, Case, Shape, Where
from benchmarks.whole_models import ModelShape
from diffmoe_kernels.backend import KERNEL_BACKENDS
from diffmoe_kernels.triton_support import HAS_TRITON

ROOT = Path(__file__).parents[1]


AnyShape = Shape | AttentionShape | AdaLNShape | ModelShape


def tiny(shape: AnyShape) -> AnyShape:
    if isinstance(shape, AttentionShape):
        return replace(shape, samples=1, length=shape.prefix + 16, heads=2)
    if isinstance(shape, AdaLNShape):
        return replace(shape, samples=2, length=5, hidden=32)
    if isinstance(shape, ModelShape):
        return shape.small()
    return replace(shape, tokens=32, hidden=32, inner=16, experts=min(shape.experts, 8), top_k=min(shape.top_k, 3))


TINY = Where("cpu", torch.bfloat16, tiny, "aot_eager", HAS_TRITON)
CASES = {", ".join(case.key): case for case in all_cases(TINY) if case.prepare is None}  # whole models: another file
PAIRS = {f"{name}, {provider}": (case, provider) for name, case in CASES.items() for provider in case.providers}


@pytest.mark.parametrize(("case", "provider"), PAIRS.values(), ids=PAIRS.keys())
def test_every_provider_runs_and_is_right(case: Case, provider: str) -> None:
    how = case.providers[provider]
    if reason := how.why_not(TINY):
        pytest.skip(reason)
    steps, measured = measure.prepare(case, how, TINY)
    steps[0]()
    assert ("saved_mib" in measured) == (case.direction == BOTH and how.fullgraph)
    facts = case.facts(provider, TINY)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["least_bytes"] > 0 and not facts["published_size"]


@pytest.mark.parametrize("factor", [1.1, float("nan")])
@pytest.mark.parametrize("name", ["experts, DSMoE-L-E16, forward+backward", "experts, DSMoE-L-E16, forward"])
def test_a_wrong_result_has_no_time(name, factor) -> None:
    case = CASES[name]
    right = case.providers["torch"]

    def wrong(shape, where, dtype):
        module = right.build(shape, where, dtype)
        compute = module.compute
        module.compute = lambda own, x: compute(own, x) * factor
        return module

    with pytest.raises(AssertionError, match="no time"):
        measure.prepare(case, replace(right, build=wrong), TINY)


@pytest.mark.parametrize("lost", [("up",), ("gates", "topk_weights")])
def test_a_missing_gradient_has_no_time(lost) -> None:
    case = CASES["experts, DSMoE-L-E16, forward+backward"]
    right = case.providers["torch"]

    def without(shape, where, dtype):
        module = right.build(shape, where, dtype)
        for name in lost:
            getattr(module, name).requires_grad_(False)
        return module

    with pytest.raises(AssertionError, match=f"grad of {lost[0]}.*: not computed: no time"):
        measure.prepare(case, replace(right, build=without), TINY)


def test_a_wrong_record_has_no_time() -> None:
    case = CASES["token_drop, DiffMoE-L-E8, forward"]
    right = case.providers["reference"]

    def wrong(shape, where, dtype):
        module = right.build(shape, where, dtype)
        function = module.function
        module.function = lambda scores, *given: function(-scores, *given)
        return module

    with pytest.raises(AssertionError, match="no time"):
        measure.prepare(case, replace(right, build=wrong), TINY)


@pytest.mark.parametrize(
    "name",
    [
        "experts, DSMoE-L-E48, forward+backward",
        "experts, DSMoE-L-E16, sampling 512, forward",
        "expert-choice layer, DiffMoE-L-E8, forward+backward",
        "token-choice layer, DSMoE-L-E48, forward+backward",
    ],
)
def test_flops_are_those_that_torch_counts(name) -> None:
    case = CASES[name]
    provider = "loop" if "loop" in case.providers else "dense"
    steps, _ = measure.prepare(case, replace(case.providers[provider], compiled=False), TINY)
    with FlopCounterMode(display=False) as counter:
        steps[0]()
    assert counter.get_total_flops() == case.facts(provider, TINY)["flops"]


def test_flops_of_attention() -> None:
    """Of the definition; the backward computes the scores again, which the definition has no need to."""
    case = CASES["rope_attention, DSMoE-3B, forward"]
    shape = tiny(case.shape)
    module = case.reference(shape, TINY, TINY.dtype).to(TINY.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(case.inputs(shape, TINY))
    assert counter.get_total_flops() == case.facts("torch", TINY)["flops"]


def test_memory_kept_is_counted_once() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Tanh())
    x = torch.randn(16, 8, requires_grad=True)
    assert measure.saved_bytes(layer, x) == (16 * 8 + 16 * 4) * 4  # the input and tanh's result; no parameter


def test_counting_what_is_kept_leaves_nothing_behind() -> None:
    """A graph that lived on would hold its memory, and its leaves to the stream that they were first used on."""
    layer, x = Scaled(), torch.randn(16, 8, requires_grad=True)
    seen = []
    layer.register_forward_hook(lambda module, inputs, results: seen.extend(map(weakref.ref, results)))
    measure.saved_bytes(layer, x)
    assert len(seen) == 2 and not any(one() is not None for one in seen)


class Scaled(torch.nn.Module):
    """Keeps a buffer, its result and a second output, and not its input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(16, 1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x * self.scale).exp(), x.sigmoid()


@pytest.mark.parametrize("compiled", [False, True])
def test_memory_kept_is_what_the_backward_reads(compiled) -> None:
    layer, x = Scaled(), torch.randn(16, 8, requires_grad=True)
    if compiled:
        layer.compile(backend="aot_eager", fullgraph=True)
    assert measure.saved_bytes(layer, x, compiled=compiled) == (16 + 2 * 16 * 8) * 4


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("name", ["experts, DSMoE-L-E48, forward+backward", "rope_attention, DiT-L, forward+backward"])
def test_compiled_or_not_as_much_is_kept(name) -> None:
    """Where the compiler finds nothing to compute again; the routing's indices count on both sides."""
    case = CASES[name]
    shape, kept = tiny(case.shape), []
    for compiled in (False, True):
        module = replace(case.providers["triton"], compiled=compiled).module(shape, TINY)
        kept.append(measure.saved_bytes(module, case.inputs(shape, TINY), compiled=compiled))
    assert kept[0] == kept[1] > 0


def test_inputs_are_the_same_rows_in_other_orders() -> None:
    x = torch.arange(24.0).view(12, 2).requires_grad_()
    first, *others = measure.in_other_orders(x)
    assert first is x and len(others) == 2
    for other in others:
        assert other.requires_grad and other.is_leaf and other.data_ptr() != x.data_ptr()
        assert not torch.equal(other, x) and torch.equal(other.sort(0).values, x)


def record(op: str, name: str, direction: str, provider: str, ms: float, **facts) -> dict:
    key = {"op": op, "name": name, "direction": direction, "provider": provider}
    facts = {"published_size": True, "captured": True, "least_bytes": 0, **key, **facts}
    return {"extra_info": facts, "stats": {"median": ms / 1e3}}


def training(name: str) -> tuple[str, str, str]:
    return "training step", name, BOTH


def results() -> dict:
    """Goals reached, missed, skipped, and left out."""
    layer = "expert-choice layer", "DiffMoE-L-E8"
    return {
        "datetime": "2026-11-21T08:00:00",
        "run": {
            "device": "NVIDIA H200",
            "ceilings": {"copy_bytes_per_second": 4e12, "product_flops_per_second": 7e14},
        },
        "not_run": [
            {
                **record("experts", "DSMoE-S-E48", BOTH, "triton", 0)["extra_info"],
                "test": "test_speed[...]",
                "outcome": "skipped",
                "reason": "the Triton kernels need a CUDA device",
            },
            {"test": "test_speed[wrong]", "outcome": "failed", "reason": "AssertionError: result is wrong by 3e-01"},
        ],
        "benchmarks": [
            record("experts", "DSMoE-L-E16", BOTH, "dense", 2.0, saved_mib=448.0),
            record("experts", "DSMoE-L-E16", BOTH, "triton", 2.08, saved_mib=289.0),
            record("experts", "DSMoE-L-E16", BOTH, "torch", 2.5, saved_mib=577.0),
            record("experts", "DSMoE-L-E16", BOTH, "grouped_mm", 2.94, saved_mib=577.0),
            record("experts", "DSMoE-L-E48", BOTH, "dense", 1.2, saved_mib=370.0),
            record("experts", "DSMoE-L-E48", BOTH, "triton", 1.8, saved_mib=250.0),
            record("experts", "DSMoE-S-E48", BOTH, "dense", 0.9, saved_mib=480.0),
            record("unpermute", "DSMoE-L-E48", FORWARD, "triton", 0.06, least_bytes=200_000_000),
            record("router_topk", "DSMoE-S-E48", FORWARD, "triton", 0.025),
            record("routing_from_topk", "DSMoE-S-E48", FORWARD, "argsort + bincount", 0.25, captured=False),
            record(*layer, BOTH, "triton", 1.7),
            record(*layer, FORWARD, "triton", 0.5, captured=False),
            record("experts", "DSMoE-L-E16, sampling 512", FORWARD, "triton", 0.1),
            record("experts", "DSMoE-L-E16, sampling 512", FORWARD, "grouped_mm", 0.2),
            record("experts", "DSMoE-L-E48, sampling 512", FORWARD, "triton", 0.1),
            record("experts", "DSMoE-L-E48, sampling 512", FORWARD, "grouped_mm", 0.2),
            record("experts", "DSMoE-L-E48, sampling 512", FORWARD, "loop", 9.0),
            record(*training("DiT-L/2, batch 64"), "torch, compiled", 74.0, images=64),
            record(*training("DiT-L/2, batch 256"), "torch, compiled", 260.0, images=256),
            record(*training("DiT-L/2, largest batch"), "torch, compiled", 260.0, images=256),
            record(*training("DSMoE-L-E16, batch 64"), "triton, compiled", 80.0, images=64),
            record(*training("DSMoE-L-E16, batch 64"), "grouped_mm, compiled", 112.9, images=64),
            record(*training("DSMoE-L-E16, batch 256"), "triton, compiled", 289.0, images=256),
            record(*training("DSMoE-L-E16, largest batch"), "triton, compiled", 519.0, images=512),
            record(ON_HOST, "permute", FORWARD, "PyTorch", 0.004),
            record(ON_HOST, "permute", FORWARD, "cuda", 0.015),
            {"extra_info": {"of": "another suite"}, "stats": {"median": 1.0}},
        ],
    }


def table(data: dict) -> dict[str, list[str]]:
    """The printed table: work -> the other cells."""
    lines = [line for line in goals.report(data).splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    return {cells[0]: cells[1:] for cells in rows}


def test_a_long_reason_does_not_widen_the_table() -> None:
    data = results()
    data["benchmarks"] = []
    for one in data["not_run"]:
        one["reason"] = "out of memory " * 40
    reached = [cells[-1] for cells in table(data).values()]
    assert any(cell.endswith("memory...") for cell in reached) and max(map(len, reached)) < 120


def test_goals_of_a_file() -> None:
    rows = table(results())
    assert len(rows) == len(goals.GOALS) + 2  # and the head
    today, baseline, ours, ratio, goal, verdict = rows["experts DSMoE-L-E16, forward+backward"]
    assert (today, baseline, ours) == ("2.940 ms (grouped_mm)", "2.000 ms (dense)", "2.080 ms (triton)")
    assert (ratio, goal, verdict) == ("1.04", "<= 1.05 x", "yes")
    assert rows["experts DSMoE-L-E48, forward+backward"][-1] == "**no**, 1.20 x the goal"
    skipped = rows["experts DSMoE-S-E48, forward+backward"]
    assert skipped[2] == "" and "triton: the Triton kernels need a CUDA device" in skipped[-1]
    assert rows["experts DSMoE-L-E16, saved for backward"][2:] == ["289 MiB (triton)", "0.65", "<= 320 MiB", "yes"]
    assert rows["experts DSMoE-L-E48, saved for backward"][-1] == "**no**, 1.14 x the goal"
    assert rows["unpermute DSMoE-L-E48, forward"][1:4] == ["0.050 ms (copy at 4.00 TB/s)", "0.060 ms (triton)", "1.20"]
    assert rows["router_topk DSMoE-S-E48, forward"][3:] == ["0.10", "<= 0.03 ms", "yes"]
    assert rows["expert-choice layer DiffMoE-L-E8, forward+backward"][-1].startswith("not measured: dense + predictor")
    assert rows["expert-choice layer DiffMoE-L-E8, forward"][-1] == "**no**: not in a CUDA graph"
    assert rows["experts DSMoE-L-E48, sampling 512, forward"][-2:] == ["ahead", "yes"]
    assert rows["experts DSMoE-L-E16, sampling 512, forward"][-1] == "not measured: loop: not in the file"
    assert rows["training step DSMoE-L-E16, batch 64, forward+backward"] == [
        *("567 images/s (grouped_mm, compiled, 64 images)", "865 images/s (torch, compiled, 64 images)"),
        *("800 images/s (triton, compiled, 64 images)", "0.92", ">= 0.85 x", "yes"),
    ]
    assert rows["training step DSMoE-L-E16, batch 256, forward+backward"][-1] == "**no**, 0.95 x the goal"
    largest = rows["training step DSMoE-L-E16, largest batch, forward+backward"]
    assert largest[2:] == ["987 images/s (triton, compiled, 512 images)", "1.00", ">= 1 x", "yes"]
    told = "not measured: triton, compiled: not in the file"
    assert rows["training step JiTMoE-L/16-E16, batch 64, forward+backward"][-1] == told
    assert rows["on the host permute, forward"][1:] == [
        *("0.004 ms (PyTorch)", "0.015 ms (cuda)", "3.75", "ahead", "**no**, 3.75 x the goal")
    ]
    text = goals.report(results())
    assert "NVIDIA H200" in text and "26 measured, 1 skipped, 1 failed" in text and "result is wrong" in text


def test_goals_need_the_published_sizes() -> None:
    data = copy.deepcopy(results())
    for one in data["benchmarks"]:
        one["extra_info"]["published_size"] = False
    assert all("not measured" in cells[-1] for cells in list(table(data).values())[2:])


def test_goals_name_cases_that_there_are() -> None:
    there = {(*case.key, provider) for case in all_cases(GPU) for provider in case.providers}
    there |= {(ON_HOST, op, FORWARD, provider) for op in OPS for provider in (*KERNEL_BACKENDS, "PyTorch")}
    for goal in goals.GOALS:
        assert set(goal.of_ours) & there
        assert {key for key in goal.of_baseline + goal.of_today if key[3] != "copy"} <= there


def test_goals_of_no_file(tmp_path, capsys) -> None:
    path = tmp_path / "none.json"
    assert goals.main([str(path)]) == 2
    assert "none.json" in capsys.readouterr().err
    path.touch()
    assert goals.main([str(path)]) == 2
    assert "nothing was timed" in capsys.readouterr().err


def test_a_run_leaves_a_file_that_the_goals_read(tmp_path) -> None:
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "results.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "-q",
        "-k",
        "token_drop and not predicted",
        f"--benchmark-json={path}",
    ]
    environment = {**os.environ, "BENCHMARK_SECONDS": "0.01", "TRITON_INTERPRET": "0"}
    environment.pop("PYTEST_XDIST_WORKER", None)  # beside which pytest-benchmark times nothing
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout
    data = json.loads(path.read_text())
    assert data["run"]["torch"] == torch.__version__ and "pytest" in data["run"]["command"]
    assert all(rate > 0 for rate in data["run"]["ceilings"].values())
    timed = {one["extra_info"]["provider"]: one for one in data["benchmarks"]}
    assert {"reference", "topk"} <= timed.keys()
    assert timed["topk"]["stats"]["median"] > 0 and timed["topk"]["extra_info"]["op"] == "token_drop"
    reasons = {one["provider"]: one["reason"] for one in data["not_run"]}
    assert timed.keys() | reasons.keys() == {"triton", "cuda", "reference", "topk"}
    assert "triton" in timed or reasons["triton"] == "the Triton kernels need a CUDA device"
    assert "cuda" in timed or "CUDA" in reasons["cuda"]
    assert all("not measured" in cells[-1] for cells in list(table(data).values())[2:])


def test_a_budget_stops_what_has_not_begun(tmp_path) -> None:
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "results.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "-q",
        "-k",
        "token_drop and reference and not predicted and not sampling",
        "--budget=0",
        f"--benchmark-json={path}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert "the budget of 0 s is spent" in done.stdout and " passed" not in done.stdout
    data = load([path])
    assert data["run"]["torch"] == torch.__version__
    assert [one["reason"] for one in data["not_run"]] == ["the budget of 0 s is spent"]
    assert "0 measured, 1 skipped, 0 failed" in goals.report(data)


def test_a_part_that_is_not_there_is_refused_with_those_that_are() -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "--part=typo"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "invalid choice: 'typo'" in done.stderr and "other-models" in done.stderr


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_what_the_host_is_timed_on_gives_the_same(op, backend):
    if reason := KERNEL_BACKENDS[backend](torch.empty(0)):
        pytest.skip(reason)
    found = []
    for provider in (backend, "PyTorch"):
        torch.manual_seed(0)
        found.append(calls(op, provider, "cpu")())
    if op == "router_topk":
        routing = found[0].routing
        found[0] = routing.token_indices.long(), routing.gates, routing.group_offsets
    torch.testing.assert_close(*found)
