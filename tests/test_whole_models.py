"""Whole models among the benchmarks: steps run and are checked, records say what was run, the batch search ends right.

Mixtures are checked in float32: in bfloat16 a handful of tokens may be routed otherwise, which few tokens feel.
"""

from __future__ import annotations

import json
from dataclasses import replace
from unittest import SkipTest

import pytest
import torch

from benchmarks import measure, whole_models
from benchmarks.registry import BOTH, CPU, FORWARD, GPU, Case, Where
from benchmarks.steps import Training
from benchmarks.whole_models import ModelShape, largest_batch
from diffmoe_kernels.modules import Experts
from diffmoe_kernels.triton_support import HAS_TRITON
from models import CONFIGS, ExpertChoiceMoE
from models.flops import model_flops

FEW = {"hidden_size": 32, "num_heads": 2, "depth": 2}
MIXTURE = {**FEW, "num_experts": 4, "moe_intermediate_size": 16}
COMPILED = Where("cpu", torch.float32, lambda shape: replace(shape.small(), images=2), "aot_eager", HAS_TRITON)
CASES = {(case.op, case.shape.model): case for case in reversed(whole_models.cases(GPU))}  # of the smallest batch


@pytest.fixture
def few(monkeypatch) -> None:
    """The digits' models with two narrow blocks."""
    for name, sizes in {"DiT": FEW, "DSMoE": MIXTURE, "DiffMoE": {**FEW, "num_experts": 4}}.items():
        monkeypatch.setitem(CONFIGS, f"{name}-digits", replace(CONFIGS[f"{name}-digits"], **sizes))
    whole_models.parameters.cache_clear()
    yield
    whole_models.parameters.cache_clear()


@pytest.mark.parametrize("model", whole_models.MODELS)
@pytest.mark.parametrize("op", whole_models.BATCHES)
def test_a_step_of_every_model(op, model) -> None:
    case = CASES[op, model]
    steps, measured = measure.prepare(case, case.providers["torch"], CPU)
    for step in steps:
        step()
    config = CONFIGS[f"{model.partition('-')[0]}-digits"]
    twice, training = (1, True) if op == "training step" else (2, False)
    assert measured["images"] == 8 and measured["flops"] == twice * model_flops(config, 8, training=training)
    assert ("optimizer_ms" in measured) == training and measured.get("optimizer_ms", 1) > 0
    facts = {**case.facts("torch", CPU), **measured}
    assert json.loads(json.dumps(facts)) == facts
    assert facts["model"] == f"{model.partition('-')[0]}-digits" and not facts["captured"]
    assert facts["parameters"] >= facts["activated_parameters"] > 10**6 and facts["least_bytes"] > 0


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize(
    ("op", "model", "provider"),
    [
        ("training step", "DSMoE-L-E16", "triton, compiled"),
        ("training step", "DiffMoE-L-E8", "triton, compiled"),
        ("sampling step", "DiffMoE-L-E8", "triton"),
    ],
)
def test_kernels(few, op, model, provider) -> None:
    case = CASES[op, model]
    how = replace(case.providers[provider], masters=False)
    assert how.why_not(COMPILED) is None
    measure.prepare(case, how, COMPILED)


@pytest.mark.parametrize("provider", ["torch, compiled", "torch, one graph", "torch"])
def test_bfloat16_by_autocast(few, provider) -> None:
    where = replace(COMPILED, dtype=torch.bfloat16)
    case = CASES["training step", "DiT-L/2"]
    steps, _ = measure.prepare(case, case.providers[provider], where)
    steps[0]()
    assert case.facts(provider, where)["weights_dtype"] == "float32"


@pytest.mark.parametrize("model", ["DSMoE-L-E16", "JiTMoE-L/16-E16"])
def test_grouped_mm_in_place_of_the_experts(few, monkeypatch, model) -> None:
    """In bfloat16, which it is compiled in; the tolerance is for tokens that are routed otherwise."""
    monkeypatch.setitem(whole_models.LIMITS, torch.bfloat16, 0.5)
    case = CASES["sampling step", model]
    provider = case.providers["grouped_mm, compiled"]
    where = replace(COMPILED, dtype=torch.bfloat16)
    built = provider.build(where.resize(case.shape), where, torch.float32)
    kinds = {type(one) for one in built.modules() if isinstance(one, Experts)}
    assert kinds == {whole_models.GroupedMM}
    steps, _ = measure.prepare(case, provider, where)
    assert steps[0]().isfinite().all()


def spoiled(case: Case, where: Where, spoil) -> Case:
    """The case whose "torch" provider builds a model that was tampered with."""
    right = case.providers["torch"]

    def wrong(shape, where, dtype):
        model = right.build(shape, where, dtype)
        spoil(model)
        return model

    return replace(case, providers={"torch": replace(right, build=wrong)})


@torch.no_grad()
def wrong_expert(model) -> None:
    model.blocks[1].mlp.experts.down_proj[2] *= 1.1


@torch.no_grad()
def not_a_number(model) -> None:
    model.blocks[0].attn.proj.bias[3] = float("nan")


def wrong_gradient(model) -> None:
    model.blocks[1].mlp.router.weight.register_hook(lambda gradient: gradient * 1.1)


@pytest.mark.parametrize(
    ("op", "spoil"),
    [
        *(("training step", one) for one in (wrong_expert, not_a_number, wrong_gradient)),
        *(("sampling step", one) for one in (wrong_expert, not_a_number)),
    ],
)
def test_a_wrong_step_has_no_time(few, op, spoil) -> None:
    case = spoiled(CASES[op, "DSMoE-L-E16"], CPU, spoil)
    with pytest.raises(AssertionError, match="is wrong by .*: no time"):
        measure.prepare(case, case.providers["torch"], CPU)


def test_a_training_step_does_all_of_it(few) -> None:
    """Weights, their average and DiffMoE's thresholds move, and no gradient is left."""
    torch.manual_seed(0)
    shape = ModelShape("DiffMoE-digits", 8)
    run = Training(whole_models.build("torch", BOTH)(shape, CPU, torch.float32), torch.float32)
    run.begin()
    step = run.step_on(whole_models.images(shape, CPU))
    step()  # the average starts as a copy
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    averaged = {name: value.clone() for name, value in run.average.module.state_dict().items()}
    step()
    assert not torch.equal(run.model.blocks[1].mlp.expert_threshold, before["blocks.1.mlp.expert_threshold"])
    for name, parameter in run.model.named_parameters():
        assert parameter.grad is None
        if parameter.requires_grad:
            assert not torch.equal(parameter, before[name]), name
            assert not torch.equal(run.average.module.state_dict()[name], averaged[name]), name


def test_sampling_computes_as_many_rows_as_training() -> None:
    torch.manual_seed(0)
    shape = ModelShape("DiffMoE-digits", 32)
    noise = whole_models.images(shape, CPU)
    model = whole_models.build("torch", FORWARD)(shape, CPU, torch.float32).eval()
    labels = torch.arange(32) % 10
    with torch.no_grad():
        _, aux = model(noise, torch.zeros(32), labels, return_aux=True)
    mixtures = [block.mlp for block in model.blocks if isinstance(block.mlp, ExpertChoiceMoE)]
    rows = [layer.expert_load.sum().item() for layer in aux.layers if layer is not None]
    assert len(rows) == len(mixtures) == 3
    assert rows == pytest.approx([32 * 16] * 3, rel=0.1)


def test_what_runs_where() -> None:
    cases = {case.key: case for case in whole_models.cases(CPU)}
    assert len(cases) == 2 * 7 + 6 + 2 * 7  # 3B at 64 and at the largest alone
    run = [key[:2] for key, case in cases.items() if case.providers["torch"].why_not(CPU) is None]
    assert run == [
        (op, f"{name}, batch 64")
        for op in whole_models.BATCHES
        for name in ("DiT-L/2", "DSMoE-L-E16", "DiffMoE-L-E8", "JiT-L/16", "JiTMoE-L/16-E16")
    ]
    twin = cases["training step", "DSMoE-L-E48, largest batch", BOTH].providers["torch"]
    assert twin.why_not(CPU) == "small, it is the same as another batch or model of its family"
    replayed = cases["training step", "DSMoE-L-E48, batch 256", BOTH].providers["triton, compiled, captured"]
    assert replace(replayed, masters=False).why_not(COMPILED) == "a CUDA graph needs a CUDA device"
    for case in whole_models.cases(GPU):
        captured = [name for name, one in case.providers.items() if one.replays]
        backends = ["triton", "torch"] if case.op == "training step" else ["triton"]
        assert captured == [f"{name}, compiled, captured" for name in backends if case.shape.images is not None]
        assert all(one.needs(GPU) is None and not one.captured and one.masters for one in case.providers.values())
        assert {"triton", "triton, compiled", "torch", "torch, compiled"} <= case.providers.keys()
        facts = case.facts("torch", GPU)
        assert facts["published_size"] and facts["images"] == case.shape.images


def test_equal_activated_parameters() -> None:
    millions = {name: round(whole_models.parameters(name)[1] / 1e6) for name in whole_models.MODELS}
    assert millions == {
        **{"DiT-L/2": 458, "DSMoE-L-E16": 487, "DSMoE-L-E48": 457, "DiffMoE-L-E8": 471},
        **{"DSMoE-3B-E16": 1011, "JiT-L/16": 459, "JiTMoE-L/16-E16": 489},
    }


class Memory:
    """A GPU of so much room, a step that keeps ``fixed`` and takes ``slope`` for an image and ``once`` in all."""

    error = torch.OutOfMemoryError

    def __init__(self, room: float, fixed: float, slope: float, once: float = 0.0) -> None:
        self.room, self.fixed, self.slope, self.once, self.tried = room, fixed, slope, once, []

    def __call__(self, count: int) -> tuple[int, int]:
        self.tried.append(count)
        most = self.fixed + max(self.slope * count, self.once)
        if most > self.room:
            raise self.error(f"Triton Error [CUDA]: out of memory: {most} of {self.room}")
        return int(self.fixed), int(most)


@pytest.mark.parametrize(
    ("memory", "found", "tried"),
    [
        (Memory(1000, 100, 1), 512, [64, 512]),  # as estimated
        (Memory(1100, 100, 1, once=20), 512, [64, 1024, 512]),  # gradients were there when memory was fullest
        (Memory(160, 100, 0.9), 64, [64]),
        (Memory(10**9, 100, 1), 2048, [64, 2048]),  # no more is tried
    ],
)
def test_the_largest_batch(memory, found, tried) -> None:
    assert largest_batch(memory, int(memory.once), 64, int(memory.room)) == found
    assert memory.tried == tried


def test_the_drivers_word_for_it_counts_too() -> None:
    memory = Memory(1100, 100, 1, once=20)
    memory.error = RuntimeError
    assert largest_batch(memory, 20, 64, 1100) == 512


def test_a_batch_that_does_not_fit() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        largest_batch(Memory(100, 90, 1), 0, 64, 100)


def test_another_error_is_none_of_memory() -> None:
    def memory(count: int) -> tuple[int, int]:
        if count > 64:
            raise RuntimeError("an illegal memory access")
        return 1, 2

    with pytest.raises(RuntimeError, match="illegal"):
        largest_batch(memory, 0, 64, 1000)


@pytest.mark.parametrize("where", ["the reference", "the model"])
def test_a_batch_that_does_not_fit_is_skipped_with_the_reason(few, monkeypatch, where) -> None:
    def too_large(self, images, at_once):
        raise torch.OutOfMemoryError("CUDA out of memory")

    case = CASES["training step", "DiT-L/2"]
    if where == "the model":
        monkeypatch.setattr(whole_models, "right", lambda *args: ({}, {}))
    monkeypatch.setattr(Training, "outcome", too_large)
    with pytest.raises(SkipTest, match="8 images do not fit"):
        measure.prepare(case, case.providers["torch"], CPU)


def test_blocks_share_their_compilations() -> None:
    """But the first one, which finds nothing to add to the stream."""
    case = CASES["sampling step", "DiT-L/2"]
    model = case.providers["torch, compiled"].module(COMPILED.resize(case.shape), COMPILED).eval()
    stats = torch._dynamo.utils.counters["stats"]
    stats.clear()
    for graphs, count in ((2, 2), (4, 4)):
        with torch.no_grad():
            model(torch.randn(count, 1, 8, 8), torch.rand(count), torch.zeros(count, dtype=torch.int64))
        assert stats["unique_graphs"] == graphs and len(model.blocks) == 6
        torch._dynamo.reset()  # as between the batches that are tried
