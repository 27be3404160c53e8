"""Runs that stop, by wish, by SIGKILL or by a NaN: what is left, and how they go on."""

import io
import os
import pickle
import signal
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from diffmoe_kernels import Balance
from models.train import main, parse
from models.training.batches import ShuffledBatches
from models.training.checkpoints import CheckpointError, list_checkpoints, load_checkpoint, load_newest, save_checkpoint
from models.training.config import TrainConfig
from models.training.logs import read_metrics
from models.training.trainer import NonFiniteError, Trainer
from tests.models.runs import command_line, one_thread, start, tiny


@pytest.fixture(autouse=True)
def threads():
    with one_thread():
        yield


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


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("DSMoE-digits", {"balance": Balance(bias_rate=0.01), "moe_intermediate_size": 8}),
        ("JiTMoE-digits", {"balance": {"loss_weight": 0.1}, "moe_intermediate_size": 8, "context_start": 1}),
        ("DiffMoE-digits", {"capacity_schedule": (1, 3)}),
    ],
)
def test_options_from_python_resume_from_the_command_line(tmp_path, model, options):
    sizes = {"hidden_size": 16, "depth": 2, "num_heads": 2, "num_experts": 4}
    config = replace(tiny(tmp_path / "run", steps=1), model=model, model_options=sizes | options)
    Trainer(config).fit()
    assert main(["--resume", "--output", config.output, "--steps", "2"]) == 0
    assert load_newest(tmp_path / "run")[1]["step"] == 2


def test_the_optimizer_is_the_devices_own(tmp_path):
    """A run that began on a GPU, where AdamW is fused, goes on here as one that began here does, and the other way."""
    assert main(command_line(tiny(tmp_path / "run", steps=1))) == 0
    path, state = load_newest(tmp_path / "run")
    state["optimizer"]["param_groups"][0]["fused"] = True
    save_checkpoint(tmp_path / "run", state, keep=1)
    assert main(["--resume", "--output", str(tmp_path / "run"), "--steps", "2"]) == 0
    assert load_newest(tmp_path / "run")[1]["optimizer"]["param_groups"][0]["fused"] is None


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
    yaml = pytest.importorskip("yaml")
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
        ({"beta2": 0.5}, "beta2 is 0.5.*with 0.999.*leave --beta2 out"),
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


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
    run = tmp_path / "run"
    config = tiny(run, steps=10, warmup_steps=0, learning_rate=1e30, checkpoint_every=1, grad_clip=None)
    assert main(command_line(config)) == 1
    (good,) = list_checkpoints(run)
    error = capsys.readouterr().err
    assert "error: step 2: the loss is " in error
    assert f"the last good checkpoint is {good}" in error and "--learning-rate" in error
    assert load_checkpoint(good)["step"] == 1


@pytest.mark.parametrize("checkpoint", [True, False], ids=["from checkpoint", "from start"])
def test_a_run_goes_on_after_a_loss_that_is_not_finite(tmp_path, checkpoint):
    config = tiny(tmp_path, steps=4, warmup_steps=0, learning_rate=1e30, grad_clip=None)
    if checkpoint:
        config = replace(config, checkpoint_every=1)
    with pytest.raises(NonFiniteError, match="step 2: .*: resume.* with a lower --learning-rate, a smaller"):
        Trainer(config).fit()
    mended = replace(config, steps=3, learning_rate=1e-4, grad_clip=0.5, precision="bfloat16")
    if not checkpoint:
        Trainer(mended, resume=True).fit()
        assert {record["learning_rate"] for record in read_metrics(tmp_path)} == {1e-4}
        return
    path, state = load_newest(tmp_path)
    fresh = Trainer(tiny(tmp_path / "fresh", steps=1, warmup_steps=0)).state_dict()
    weights = {name: fresh[name] for name in ("model", "ema")}  # those of the step before
    save_checkpoint(tmp_path, {**state, **weights}, keep=1)
    told = r"learning_rate 1e\+30 -> 0.0001, grad_clip None -> 0.5, precision float32 -> bfloat16 since"
    with pytest.warns(UserWarning, match=f"resumed, but not bit for bit: {told}"):
        trainer = Trainer(mended, resume=True)
    trainer.fit()
    assert [record["learning_rate"] for record in read_metrics(tmp_path)] == [1e30, 1e-4, 1e-4]
    moved = max((trainer.model.state_dict()[name] - value).abs().max() for name, value in fresh["model"].items())
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-4 and moved < 1e-2, "of a rate of 1e30 nothing is left"


def test_a_run_that_failed_before_its_first_checkpoint_may_be_corrected(tmp_path, capsys, monkeypatch):
    arguments = ["--output", str(tmp_path), "--steps", "1", "--batch-size", "4", "--sample-steps", "1"]
    with monkeypatch.context() as failing:
        failing.setattr(Trainer, "launch_step", lambda *_: (_ for _ in ()).throw(NotImplementedError("no such kernel")))
        assert main(arguments) == 1
    assert main([*arguments, "--resume", "--model-options", "{depth: 2}"]) == 2
    assert f", or remove {tmp_path / 'config.yaml'}: that run has no checkpoint yet" in capsys.readouterr().err
    (tmp_path / "config.yaml").unlink()
    assert main([*arguments, "--model-options", "{depth: 2}"]) == 0
    assert load_newest(tmp_path)[1]["model_overrides"]["depth"] == 2


def test_a_lower_learning_rate_warms_up_too(tmp_path):
    Trainer(tiny(tmp_path, steps=2, warmup_steps=8)).fit()
    with pytest.warns(UserWarning, match="learning_rate 0.001 -> 0.0001"):
        trainer = Trainer(tiny(tmp_path, steps=4, warmup_steps=8, learning_rate=1e-4), resume=True)
    trainer.fit()
    rates = [record["learning_rate"] for record in read_metrics(tmp_path)]
    assert rates == pytest.approx([1e-3 / 8, 2e-3 / 8, 3e-4 / 8, 4e-4 / 8])


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path):
    trainer = Trainer(tiny(tmp_path, steps=2))
    trainer.model.final_layer.linear.bias.data.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match=r"step 0: final_layer\.linear\.bias of the model .* no checkpoint yet"):
        trainer.save()
    assert list_checkpoints(tmp_path) == []


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
        (pickle.dumps(Malicious(), protocol=2), "truncated, damaged or another kind"),
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


def test_options_of_another_version_are_told(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(command_line(tiny(run, steps=1))) == 0
    path = run / "config.yaml"
    path.write_text(path.read_text() + "new_option: 3\n")
    assert main(["--resume", "--output", str(run)]) == 2
    assert "has options that this version does not: new_option" in capsys.readouterr().err


def test_an_option_that_a_run_did_not_have_is_its_default(tmp_path):
    run = tmp_path / "run"
    Trainer(tiny(run, steps=1)).save()
    state = load_newest(run)[1]
    del state["train_config"]["ema_decay2"]
    save_checkpoint(run, {**state, "step": 2}, keep=1)
    with pytest.raises(ValueError, match="ema_decay2 is 0.9, but .* was written by a run with None"):
        Trainer(tiny(run, steps=3, ema_decay2=0.9), resume=True)
    assert Trainer(tiny(run, steps=3), resume=True).step == 2


def losses(run: Path) -> list[tuple[int, float]]:
    return [(one["step"], one["loss"]) for one in read_metrics(run)]


def test_a_record_that_a_stop_divides_is_whole(tmp_path):
    Trainer(tiny(tmp_path / "straight", steps=8, log_every=4)).fit()
    Trainer(tiny(tmp_path / "parts", steps=6, log_every=4)).fit()
    Trainer(tiny(tmp_path / "parts", steps=8, log_every=4), resume=True).fit()
    assert losses(tmp_path / "parts") == losses(tmp_path / "straight")


def test_the_last_record_is_of_the_steps_that_are_left(tmp_path):
    """Once: what goes on writes it anew, with the steps that it belongs to."""
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    Trainer(tiny(straight, steps=7, log_every=3)).fit()
    assert [step for step, _ in losses(straight)] == [1, 3, 6, 7]
    Trainer(tiny(parts, steps=5, log_every=3)).fit()
    before = losses(parts)
    assert [step for step, _ in before] == [1, 3, 5]
    Trainer(tiny(parts, steps=5, log_every=3), resume=True).fit()  # there is nothing left to do
    assert losses(parts) == before
    Trainer(tiny(parts, steps=7, log_every=3), resume=True).fit()
    assert losses(parts) == losses(straight)
    assert_same(newest(straight), newest(parts))


class Damaged(Dataset):
    """The digits, of which one can't be read."""

    def __init__(self, images, bad):
        self.images, self.bad = images, bad

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index == self.bad:
            raise ValueError("the image 7.png can't be read")
        return self.images[index]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_damaged_ends_a_run_with_a_checkpoint(tmp_path, workers):
    Trainer(tiny(tmp_path / "straight", steps=5)).fit()
    stopped = Trainer(tiny(tmp_path / "stopped", steps=5, workers=workers))
    order = iter(ShuffledBatches(len(stopped.data.train), 16, stopped.config.seed, start=3))
    stopped.data = replace(stopped.data, train=Damaged(stopped.data.train, next(order)[0]))
    with pytest.raises(ValueError, match=r"7\.png can't be read"):
        stopped.fit()
    assert load_newest(tmp_path / "stopped")[1]["step"] == 3
    Trainer(stopped.config, resume=True).fit()
    assert_same(newest(tmp_path / "straight"), newest(tmp_path / "stopped"))
