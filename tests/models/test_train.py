"""Training: it learns, resumes bit for bit, survives kills and signals, and refuses what can't work."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.optim.swa_utils import AveragedModel

from models.train import main, parse
from models.training.batches import ShuffledBatches
from models.training.checkpoints import CheckpointError, list_checkpoints, load_checkpoint, load_newest, save_checkpoint
from models.training.config import TrainConfig, flag, to_yaml
from models.training.interrupt import StopOnSignal
from models.training.logs import read_metrics
from models.training.trainer import NonFiniteError, Trainer, ema_update

ROOT = Path(__file__).parents[2]
# "bias": router buffers that change, so that they must be averaged, saved and restored.
TINY = {"hidden_size": 16, "depth": 2, "num_heads": 2, "num_experts": 4, "moe_intermediate_size": 8, "balance": "bias"}


@pytest.fixture(autouse=True)
def few_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(output: Path, **options) -> TrainConfig:
    model_options = {**TINY, **options.pop("model_options", {})}
    quick = {"batch_size": 16, "warmup_steps": 2, "log_every": 1, "sample_rows": 1, "sample_steps": 2}
    return TrainConfig(output=str(output), model_options=model_options, **{**quick, **options})


def command_line(config: TrainConfig) -> list[str]:
    """`config` as command-line options."""
    words = []
    for name, value in asdict(config).items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{flag(name)}")
        else:
            words += [f"--{flag(name)}", json.dumps(value) if isinstance(value, dict) else str(value or "null")]
    return words


def assert_same(a, b, where: str = "checkpoint") -> None:
    """Equality of nested checkpoints, bit for bit in tensors."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


def newest(run: Path) -> dict:
    """The newest checkpoint of a run, without the options that a resumed run may change."""
    state = load_newest(run)[1]
    changeable = [spec.name for spec in fields(TrainConfig) if spec.metadata["change_on_resume"]]
    for name in changeable:
        del state["train_config"][name]
    return state


# --- what a run leaves -------------------------------------------------------------------------------------------


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


# --- resuming ----------------------------------------------------------------------------------------------------


def test_six_steps_equal_three_and_three_bit_for_bit(tmp_path):
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    Trainer(tiny(straight, steps=6)).fit()
    # Sampling in one of the runs only shows that it does not disturb the training's random numbers.
    Trainer(tiny(parts, steps=3, sample_every=1)).fit()
    torch.manual_seed(999)
    resumed = Trainer(tiny(parts, steps=6), resume=True)
    assert resumed.step == 3
    resumed.fit()

    assert_same(newest(straight), newest(parts))
    keys = ("step", "loss", "mse", "grad_norm", "learning_rate", "epoch")
    one, other = ([[r[key] for key in keys] for r in read_metrics(run)] for run in (straight, parts))
    assert one == other


def test_a_resumed_run_takes_its_own_options_as_defaults(tmp_path):
    run = tmp_path / "run"
    assert main(command_line(tiny(run, steps=2))) == 0
    config, resume = parse(["--resume", "--output", str(run), "--steps", "4"])
    assert resume and config == tiny(run, steps=4)
    assert main(["--resume", "--output", str(run), "--steps", "4"]) == 0
    assert load_newest(run)[1]["step"] == 4
    assert yaml.safe_load((run / "config.yaml").read_text())["steps"] == 4


def test_records_after_the_checkpoint_are_not_kept_twice(tmp_path):
    run = tmp_path / "run"
    Trainer(tiny(run, steps=4, checkpoint_every=2)).fit()
    list_checkpoints(run)[0].unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # as a killed process leaves it
    Trainer(tiny(run, steps=5), resume=True).fit()
    assert [record["step"] for record in read_metrics(run)] == [1, 2, 3, 4, 5]


def test_a_run_stopped_before_its_first_checkpoint_starts_over(tmp_path):
    Trainer(tiny(tmp_path / "run", steps=2))
    Trainer(tiny(tmp_path / "run", steps=2), resume=True).fit()
    Trainer(tiny(tmp_path / "straight", steps=2)).fit()
    assert_same(newest(tmp_path / "run"), newest(tmp_path / "straight"))


def test_another_environment_is_said_not_to_be_bit_for_bit(tmp_path):
    Trainer(tiny(tmp_path / "run", steps=1)).fit()
    path, state = load_newest(tmp_path / "run")
    state["environment"]["torch"] = "2.0.0"
    save_checkpoint(tmp_path / "run", state, keep=1)
    with pytest.warns(UserWarning, match=rf"not bit for bit: torch 2\.0\.0 -> .* since {path}"):
        Trainer(tiny(tmp_path / "run", steps=2), resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "DiT-digits"}, "model is 'DiT-digits'.*with 'DSMoE-digits'.*leave --model out"),
        ({"model_options": {"depth": 3}}, "model_options is .*'depth': 3.*leave --model-options out"),
        ({"learning_rate": 0.5}, "learning_rate is 0.5.*with 0.001.*leave --learning-rate out"),
        ({"batch_size": 8}, "batch_size is 8.*with 16"),
        ({"seed": 1}, "seed is 1.*with 0"),
    ],
)
@pytest.mark.parametrize("checkpoint", [True, False], ids=["from checkpoint", "from start"])
def test_resuming_as_another_run_is_refused(tmp_path, change, message, checkpoint):
    trainer = Trainer(tiny(tmp_path, steps=1))
    if checkpoint:
        trainer.save()
    with pytest.raises(ValueError, match=message):
        Trainer(tiny(tmp_path, steps=2, **change), resume=True)


def test_resuming_another_config_of_the_same_name_is_refused(tmp_path):
    Trainer(tiny(tmp_path, steps=1)).save()
    path, state = load_newest(tmp_path)
    state["model_config"]["num_experts"] = 16
    save_checkpoint(tmp_path, state, keep=1)
    with pytest.raises(CheckpointError, match=rf"{path} holds a DSMoE-digits with num_experts=16, .*num_experts=4"):
        Trainer(tiny(tmp_path, steps=2), resume=True)


# --- kills, signals, divergence ----------------------------------------------------------------------------------

BLOCK_IN_SECOND_WRITE = """
import io, sys, time, torch
from models.train import main

save = torch.save

def save_half(state, file):
    if state["step"] < 4:
        return save(state, file)
    buffer = io.BytesIO()
    save(state, buffer)
    file.write(buffer.getvalue()[: buffer.tell() // 2])
    file.flush()
    print("writing", flush=True)
    time.sleep(600)

torch.save = save_half
main(sys.argv[1:])
"""


def start(code: list[str], config: TrainConfig) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *code, *command_line(config)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def test_sigkill_while_writing_a_checkpoint_leaves_the_previous_one(tmp_path):
    config = tiny(tmp_path / "run", steps=6, checkpoint_every=2)
    process = start(["-c", BLOCK_IN_SECOND_WRITE], config)
    assert process.stdout.readline() == "writing\n"
    process.kill()
    assert process.wait() == -signal.SIGKILL

    folder = tmp_path / "run" / "checkpoints"
    (torn,) = folder.glob(".*.tmp")
    with pytest.raises(CheckpointError):
        load_checkpoint(torn)
    path, state = load_newest(tmp_path / "run")
    assert path.name == "step-00000002.pt" and state["step"] == 2

    Trainer(config, resume=True).fit()
    Trainer(replace(config, output=str(tmp_path / "straight"))).fit()
    assert_same(newest(tmp_path / "run"), newest(tmp_path / "straight"))
    assert not torn.exists()


def test_ctrl_c_ends_cleanly_with_a_checkpoint(tmp_path):
    run = tmp_path / "run"
    config = tiny(run, steps=10**6)
    process = start(["-m", "models.train"], config)
    deadline = time.monotonic() + 60
    while not ((run / "metrics.jsonl").exists() and read_metrics(run)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)

    assert process.returncode == 0
    path, state = load_newest(run)
    assert state["step"] == read_metrics(run)[-1]["step"] >= 1
    assert f"ended by signal; newest checkpoint {path}" in out
    assert f"continue with: python -m models.train --resume --output {run}" in out
    result = Trainer(replace(config, steps=state["step"] + 1), resume=True).fit()
    assert result.step == state["step"] + 1


def test_sigterm_finishes_the_step_and_a_second_signal_is_not_held_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopOnSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
    run = tmp_path / "run"
    config = tiny(run, steps=10, warmup_steps=0, learning_rate=1e30, checkpoint_every=1, grad_clip=None)
    assert main(command_line(config)) == 1
    (good,) = list_checkpoints(run)
    error = capsys.readouterr().err
    assert "error: step 2: the loss is " in error
    assert f"the last good checkpoint is {good}" in error and "--learning-rate" in error
    assert load_checkpoint(good)["step"] == 1


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path):
    trainer = Trainer(tiny(tmp_path, steps=2))
    trainer.model.final_layer.linear.bias.data.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match=r"step 0: final_layer\.linear\.bias of the model .* no checkpoint yet"):
        trainer.save()
    assert list_checkpoints(tmp_path) == []


# --- checkpoint files --------------------------------------------------------------------------------------------


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in range(5):
        save_checkpoint(tmp_path, {"step": step}, keep=2)
    assert [load_checkpoint(path)["step"] for path in list_checkpoints(tmp_path)] == [4, 3]


def test_an_unreadable_newer_checkpoint_is_skipped_and_does_not_push_out_good_ones(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, {"step": step}, keep=2)
    damaged = list_checkpoints(tmp_path)[0]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=f"skipped: {damaged} can't be read"):
        assert load_newest(tmp_path)[1]["step"] == 1

    (tmp_path / "checkpoints" / "step-00000009.pt").write_bytes(b"")
    saved = save_checkpoint(tmp_path, {"step": 2}, keep=1)
    assert load_checkpoint(saved)["step"] == 2
    with pytest.warns(UserWarning, match="step-00000009"):
        assert load_newest(tmp_path)[0] == saved


def test_a_run_whose_checkpoints_are_all_damaged_says_so(tmp_path):
    save_checkpoint(tmp_path, {"step": 1}, keep=2).write_bytes(b"PK")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        Trainer(tiny(tmp_path, steps=1), resume=True)


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated, damaged or another kind"),
        (b"not a checkpoint at all", "truncated, damaged or another kind"),
        (pickle.dumps(Malicious()), "truncated, damaged or another kind"),
        (Malicious(), "truncated, damaged or another kind"),
        ({"ema": {}, "model": {}}, "not a checkpoint of models.train.*load_official"),
        ([1, 2], "not a checkpoint of models.train"),
    ],
    ids=["empty", "text", "pickled code", "torch file with code", "official", "list"],
)
def test_files_that_are_no_checkpoints_are_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    if not isinstance(content, bytes):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        content = buffer.getvalue()
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{path} .*{message}"):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


# --- options -----------------------------------------------------------------------------------------------------


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
    import re

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


# --- the step ----------------------------------------------------------------------------------------------------


def test_accumulated_parts_equal_the_whole_batch(tmp_path):
    trainers = []
    for accumulation in (1, 3):  # 16 images: parts of 6, 5 and 5
        options = {"class_dropout_prob": 0.0, "balance": "loss"}
        trainer = Trainer(tiny(tmp_path / str(accumulation), accumulation=accumulation, model_options=options))
        trainer.optimizer.zero_grad = lambda **_: None
        # The official start is 0 in the last layers, where most gradients would be 0.
        for parameter in trainer.parameters:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
        torch.manual_seed(0)
        trainer.stats = trainer.train_step(*next(trainer._batches()))
        trainers.append(trainer)
    whole, parts = trainers
    # The balance loss is not a mean over tokens, so that it alone differs, and by little.
    assert parts.stats.mse == pytest.approx(whole.stats.mse, rel=1e-6)
    assert parts.stats.loss == pytest.approx(whole.stats.loss, rel=1e-2)
    assert parts.stats.loss > parts.stats.mse


def test_accumulated_gradients_equal_those_of_the_whole_batch(tmp_path):
    gradients = []
    for accumulation in (1, 3):
        trainer = Trainer(
            tiny(tmp_path / str(accumulation), accumulation=accumulation, model_options={"class_dropout_prob": 0.0})
        )
        trainer.optimizer.zero_grad = lambda **_: None
        for parameter in trainer.parameters:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
        torch.manual_seed(0)
        trainer.train_step(*next(trainer._batches()))
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None})
        buffers = {name: value for name, value in trainer.model.named_buffers() if "bias" in name}
        gradients[-1].update(buffers)
    whole, parts = gradients
    assert whole.keys() == parts.keys() and len(whole) > 20
    for name in whole:
        torch.testing.assert_close(
            parts[name], whole[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_moving_average_covers_parameters_and_buffers(tmp_path):
    trainer = Trainer(tiny(tmp_path, ema_decay=0.75))
    batches = trainer._batches()
    states = []
    for _ in range(2):
        trainer.train_step(*next(batches))
        states.append({key: value.clone() for key, value in trainer.model.state_dict().items()})
    averaged = trainer.ema.module.state_dict()
    assert any("bias" in name and not torch.equal(states[0][name], states[1][name]) for name in averaged)
    for name, value in averaged.items():
        torch.testing.assert_close(value, 0.75 * states[0][name] + 0.25 * states[1][name])
    buffers = [name for name, _ in trainer.model.named_buffers() if name in averaged]
    assert any(not torch.equal(states[0][name], states[1][name]) for name in buffers)


def test_moving_average_copies_counters():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.tensor([7, 100]))
            self.register_buffer("mean", torch.tensor([0.0]))

    model = Counter()
    ema = AveragedModel(model, multi_avg_fn=ema_update(0.9), use_buffers=True)
    ema.update_parameters(model)
    model.count += 1
    model.mean += 1
    ema.update_parameters(model)
    assert ema.module.count.tolist() == [8, 101]
    assert ema.module.mean.item() == pytest.approx(0.1)


# --- data order --------------------------------------------------------------------------------------------------


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
