"""Training by several processes, as torchrun starts them: two on this machine's CPU, joined by gloo."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from models import create_model
from models.data import load_dataset, load_npz
from models.objectives import objective_for
from models.sample import main as sample
from models.training.batches import ShuffledBatches
from models.training.checkpoints import load_newest
from models.training.logs import read_metrics
from models.training.processes import Processes, process_group
from models.training.trainer import Trainer
from tests.models.runs import ROOT, command_line, one_thread, tiny
from tests.models.shares import FAMILIES, family_run, step_with_gradients
from tests.models.test_resume import assert_same, newest


@pytest.fixture(autouse=True, scope="module")
def threads():
    with one_thread():
        yield


def torchrun(*arguments: str, devices: str = "") -> subprocess.CompletedProcess:
    """Two processes of a module."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": devices},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def shares(tmp_path_factory):
    """The directory of all runs of `tests.models.shares`, and what each process told."""
    output = tmp_path_factory.mktemp("shares")
    Trainer(tiny(output / "one", steps=2)).fit()
    ended = torchrun("tests.models.shares", str(output))
    assert ended.returncode == 0, ended.stderr
    return output, [torch.load(output / f"rank-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_the_mean_of_those_of_the_shares(name, shares, tmp_path):
    told = [process[name] for process in shares[1]]
    for entry in ("gradients", "stats", "weights"):
        assert_same(told[0][entry], told[1][entry])

    alone = []
    for rank, process in enumerate(told):
        trainer = Trainer(family_run(tmp_path / str(rank), name))
        torch.set_rng_state(process["random"])
        alone.append(step_with_gradients(trainer, *process["batch"]))
    for key, gradient in told[0]["gradients"].items():
        parts = torch.stack([process["gradients"][key] for process in alone])
        assert parts.isfinite().all() and parts.any(), key
        torch.testing.assert_close(gradient, parts.mean(0), rtol=1e-5, atol=1e-7, msg=key)
    for key in ("loss", "mse"):
        mean = sum(process["stats"][key] for process in alone) / 2
        assert told[0]["stats"][key] == pytest.approx(mean, rel=1e-5)


def test_processes_share_batches_and_draw_noise_of_their_own(shares):
    told = [process["DiT-digits"] for process in shares[1]]
    assert not torch.equal(told[0]["random"], told[1]["random"])
    data = load_dataset("digits").train
    indices = next(iter(ShuffledBatches(len(data), 16, 0)))
    images = torch.stack([data[i][0] for i in indices])
    assert torch.equal(torch.cat([process["batch"][0] for process in told]), images)


def test_a_run_of_several_resumes_bit_for_bit(shares):
    output = shares[0]
    assert_same(newest(output / "straight"), newest(output / "parts"))
    assert len(newest(output / "parts")["further_rng"]) == 1
    assert [record["step"] for record in read_metrics(output / "parts")] == [1, 2, 3, 4, 5, 6]


def test_another_number_of_processes_goes_on_with_a_warning(shares, tmp_path):
    output, told = shares
    for process in told:
        assert len(process["resumed"]) == 1 and "processes 1 -> 2" in process["resumed"][0]
    assert load_newest(output / "one")[1]["step"] == 4
    run = shutil.copytree(output / "straight", tmp_path / "run")
    with pytest.warns(UserWarning, match="processes 2 -> 1"):
        resumed = Trainer(replace(tiny(run), steps=7), resume=True)
    assert resumed.fit().step == 7


def test_a_signal_to_one_stops_all_with_a_checkpoint(shares):
    output, told = shares
    assert [process["stopped"] for process in told] == ["signal 2"] * 2
    assert load_newest(output / "stopped")[1]["step"] == 2


def test_images_that_one_can_not_read_stop_all_with_a_checkpoint(shares):
    output, told = shares
    assert "another process could not load its images" in told[0]["failed"]
    assert told[1]["failed"] == "the disk is gone"
    assert load_newest(output / "failed")[1]["step"] == 1


def test_gradients_are_averaged_after_a_graph_too(shares):
    """To the same bits: of two processes a sum has one order."""
    assert [process["captured"] for process in shares[1]] == [True, True]
    assert [process["equal"] for process in shares[1]] == [True, True]


def test_the_command_under_torchrun(tmp_path):
    run = tmp_path / "run"
    ended = torchrun("models.train", *command_line(tiny(run, steps=3, workers=1)))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("step 3, ended by steps") == 1 and ended.stderr.count("note: ") == 1
    assert [record["step"] for record in read_metrics(run)] == [1, 2, 3]
    assert {path.name for path in run.iterdir()} == {
        ".lock",
        *("checkpoints", "config.yaml", "loss.png", "metrics.jsonl", "samples", "tensorboard"),
    }
    ended = torchrun("models.train", *command_line(tiny(tmp_path / "other", batch_size=17)))
    assert ended.returncode == 1 and "batch_size is 17, but 2 processes need a multiple of 2" in ended.stderr
    assert not (tmp_path / "other").exists()


def test_samples_of_several_are_those_of_one(tmp_path):
    """Each process draws some of the parts; what is there stays, and is checked."""
    Trainer(tiny(tmp_path / "run", steps=1)).fit()

    def arguments(folder: str) -> list[str]:
        paths = ["--checkpoint", tmp_path / "run", "--output", tmp_path / folder, "--join", tmp_path / f"{folder}.npz"]
        counts = {"num-samples": 14, "part-size": 4, "batch-size": 2, "steps": 1}
        return [*map(str, paths), *(f"--{name}={count}" for name, count in counts.items())]

    assert sample(arguments("one")) == 0
    (tmp_path / "two").mkdir()
    kept = tmp_path / "two" / "samples-000008.npz"
    kept.write_bytes((tmp_path / "one" / kept.name).read_bytes())
    before = kept.stat().st_mtime_ns
    ended = torchrun("models.sample", *arguments("two"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("14 samples: ") == 1 and kept.stat().st_mtime_ns == before
    names = [path.name for path in sorted((tmp_path / "one").iterdir())]
    assert [path.name for path in sorted((tmp_path / "two").iterdir())] == names and len(names) == 5
    for ours, theirs in zip(load_npz(tmp_path / "two.npz"), load_npz(tmp_path / "one.npz"), strict=True):
        assert torch.equal(ours, theirs) and len(ours) == 14


def test_several_processes_sample_in_parts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Processes, "current", staticmethod(lambda: Processes(0, 2)))
    assert sample(["--checkpoint", str(tmp_path), "--output", str(tmp_path / "samples")]) == 2
    assert "2 processes share the parts of a run: pass --part-size" in capsys.readouterr().err


@pytest.mark.gpu
def test_two_gpus_train_and_sample(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    run, options = tmp_path / "run", {"steps": 6, "device": "cuda", "precision": "bfloat16"}
    for module, more in (
        ("models.train", command_line(tiny(run, **options))),
        ("models.train", command_line(tiny(tmp_path / "graph", cuda_graph=True, **options))),
        ("models.sample", ["--checkpoint", str(run), "--output", str(run / "parts"), "--part-size", "50"]),
    ):
        ended = torchrun(module, *more, devices="0,1")
        assert ended.returncode == 0, ended.stderr
    graph, one_by_one = (
        [{**record, "images_per_second": 0} for record in read_metrics(tmp_path / name)] for name in ("graph", "run")
    )
    assert len(one_by_one) == 6 and graph == one_by_one
    assert len(list((run / "parts").glob("samples-*.npz"))) == 2


def test_torchrun_without_a_group_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="WORLD_SIZE is 8, but there is no process group"):
        Trainer(tiny(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    Trainer(tiny(tmp_path / "run"))


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU, there are 2"), process_group("auto"):
        pass


def test_shares_of_a_batch():
    assert [Processes(rank, 3).share(list(range(9))) for rank in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert Processes().share([4, 2]) == [4, 2]
    assert Processes(1, 4).share_size(12, 3) == 3
    with pytest.raises(ValueError, match="at least 4 images each"):
        Processes(1, 4).share_size(12, 4)


class Wrapper(torch.nn.Module):
    """Has the model as `module`, and none of its attributes, as DistributedDataParallel."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *arguments, **options):
        return self.module(*arguments, **options)


@pytest.mark.parametrize("name", ["DiffMoE-digits", "JiT-digits"])
def test_objectives_take_models_in_wrappers(name):
    model = create_model(name, **FAMILIES[name])
    objective, labels = objective_for(model), torch.arange(4)
    images, t = torch.randn(4, 1, 8, 8), torch.full((4,), 0.5)
    model.eval()
    bare, wrapped = (objective.loss(m, images, labels, t=t, noise=images) for m in (model, Wrapper(model)))
    assert torch.equal(bare.loss, wrapped.loss)
    average = AveragedModel(model).eval()
    samples = [objective.sample(m, images, labels, steps=2, cfg_scale=2.0) for m in (model, average)]
    assert torch.equal(*samples)
