"""Expert analysis: known routings give known counts, and the command writes what it says."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.analysis import figures
from benchmarks.analysis.usage import (
    ExpertUsage,
    UsageRecorder,
    group_classes,
    layer_loads,
    rows_per_sample,
)
from benchmarks.analyze import ARRAYS, EVEN, AnalyzeConfig, analyze, main, record_usage
from diffmoe_kernels import MoE, Routing
from models import DiT, create_model
from models.objectives import objective_for
from models.options import command_line
from models.training.config import TrainConfig
from models.training.loading import TrainedModel
from models.training.trainer import Trainer
from tests.golden.test_models import TARGETS
from tests.golden.vectors import load_case
from tests.models.helpers import random_inputs, randomize
from tests.models.runs import one_thread, tiny

SMALL = {"hidden_size": 24, "depth": 4, "num_heads": 2, "num_classes": 3}
TOKENS = 16  # of a sample of the digits models
FAMILIES = {
    "DSMoE-digits": {},
    "TC-DiT-digits": {},
    "EC-DiT-digits": {},
    "JiTMoE-digits": {},
    "DiffMoE-digits": {"inference": "token"},
}


@pytest.fixture(autouse=True)
def threads():
    with one_thread():
        yield


def build(name: str, **overrides: object) -> DiT:
    """A small model whose routing depends on all that it is given."""
    model = randomize(create_model(name, **{**SMALL, **overrides})).eval()
    torch.nn.init.normal_(model.y_embedder.embedding_table.weight)
    for block in model.blocks:
        if hasattr(block.mlp, "expert_threshold"):
            block.mlp.expert_threshold.normal_()
    return model


def routes_to(model: DiT, *experts: int) -> DiT:
    """Makes every token choose these experts."""
    for block in model.blocks:
        if isinstance(block.mlp, MoE):
            torch.nn.init.zeros_(block.mlp.router.weight)
            block.mlp.router.expert_bias[list(experts)] = 1.0
    return model


def sample(model: DiT, labels: Tensor, batch_size: int | None = None, **options: object) -> ExpertUsage:
    objective = objective_for(model)
    with UsageRecorder(model) as recorder:
        for part in labels.split(batch_size or len(labels)):
            recorder.start_batch(len(part))
            objective.sample(model, random_inputs(model, len(part))[0], part, **options)
    return recorder.usage()


def by_hand(rows: object, tokens: int) -> ExpertUsage:
    """Rows (L, C, E), and as many tokens of each class."""
    rows = np.array(rows)
    tokens_by_class = np.full(rows.shape[:2], tokens)
    rows_by_time = np.stack([rows.sum(1, keepdims=True), 0 * rows.sum(1, keepdims=True)], 1)
    tokens_by_time = np.stack([tokens_by_class.sum(1, keepdims=True), np.zeros((len(rows), 1), int)], 1)
    blocks, classes = np.arange(len(rows)), 10 * np.arange(rows.shape[1])
    return ExpertUsage(blocks, classes, np.zeros(1), rows, tokens_by_class, rows_by_time, tokens_by_time)


def test_rows_of_token_choice_with_dropped_slots() -> None:
    ids = torch.tensor([[0, 2], [2, -1], [-1, -1], [2, 0], [0, 2], [4, 2]])
    routing = Routing.from_topk(ids, torch.ones(6, 2), 5)
    assert rows_per_sample(routing, 2).tolist() == [[1, 0, 2, 0, 0], [2, 0, 3, 0, 1]]
    assert rows_per_sample(routing, 1).tolist() == [[3, 0, 5, 0, 1]]


def test_rows_of_expert_choice_within_a_bound() -> None:
    chosen = torch.tensor([[0, 1, 3], [2, 0, 0], [0, 0, 0], [0, 3, 0]])
    counts = torch.tensor([3, 1, 0, 2])
    routing = Routing.from_expert_choice(chosen, torch.ones(4, 3), 4, counts)
    assert routing.num_rows == 12
    assert rows_per_sample(routing, 2).tolist() == [[2, 0, 0, 1], [1, 1, 0, 1]]


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_are_those_of_each_sample_by_itself(name) -> None:
    model = build(name, **FAMILIES[name])
    x, t, _ = random_inputs(model, 6)
    labels = torch.tensor([2, 0, 2, 2, 0, 2])
    with torch.no_grad(), UsageRecorder(model) as recorder:
        recorder.start_batch(6)
        model(x, t, labels)
    usage = recorder.usage()
    assert usage.blocks.tolist() == [1, 3] and usage.classes.tolist() == [0, 2]
    expected = torch.zeros(2, 3, usage.num_experts)
    with torch.no_grad():
        for one in range(6):
            layers = model(x[one : one + 1], t[one : one + 1], labels[one : one + 1], return_aux=True)[1].layers
            expected[:, labels[one]] += torch.stack([layers[1].expert_load, layers[3].expert_load])
    assert usage.rows_by_class.tolist() == expected[:, [0, 2]].tolist()
    assert usage.rows_by_time[:, 0, 0].tolist() == expected.sum(1).tolist()
    # JiT's four class tokens come before block 2.
    tokens = [TOKENS, TOKENS + 4] if name == "JiTMoE-digits" else [TOKENS, TOKENS]
    assert usage.tokens_by_class.tolist() == [[2 * count, 4 * count] for count in tokens]
    assert not usage.rows_by_time[:, 1].any() and np.isnan(usage.capacity_by_time[:, 1]).all()


def test_one_pool_of_the_batch() -> None:
    model = build("DiffMoE-digits")
    x, t, labels = random_inputs(model, 5)
    with torch.no_grad(), UsageRecorder(model) as recorder:
        recorder.start_batch(5)
        _, aux = model(x, t, labels, return_aux=True)
    usage = recorder.usage()
    expected = torch.stack([aux.layers[1].expert_load, aux.layers[3].expert_load]).numpy()
    assert (usage.rows_by_class.sum(1) == expected).all()
    assert 0 < expected.sum() < 2 * usage.num_experts * 5 * TOKENS  # a capacity that is no bound's
    assert usage.capacity_by_time[:, 0, 0] == pytest.approx(expected.sum(1) / (5 * TOKENS))


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_samples_that_fill_a_batch_do_not_count(cfg_scale, batch_size) -> None:
    model = routes_to(build("DSMoE-digits"), 1, 6)
    usage = sample(model, torch.tensor([0, 1, 2, 0, 1]), batch_size, steps=3, cfg_scale=cfg_scale)
    assert usage.times.tolist() == pytest.approx([0, 1 / 3, 2 / 3])
    rows = np.zeros((2, 3, 8), int)
    rows[:, :, [1, 6]] = TOKENS * 3 * np.array([2, 2, 1])[:, None]
    assert usage.rows_by_class.tolist() == rows.tolist()
    unconditional = 0 if cfg_scale == 1.0 else 5 * TOKENS
    assert usage.tokens_by_time.tolist() == [[[5 * TOKENS] * 3, [unconditional] * 3]] * 2
    assert (usage.rows_by_time[..., [1, 6]] == usage.tokens_by_time[..., None]).all()
    assert usage.rows_by_time.sum() == 2 * usage.tokens_by_time.sum()


def test_halves_that_the_sampler_calls_one_after_the_other() -> None:
    model = build("DiffMoE-digits")
    usage = sample(model, torch.tensor([0, 2, 2]), steps=2, cfg_scale=2.0)
    assert usage.times.tolist() == [0, 0.5]
    assert usage.tokens_by_time.tolist() == [[[3 * TOKENS] * 2] * 2] * 2
    assert (usage.rows_by_time[:, 0].sum(1) == usage.rows_by_class.sum(1)).all()
    assert (usage.rows_by_time[:, 1] != usage.rows_by_time[:, 0]).any()


def test_guidance_at_some_times_and_two_calls_a_step() -> None:
    model = routes_to(build("JiTMoE-digits"), 0, 3)
    usage = sample(model, torch.tensor([0, 1]), steps=4, method="heun", cfg_scale=2.0)
    assert usage.times.tolist() == [0, 0.25, 0.5, 0.75]  # ends with an Euler step
    first = usage.tokens_by_time[0] / (2 * TOKENS)
    assert first.tolist() == [[1, 2, 2, 2], [0, 2, 2, 2]]  # JiT guides after 0.1
    assert np.isnan(usage.capacity_by_time[:, 1, 0]).all() and (usage.capacity_by_time[:, 0] == 2).all()


def test_times_in_the_order_of_the_calls() -> None:
    model = build("DSMoE-digits")
    x, _, labels = random_inputs(model, 2)
    with torch.no_grad(), UsageRecorder(model) as recorder:
        recorder.start_batch(2)
        for time in (999, 0, 0, 500):
            model(x, torch.full((2,), time), labels)
        usage = recorder.usage()
        assert usage.times.tolist() == [999, 0, 500]
        assert (usage.tokens_by_time[0, 0] == 2 * TOKENS * np.array([1, 2, 1])).all()
        assert (usage.rows_by_time[:, 0].sum(-1) == 2 * usage.tokens_by_time[:, 0]).all()
        recorder.start_batch(2)
        model(x, torch.full((2,), 998), labels)
    with pytest.raises(ValueError, match="times: expected the same in every batch"):
        recorder.usage()


def test_recorder_refuses() -> None:
    with pytest.raises(ValueError, match="got a dense DiT: there are no experts"):
        UsageRecorder(create_model("DiT-digits"))
    with pytest.raises(ValueError, match="got a dense JiT"):
        UsageRecorder(create_model("JiT-digits"))
    with pytest.raises(ValueError, match="expected calls of the model after start_batch, got none"):
        UsageRecorder(create_model("DSMoE-digits")).usage()


def test_load_of_known_rows() -> None:
    busy, empty = layer_loads(by_hand([[[4, 2, 0, 0], [2, 0, 0, 0]], [[0] * 4] * 2], tokens=5))
    assert (busy.block, busy.dead_experts) == (0, 2)
    assert (busy.largest_share, busy.smallest_share, busy.max_over_mean) == (0.75, 0, 3)
    assert busy.cv == pytest.approx(1.5**0.5) and busy.experts_per_token == 0.8
    assert (empty.block, empty.dead_experts, empty.experts_per_token) == (1, 4, 0)
    assert np.isnan([empty.cv, empty.max_over_mean, empty.largest_share, empty.smallest_share]).all()


def test_classes_in_groups() -> None:
    usage = by_hand([[[1, 0], [2, 0], [3, 1], [4, 0], [0, 5]]], tokens=7)
    names, rows, tokens = group_classes(usage, 2)
    assert names == ["0–20", "30–40"]
    assert rows.tolist() == [[[6, 1], [4, 5]]] and tokens.tolist() == [[21, 14]]
    names, rows, tokens = group_classes(usage, 5)
    assert names == ["0", "10", "20", "30", "40"]
    assert (rows == usage.rows_by_class).all() and (tokens == usage.tokens_by_class).all()


def test_fewer_images_than_classes_are_spread_over_them() -> None:
    model = build("DSMoE-digits", num_classes=10)
    config = AnalyzeConfig(num_samples=4, steps=1, cfg_scale=1.0)
    assert record_usage(TrainedModel(model, objective_for(model), None), config).classes.tolist() == [0, 3, 6, 9]


def test_images_that_are_no_numbers_are_refused() -> None:
    model = build("DSMoE-digits", num_classes=10)
    torch.nn.init.constant_(next(model.parameters()), torch.nan)
    config = AnalyzeConfig(num_samples=2, steps=1, cfg_scale=1.0)
    with pytest.raises(ValueError, match="images hold NaN or infinity"):
        record_usage(TrainedModel(model, objective_for(model), None), config)


def test_counting_changes_no_sample_and_ends() -> None:
    model, labels = build("DiffMoE-digits"), torch.tensor([0, 1, 2])
    noise = random_inputs(model, 3)[0]
    plain = objective_for(model).sample(model, noise, labels, steps=2)
    with UsageRecorder(model) as recorder:
        recorder.start_batch(3)
        assert torch.equal(objective_for(model).sample(model, noise, labels, steps=2), plain)
    counted = recorder.usage()
    objective_for(model).sample(model, noise, labels, steps=2)
    assert (recorder.usage().rows_by_class == counted.rows_by_class).all()


def strict_json(text: str) -> dict:
    def refuse(constant: str) -> None:
        raise ValueError(f"no JSON: {constant}")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Untrained runs: "dsmoe"; "diffmoe", where every token goes to every expert; "idle", a DiffMoE where none goes."""
    folder, options = tmp_path_factory.mktemp("analyze"), {"hidden_size": 16, "depth": 2, "num_heads": 2}
    with one_thread():
        Trainer(tiny(folder / "dsmoe")).save()
        for name, threshold in (("diffmoe", -1e9), ("idle", 1e9)):
            trainer = Trainer(TrainConfig("DiffMoE-digits", options, output=str(folder / name), batch_size=16))
            trainer.averages["ema"].module.blocks[1].mlp.expert_threshold.fill_(threshold)
            trainer.save()
    return folder


@pytest.mark.parametrize(("name", "num_experts", "per_token"), [("dsmoe", 4, 2), ("diffmoe", 8, 8), ("idle", 8, 0)])
def test_the_command_writes_pictures_arrays_and_table(name, num_experts, per_token, runs, tmp_path, capsys) -> None:
    words = ["--ckpt", str(runs / name), "--output", str(tmp_path), "--num-samples", "6", "--classes", "7", "3"]
    assert main([*words, "--steps", "2", "--batch", "4"]) == 0
    pictures = {path.name for path in tmp_path.glob("*.png")}
    expected = {"experts_by_class.png", "experts_by_timestep.png", "load.png"}
    assert pictures == (expected if name == "dsmoe" else expected | {"capacity.png"})
    table = (tmp_path / "analysis.md").read_text()
    assert table in capsys.readouterr().out + "\n" and "| block | load CV |" in table and "\n| 1     |" in table

    with np.load(tmp_path / "analysis.npz") as archive:
        arrays = dict(archive)
    assert list(arrays) == list(ARRAYS)
    assert arrays["classes"].tolist() == [3, 7] and arrays["times"].tolist() == [0, 0.5]
    assert arrays["rows_by_class"].shape == (1, 2, num_experts)
    assert arrays["rows_by_time"].shape == (1, 2, 2, num_experts)
    assert (arrays["rows_by_time"][:, 0].sum(1) == arrays["rows_by_class"].sum(1)).all()
    assert arrays["tokens_by_time"].tolist() == [[[6 * TOKENS] * 2] * 2]
    record = strict_json((tmp_path / "analysis.json").read_text())
    assert record["config"]["num_samples"] == 6 and record["arrays"].keys() == arrays.keys()
    (layer,) = record["layers"]
    assert layer["experts_per_token"] == per_token
    assert layer["largest_share"] == (None if name == "idle" else pytest.approx(arrays["load"].max()))


def test_an_official_checkpoint(tmp_path, capsys) -> None:
    yaml = pytest.importorskip("yaml")
    case = load_case("model_jit_moe")
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"target": TARGETS["jit"], "params": case.config["ctor"]}))
    torch.save({"model": case.state_dict}, tmp_path / "file.pth")
    words = ["--ckpt", str(tmp_path / "file.pth"), "--official", str(tmp_path / "model.yaml"), "--steps", "1"]
    assert main([*words, "--num-samples", "2", "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "load.png").stat().st_size > 10_000
    assert (
        "JiT: MoE layers 2, experts 8, images 2, classes 2, times of sampling 1, guidance 1.5"
        in capsys.readouterr().out
    )


def test_experts_that_take_equally_many_tokens_of_each_sample(tmp_path) -> None:
    options = {"hidden_size": 16, "depth": 2, "num_heads": 2}
    Trainer(TrainConfig("EC-DiT-digits", options, output=str(tmp_path / "run"), batch_size=16)).save()
    text = analyze(AnalyzeConfig(str(tmp_path / "run"), str(tmp_path / "out"), num_samples=3, steps=1))
    assert "| 1     | 0.000   | 1.00       | 12.50% " in text and EVEN in text
    assert not (tmp_path / "out" / "capacity.png").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "dopri5"], "method must be a sampler of fixed times"),
        (["--classes", "10"], "10"),
        (["--num-samples", "0"], "num_samples must be at least 1"),
        (["--cfg-scale", ".inf"], "cfg_scale must be a finite number, got inf"),
        (["--objective", "flow"], "objective must be left out without --official"),
        (["--ckpt", "nowhere"], "nowhere"),
    ],
)
def test_wrong_requests(runs, tmp_path, capsys, more, message) -> None:
    assert main(["--ckpt", str(runs / "dsmoe"), "--output", str(tmp_path / "out"), *more]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_pictures_of_what_is_rare(tmp_path) -> None:
    """Layers and classes without rows, one time, falling times, many classes: drawn without a warning."""
    rows = np.random.default_rng(0).integers(0, 50, (3, 90, 20))
    rows[0], rows[1, :, 5], rows[2, 7] = 0, 0, 0
    one_time = by_hand(rows, 50)
    times = np.array([999.0, 500.0, 0.0])
    three = {"times": times, "rows_by_time": one_time.rows_by_time.repeat(3, 2)}
    three_times = replace(one_time, **three, tokens_by_time=one_time.tokens_by_time.repeat(3, 2))
    for usage in (one_time, three_times, by_hand(rows[1:2, :1], 50)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figures.save_experts_by_class(tmp_path / "class.png", usage, "title")
            figures.save_experts_by_time(tmp_path / "time.png", usage, "title", "time")
            figures.save_load(tmp_path / "load.png", usage, "title")
            figures.save_capacity(tmp_path / "capacity.png", usage, "title", "time", 1.0)
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_what_the_heat_maps_show(tmp_path, monkeypatch) -> None:
    shown = []
    heat_maps = figures._heat_maps
    monkeypatch.setattr(figures, "_heat_maps", lambda *one, **more: shown.append(heat_maps(*one, **more)) or shown[-1])
    usage = by_hand([[[6, 2, 0, 0], [1, 1, 1, 1]], [[0, 0, 0, 0], [0, 1, 0, 3]]], 4)
    figures.save_experts_by_class(tmp_path / "class.png", usage, "title")
    figures.save_experts_by_time(tmp_path / "time.png", usage, "title", "time")
    (_, by_class), (_, by_time) = shown
    assert [one.get_title() for one in by_class] == ["block 0", "block 1"]
    image = by_class[0].images[0]
    assert image.get_array().tolist() == [[3, 1, 0, 0], [1, 1, 1, 1]]
    assert image.norm(1) == 0.5 and image.norm.vmax == 3
    assert by_class[1].images[0].get_array().mask.tolist() == [[True] * 4, [False] * 4]
    assert by_time[0].images[0].get_array()[:, 0].tolist() == pytest.approx([28 / 12, 1, 4 / 12, 4 / 12])
    names = [[text.get_text() for text in axis.get_ticklabels()] for axis in (by_class[0].xaxis, by_class[0].yaxis)]
    assert names == [["0", "1", "2", "3"], ["0", "10"]]
    assert [text.get_text() for text in by_time[0].get_yticklabels()] == ["0", "1", "2", "3"]


def test_the_command_of_a_path_with_a_space():
    config = AnalyzeConfig(checkpoint="runs/my run", objective_options={"noise_scale": 2.0}, classes=[1, 2])
    expected = "python -m x --checkpoint 'runs/my run' --classes 1 2 --objective-options '{\"noise_scale\": 2.0}'"
    assert command_line("x", config) == expected
