"""Training: a run learns, leaves what it promises, takes its options from one place and refuses bad ones."""

import importlib
import re
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from models.options import flag, to_yaml
from models.sampling import sample_images
from models.train import main, notes, parse
from models.training.batches import ShuffledBatches
from models.training.checkpoints import list_checkpoints
from models.training.config import TrainConfig
from models.training.logs import late_error, read_metrics
from models.training.trainer import Trainer
from tests.models.runs import command_line, one_thread, tiny


@pytest.fixture(autouse=True)
def threads():
    with one_thread():
        yield


def test_a_run_learns_and_leaves_what_it_promises(tmp_path, capfd):
    run = tmp_path / "run"
    assert main(command_line(tiny(run, steps=40, learning_rate=5e-3, sample_every=20, checkpoint_every=15))) == 0

    records = read_metrics(run)
    assert [record["step"] for record in records] == list(range(1, 41))
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    assert records[0]["learning_rate"] == 2.5e-3 and records[-1]["learning_rate"] == 5e-3
    assert all(record["images_per_second"] > 0 for record in records)

    for picture in ("loss.png", "samples/step-00000020.png", "samples/step-00000040.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert [path.name for path in list_checkpoints(run)] == [f"step-000000{n}.pt" for n in (40, 30, 15)]

    out, progress = capfd.readouterr()
    assert "images/s" in progress and "loss" in progress
    assert str(list_checkpoints(run)[0]) in out and f"--checkpoint {run}" in out


def test_tensorboard_files_hold_the_same_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Trainer(tiny(tmp_path / "run", steps=3)).fit()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    written = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert written == [(r["step"], pytest.approx(r["loss"])) for r in read_metrics(tmp_path / "run")]


def test_time_limit_ends_a_run(tmp_path):
    result = Trainer(tiny(tmp_path / "run", steps=10**6, max_minutes=1e-6)).fit()
    assert result.ended_by == "time" and result.step < 10
    assert result.checkpoint == list_checkpoints(tmp_path / "run")[0]


def test_bfloat16_autocast_keeps_master_weights_and_loss_in_float32(tmp_path):
    trainer = Trainer(tiny(tmp_path / "run", steps=2, precision="bfloat16"))
    plain = Trainer(tiny(tmp_path / "plain", steps=2))
    torch.manual_seed(0)
    result = trainer.train_step(*next(trainer._batches()))
    torch.manual_seed(0)
    expected = plain.train_step(*next(plain._batches()))
    assert result.loss == pytest.approx(expected.loss, rel=2e-2) and result.grad_norm != expected.grad_norm
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_every_option_is_a_flag_with_help_and_survives_yaml(tmp_path, capsys):
    config = TrainConfig(
        model="DiT-digits",
        model_options={"depth": 2, "class_dropout_prob": 0.0},
        max_minutes=1.5,
        grad_clip=None,
        precision="bfloat16",
        compile=True,
        learning_rate=1e-5,
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert parse(["--config", str(tmp_path / "config.yaml")]) == (config, False)
    assert parse(command_line(config)) == (config, False)
    assert parse([]) == (TrainConfig(), False)

    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for spec in fields(TrainConfig):
        assert f"--{flag(spec.name)}" in text and " ".join(spec.metadata["help"].split()) in text


def test_the_saved_config_is_the_one_that_ran(tmp_path):
    config = tiny(tmp_path, steps=1)
    Trainer(config)
    assert parse(["--config", str(tmp_path / "config.yaml")])[0] == config
    assert parse(["--config", str(tmp_path / "config.yaml"), "--steps", "9"])[0] == replace(config, steps=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0: correct --steps"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1: correct --batch-size"),
        ({"batch_size": 4, "accumulation": 5}, "accumulation must be at most batch_size, 4, got 5"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"seed": -1}, "seed must be from 0 to .*, got -1: correct --seed"),
        ({"sample_cfg_scale": float("nan")}, "sample_cfg_scale must be a finite number, got nan"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
        ({"grad_clip": 0.0}, "grad_clip must be above 0, or null"),
        ({"max_minutes": 0.0}, "max_minutes must be above 0, or null"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "DSMoE-digit"], "unknown model 'DSMoE-digit': did you mean 'DSMoE-digits'"),
        (["--model-options", "{dept: 3}"], "no configuration field 'dept'; it has .*depth"),
        (
            ["--model-options", "{input_size: 32}"],
            "input_size=32, but the dataset 'digits' has 8: leave input_size out",
        ),
        (["--model-options", "{num_classes: 1000}"], "num_classes=1000, but the dataset 'digits' has 10"),
        (["--model-options", "{top_k: 99}"], "top_k"),
        (["--data", "digit"], "unknown dataset 'digit'; did you mean 'digits'"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--resume"], "run holds no run to resume: leave --resume out, or correct --output"),
    ],
)
def test_the_command_line_refuses_and_leaves_no_directory(tmp_path, capsys, arguments, message):
    run = tmp_path / "run"
    assert main(["--output", str(run), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not run.exists()


def test_an_output_directory_that_holds_another_run_is_refused(tmp_path, capsys):
    run = tmp_path / "run"
    Trainer(tiny(run, steps=1)).save()
    before = sorted(run.rglob("*"))
    assert main(["--output", str(run)]) == 2
    assert f"error: {run} holds another run: continue it with --resume, or choose another --output" in (
        capsys.readouterr().err
    )
    (run / "config.yaml").unlink()
    with pytest.raises(ValueError, match="holds another run"):
        Trainer(tiny(run))
    assert sorted(run.rglob("*")) == [path for path in before if path.name != "config.yaml"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_said(tmp_path):
    with pytest.raises(ValueError, match="torch finds no GPU: pass --device cpu"):
        Trainer(tiny(tmp_path / "run", device="cuda"))


def first_step(run: Path, accumulation: int, **model_options):
    """The first step's statistics, and its gradients with the router buffers it left, by name."""
    trainer = Trainer(tiny(run, accumulation=accumulation, model_options={"class_dropout_prob": 0.0, **model_options}))
    trainer.optimizer.zero_grad = lambda **_: None
    for parameter in trainer.parameters:  # a fresh model has zeros, behind which all gradients are zero
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    torch.manual_seed(0)
    stats = trainer.train_step(*next(trainer._batches()))
    tensors = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return stats, {**tensors, **dict(trainer.model.named_buffers())}


def test_accumulated_parts_equal_the_whole_batch(tmp_path):
    whole, whole_tensors = first_step(tmp_path / "whole", accumulation=1)
    parts, parts_tensors = first_step(tmp_path / "parts", accumulation=3)  # 16 images: 6, 5 and 5
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert whole_tensors.keys() == parts_tensors.keys() and len(whole_tensors) > 20
    for name, expected in whole_tensors.items():
        torch.testing.assert_close(parts_tensors[name], expected, rtol=1e-4, atol=1e-6)


def test_accumulation_averages_auxiliary_losses_too(tmp_path):
    whole, _ = first_step(tmp_path / "whole", accumulation=1, balance="loss")
    parts, _ = first_step(tmp_path / "parts", accumulation=3, balance="loss")
    assert whole.loss > whole.mse and parts.mse == pytest.approx(whole.mse, rel=1e-6)
    # The balance loss is no mean over tokens: its parts only come near.
    assert parts.loss - parts.mse == pytest.approx(whole.loss - whole.mse, rel=0.1)


def test_routers_are_updated_once_per_step_with_all_parts(tmp_path):
    trainer = Trainer(tiny(tmp_path, accumulation=3))
    calls = []
    trainer.model.update_routing_state = calls.append
    trainer.train_step(*next(trainer._batches()))
    (records,) = calls
    assert [record.layers[1].expert_load.sum() for record in records] == [6 * 32, 5 * 32, 5 * 32]  # 16 tokens, top 2


def test_moving_average_is_of_the_weights_and_has_the_buffers_of_now(tmp_path):
    trainer = Trainer(tiny(tmp_path, ema_decay=0.75))
    batches = trainer._batches()
    states = []
    for _ in range(2):
        trainer.train_step(*next(batches))
        states.append({key: value.clone() for key, value in trainer.model.state_dict().items()})
    averaged = trainer.averages["ema"].module.state_dict()
    assert any("bias" in name and not torch.equal(states[0][name], states[1][name]) for name in averaged)
    buffers = [name for name, _ in trainer.model.named_buffers() if name in averaged]
    assert any(not torch.equal(states[0][name], states[1][name]) for name in buffers)
    for name, value in averaged.items():
        mean = 0.75 * states[0][name] + 0.25 * states[1][name]
        torch.testing.assert_close(value, states[1][name] if name in buffers else mean)


def take(order: ShuffledBatches, count: int) -> list[list[int]]:
    batches = iter(order)
    return [next(batches) for _ in range(count)]


@pytest.mark.parametrize(("num_items", "batch_size"), [(10, 4), (7, 7), (3, 8)])
def test_every_epoch_has_every_item_once_in_a_new_order(num_items, batch_size):
    batches = take(ShuffledBatches(num_items, batch_size, seed=0), 40)
    assert {len(batch) for batch in batches} == {batch_size}
    indices = [index for batch in batches for index in batch]
    epochs = [tuple(indices[i : i + num_items]) for i in range(0, len(indices) - num_items + 1, num_items)]
    assert all(sorted(epoch) == list(range(num_items)) for epoch in epochs)
    assert len(set(epochs)) > 1


@pytest.mark.parametrize("start", [1, 2, 3, 9])
def test_data_order_goes_on_from_any_step(start):
    whole = take(ShuffledBatches(10, 4, seed=5), 12)
    assert take(ShuffledBatches(10, 4, seed=5, start=start), 12 - start) == whole[start:]
    assert take(ShuffledBatches(10, 4, seed=6), 12) != whole


def test_an_empty_training_split_is_refused():
    with pytest.raises(ValueError, match="training split is empty"):
        ShuffledBatches(0, 4, seed=0)


@pytest.mark.parametrize("module", ["train", "sample", "evaluate", "demo"])
def test_a_missing_extra_is_named_with_the_command_that_brings_it(module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert importlib.import_module(f"models.{module}").main([]) == 2
    assert "pip install '.[train]' in the checkout" in capsys.readouterr().err


def test_what_is_seldom_meant_is_noted(tmp_path):
    config = TrainConfig(model="DiT-digits", output=str(tmp_path), steps=2000, ema_decay=0.9999, ema_decay2=0.99)
    (note,) = notes(Trainer(config))
    assert note.startswith("after 2000 steps 82% of the average of --ema-decay 0.9999 is still the first weights")
    folder = tmp_path / "photos" / "class"
    folder.mkdir(parents=True)
    pytest.importorskip("PIL.Image").new("RGB", (32, 32)).save(folder / "one.png")
    of_pixels = {"data": str(tmp_path / "photos"), "image_size": 32}
    small = {"depth": 2, "hidden_size": 16, "num_heads": 2, "num_experts": 2, "num_groups": 1, "top_groups": 1}
    (note,) = notes(
        Trainer(TrainConfig(model="DSMoE-S-E16", model_options=small, output=str(tmp_path / "a"), **of_pixels))
    )
    assert note.startswith("DSMoE-S-E16 usually trains on latents of 4 channels and gets pixels here, 3 x 32 x 32: 256")
    meant = {"model": "DSMoE-S-E16", "model_options": {**small, "in_channels": 3}}
    for output, options in (("b", meant), ("c", {"model": "JiT-digits"})):
        assert notes(Trainer(TrainConfig(**options, output=str(tmp_path / output), **of_pixels))) == []
    sides = {"data": str(tmp_path / "photos"), "model": "JiT-digits"}
    assert notes(Trainer(TrainConfig(image_size=128, output=str(tmp_path / "d"), **sides))) == []
    (note,) = notes(Trainer(TrainConfig(output=str(tmp_path / "e"), **sides)))
    assert note.startswith("an image is 16,384 tokens (side 256, patches of 2)")


def test_an_output_that_is_a_file_ends_with_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--model", "DiT-digits", "--steps", "1", "--output", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_capacity_under_one_token_is_told_before_the_run_is_made(tmp_path):
    config = TrainConfig(
        model="DiffMoE-digits", output=str(tmp_path / "run"), batch_size=3, accumulation=3,
        model_options={"num_experts": 64},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"int\(16 / 64 \* 1.0\) = 0 tokens, expected at least 1"):
        Trainer(config)
    assert not (tmp_path / "run").exists()


def test_the_last_grid_is_drawn_once(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("models.training.trainer.save_samples", lambda path, *_: drawn.append(path.name))
    Trainer(tiny(tmp_path / "run", steps=4, sample_every=2)).fit()
    assert drawn == ["step-00000002.png", "step-00000004.png"]


def test_a_sampler_that_is_not_installed_is_refused_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    assert main(command_line(tiny(tmp_path / "run", sample_method="dopri5", sample_steps=None))) == 2
    assert "pip install torchdiffeq" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_backend_that_cannot_run_is_an_error_in_words(tmp_path, capsys):
    assert main(command_line(tiny(tmp_path / "run", model_options={"backend": "cuda"}))) == 2
    assert "there is no 'cuda' backend" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_late_error_is_that_of_the_last_tenth_of_the_steps():
    records = [{"step": step, "mse": float(step)} for step in (1, 5, 10, 60, 90, 95, 100)]
    assert late_error(records) == 97.5
    assert late_error(records[:1]) == 1.0


def test_a_record_has_the_speed_of_its_own_steps(tmp_path, monkeypatch):
    """The first step is slow, as where it compiles."""
    clock = iter([0.0, 100.0, *range(200, 300)])
    monkeypatch.setattr(
        "models.training.trainer.time", SimpleNamespace(perf_counter=lambda: next(clock), monotonic=time.monotonic)
    )
    result = Trainer(tiny(tmp_path / "run", steps=5, log_every=2)).fit()
    assert [record["images_per_second"] for record in read_metrics(tmp_path / "run")] == [16 / 100, 16, 16, 16]
    assert result.images_per_second == 5 * 16 / 104


def test_sample_grids_are_drawn_in_the_precision_of_the_run(tmp_path, monkeypatch):
    drawn = []

    def sample(model, labels, *, precision="float32", **options):
        drawn.append(precision)
        return sample_images(model, labels, precision=precision, **options)

    monkeypatch.setattr("models.training.samples.sample_images", sample)
    for precision in ("float32", "bfloat16"):
        Trainer(tiny(tmp_path / precision, precision=precision)).save_samples()
    assert drawn == ["float32", "bfloat16"]
