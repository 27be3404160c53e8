"""The comparison of mixtures with dense models: what it concludes, what it trains and does not train again."""

import functools
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import fid_parity
from benchmarks.fid_parity import ParityConfig, dense_counterpart, main, make_run
from benchmarks.parity import runs as parity_runs
from benchmarks.parity import scoring
from benchmarks.parity.runs import Run, RunError, carry_out_all
from models import list_models
from models.data import collect, load_dataset, load_npz
from models.data.encoding import encode_folder
from models.metrics import FidScores, train_classifier
from models.sample import SampleConfig, sample_to_files
from models.sampling import to_images
from models.training.checkpoints import list_checkpoints
from models.training.trainer import Trainer, TrainResult
from tests.models.helpers import save_vae
from tests.models.runs import one_thread, tiny

PAIR = ["DiT-digits", "DSMoE-digits"]


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


@pytest.fixture(scope="module", autouse=True)
def one_classifier():
    """Trained once for all tests, it takes seconds."""
    classifier = functools.cache(lambda: train_classifier(load_dataset("digits")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "train_classifier", lambda data: classifier())
        yield


@pytest.mark.parametrize(
    ("name", "dense"),
    [
        ("DSMoE-digits", "DiT-digits"),
        ("JiTMoE-digits", "JiT-digits"),
        ("DSMoE-L-E48", "DiT-L/2"),
        ("DiffMoE-L-E8", "DiT-L/2"),
        ("EC-DiT-S-E16", "DiT-S/2"),
        ("TC-DiT-digits", "DiT-digits"),
        ("JiTMoE-B/16-E16", "JiT-B/16"),
        ("DiT-XL/2", None),
        ("JiT-L/16", None),
    ],
)
def test_dense_counterparts(name, dense):
    assert dense_counterpart(name) == dense


def test_every_mixture_but_the_largest_has_a_counterpart():
    for name in set(list_models()) - {"DSMoE-3B-E16"}:
        assert dense_counterpart(name) in (None, *list_models())
    with pytest.raises(ValueError, match="DSMoE-3B-E16 has no dense counterpart"):
        dense_counterpart("DSMoE-3B-E16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cfg_scale": float("inf")}, "cfg_scale must be a finite number, got inf"),
        ({"models": ["DSMoE-digits"]}, "models must be complete: with DiT-digits, which DSMoE-digits is"),
        ({"models": ["DSMoE-digit"]}, "did you mean 'DSMoE-digits'"),
        ({"seeds": 0}, "seeds must be at least 1, got 0: correct --seeds"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"jobs": 0}, "jobs must be at least 1"),
        ({"num_samples": 100}, "num_samples must be 500 for the digits, got 100"),
        ({"inception": "file.pth", "reference": "file.npz"}, "inception must be left out for the digits"),
        ({"data": "latents", "inception": "file.pth"}, "reference must be given, FID needs both files"),
        ({"data": "latents", "reference": "file.npz"}, "inception must be given, FID needs both files"),
    ],
)
def test_options_that_can_not_be(options, message):
    with pytest.raises(ValueError, match=message):
        ParityConfig(**options)


def test_defaults_are_those_of_the_data():
    digits, latents = ParityConfig(), ParityConfig(data="latents", steps=5)
    assert (digits.seeds, digits.batch_size, digits.num_samples) == (3, 64, 500)
    assert len(digits.models) == 5 and digits.cfg_scale == 1.0
    assert latents.models == ["DiT-L/2", "DSMoE-L-E16", "DSMoE-L-E48", "DiffMoE-L-E16"]
    assert (latents.steps, latents.batch_size, latents.num_samples, latents.cfg_scale) == (5, 512, 50_000, 1.0)
    assert latents.seeds == 3
    assert digits.command() == "python -m benchmarks.fid_parity"
    assert latents.command() == "python -m benchmarks.fid_parity --data latents --steps 5"


def test_latent_models_are_trained_and_sampled_as_published():
    latents = make_run(ParityConfig(data="latents"), "DSMoE-L-E16", 0)
    assert (latents.train.grad_clip, latents.train.warmup_steps, latents.train.weight_decay) == (None, 0, 0.0)
    assert (latents.train.batch_size, latents.train.sample_steps, latents.sample.steps) == (512, 250, 250)
    assert (latents.train.precision, latents.sample.precision) == ("tf32", "tf32")
    assert "usual-250" in latents.sample.join
    assert make_run(ParityConfig(data="latents", sample_method="heun"), "DSMoE-L-E16", 0).sample.steps is None
    options = {"accumulation": 2, "compile": True, "cuda_graph": True}
    images = make_run(ParityConfig(data="photos", models=["JiT-B/16"], **options), "JiT-B/16", 0)
    assert all(getattr(images.train, name) == value for name, value in options.items())
    assert images.sample.steps is None and images.sample.compile and images.sample.cuda_graph
    digits = make_run(ParityConfig(), "DSMoE-digits", 0)
    assert (digits.train.grad_clip, digits.train.warmup_steps, digits.sample.steps) == (1.0, 100, 50)
    assert (digits.train.precision, digits.sample.precision) == ("float32", "float32")


QUICK = ["--steps", "2", "--sample-steps", "1", "--batch-size", "16", "--jobs", "1", "--models", *PAIR]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    output = tmp_path_factory.mktemp("parity") / "run"
    assert main(["--output", str(output), "--seeds", "2", *QUICK]) == 0
    return output


@pytest.fixture
def compared(made, tmp_path):
    """Two models, two seeds, two steps; each test has a copy of its own."""
    return shutil.copytree(made, tmp_path / "run")


def test_a_comparison_leaves_table_numbers_and_pictures(compared):
    report, record = (compared / "parity.md").read_text(), json.loads((compared / "parity.json").read_text())
    assert "DSMoE-digits against DiT-digits: **" in report
    assert "`python -m benchmarks.fid_parity --models DiT-digits DSMoE-digits --seeds 2 --steps 2" in report
    assert [model["model"] for model in record["models"]] == PAIR and record["distance"] == "digits-FD"
    for model in record["models"]:
        assert model["steps"] == 2 and [one["seed"] for one in model["seeds"]] == [0, 1]
        assert all(one["score"]["distance"] > one["score"]["floor"] > 0 for one in model["seeds"])
    distances = [[one["score"]["distance"] for one in model["seeds"]] for model in record["models"]]
    assert record["comparisons"]["DSMoE-digits"]["difference"] == pytest.approx(
        np.mean(distances[1]) - np.mean(distances[0])
    )
    for name in ("loss.png", "samples.png"):
        assert (compared / name).read_bytes().startswith(b"\x89PNG")


def archives(output):
    return {path.relative_to(output): path for path in sorted(output.rglob("samples.npz"))}


def test_samples_are_those_of_models_sample_with_the_runs_seed(compared):
    found = archives(compared)
    assert len(found) == 4
    images = [load_npz(path)[0] for path in found.values()]
    assert all(one.shape == (500, 8, 8, 3) for one in images)
    folder = compared / "DSMoE-digits" / "seed-1"
    sample_to_files(
        SampleConfig(
            checkpoint=str(folder),
            output=str(compared / "again"),
            num_samples=500,
            method="euler",
            steps=1,
            cfg_scale=1.0,
            seed=1,
        )
    )
    (expected,) = folder.rglob("samples.npz")
    assert torch.equal(load_npz(compared / "again" / "samples.npz")[0], load_npz(expected)[0])


def test_what_is_there_is_not_trained_again(compared, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in [*archives(compared).values(), *compared.rglob("step-*.pt")]}
    trained = []
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self: trained.append((self.config.model, self.config.seed)) or fit(self))
    assert main(["--output", str(compared), "--seeds", "3", *QUICK]) == 0
    assert trained == [("DiT-digits", 2), ("DSMoE-digits", 2)]
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert [one["seed"] for one in json.loads((compared / "parity.json").read_text())["models"][0]["seeds"]] == [
        0,
        1,
        2,
    ]


def test_other_options_are_refused_where_runs_are(compared, capsys):
    assert main(["--output", str(compared), "--seeds", "1", *QUICK, "--learning-rate", "0.1"]) == 2
    assert "learning_rate is 0.1" in capsys.readouterr().err
    assert main(["--output", str(compared), "--seeds", "1", *QUICK, "--steps", "1"]) == 2
    assert "is trained for 2 steps, but steps is 1" in capsys.readouterr().err


def test_other_samples_of_the_same_training(compared, monkeypatch):
    monkeypatch.setattr(Trainer, "launch_step", None)  # no step is taken
    assert main(["--output", str(compared), "--seeds", "1", *QUICK, "--cfg-scale", "2"]) == 0
    assert len(list((compared / "DiT-digits" / "seed-0" / "samples").glob("*_cfg-2_euler-1/samples.npz"))) == 1


def quick_run(output, model="DSMoE-digits", seed=0, **options):
    train = tiny(output / f"{model}-{seed}", model=model, seed=seed, **options)
    drawn = {"output": f"{train.output}/parts", "join": f"{train.output}/samples.npz"}
    sample = SampleConfig(checkpoint=train.output, num_samples=10, part_size=8, batch_size=4, steps=1, **drawn)
    return Run(train, sample)


def test_processes_train_the_same_as_one(tmp_path, capsys):
    here, apart = ([quick_run(tmp_path / jobs, seed=seed, steps=2) for seed in (0, 1)] for jobs in ("1", "2"))
    for jobs, runs in enumerate((here, apart), 1):
        assert carry_out_all(runs, jobs)
        assert "2 of 2 after" in capsys.readouterr().out
    for one, other in zip(here, apart, strict=True):
        assert torch.equal(load_npz(one.archive)[0], load_npz(other.archive)[0])
        assert "step" in (other.folder / parity_runs.LOG_FILE).read_text()


def note_place(run, place):
    """In the place of what a process of a run does."""
    run.folder.mkdir()
    (run.folder / "place").write_text(str(place))


def test_a_place_is_taken_again_when_it_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(parity_runs, "_carry_out_alone", note_place)
    runs = [quick_run(tmp_path, seed=seed) for seed in range(3)]
    assert carry_out_all(runs, 2)
    places = [(run.folder / "place").read_text() for run in runs]
    assert places[:2] == ["0", "1"] and places[2] in ("0", "1")


@pytest.mark.parametrize(("device", "taken"), [("auto", [1]), ("cpu", [])])
def test_side_by_side_runs_take_gpus_by_turns(device, taken, tmp_path, monkeypatch):
    gpus = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", gpus.append)
    monkeypatch.setattr(parity_runs, "carry_out", lambda run: True)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(os, "setsid", lambda: None)
    with pytest.raises(SystemExit) as ended:
        parity_runs._carry_out_alone(quick_run(tmp_path, device=device), 3)
    assert ended.value.code == 0 and gpus == taken


def test_ctrl_c_leaves_checkpoints_to_go_on_from(tmp_path):
    runs = [quick_run(tmp_path, seed=seed, steps=1_000_000) for seed in (0, 1)]

    def interrupt():
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and not all((run.folder / "metrics.jsonl").exists() for run in runs):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    assert not carry_out_all(runs, 2)
    watcher.join()
    for run in runs:
        assert len(list_checkpoints(run.folder)) == 1 and not run.archive.exists()
        step = int(list_checkpoints(run.folder)[0].stem.split("-")[1])
        assert Trainer(run.train, resume=True).step == step


def test_a_failing_process_is_told(tmp_path):
    run = quick_run(tmp_path, steps=2)
    (run.folder / "checkpoints").mkdir(parents=True)
    (run.folder / "checkpoints" / "step-00000001.pt").write_text("damaged")
    (run.folder / "config.yaml").write_text("steps: 2\n")
    with pytest.raises(ValueError, match="model_options is"):
        carry_out_all([run], 2)
    (run.folder / "config.yaml").unlink()
    with pytest.raises(RunError, match="DSMoE-digits, seed 0 failed with exit status 1"):
        carry_out_all([run], 2)


def test_a_signal_ends_the_command(tmp_path, monkeypatch, capsys):
    stopped = TrainResult(step=1, images_per_second=1.0, checkpoint=Path("step.pt"), ended_by="signal")
    monkeypatch.setattr(Trainer, "fit", lambda self: stopped)
    assert main(["--output", str(tmp_path), "--seeds", "1", *QUICK]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "parity.md").exists()


def test_overwrite_starts_anew(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(fid_parity, "carry_out_all", lambda runs, jobs: ended.append(jobs))
    run = tmp_path / "DiT-digits" / "seed-0"
    run.mkdir(parents=True)
    (tmp_path / "other").mkdir()
    assert main(["--output", str(tmp_path), *QUICK]) == 130 and run.exists()
    assert main(["--output", str(tmp_path), "--overwrite", *QUICK]) == 130
    assert not run.exists() and (tmp_path / "other").exists() and ended == [1, 1]


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Six images of three classes, encoded: 8x8 latents of 3 channels."""
    image = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("latents")
    generator = np.random.default_rng(0)
    for name in ("a/0", "a/1", "b/0", "b/1", "c/0", "c/1"):
        path = root / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    encode_folder(root / "images", save_vae(root / "vae"), root / "encoded", image_size=16)
    return root / "encoded"


def test_latents_are_scored_by_fid(latents, tmp_path, monkeypatch):
    """With stand-ins for Inception and its statistics: the distance is that of the samples' mean grey."""
    network, seen = torch.nn.Identity(), []

    def mean_grey(batches, inception, reference):
        assert inception is network and reference == "reference.npz"
        batches = list(batches)
        assert all(batch.dtype == torch.uint8 and batch.shape[1:] == (16, 16, 3) for batch in batches)
        images = torch.cat(batches)
        seen.append(len(images))
        return FidScores(images.double().mean().item(), None, 7.5, 0.1234, 0.01, len(images))

    monkeypatch.setattr(scoring, "load_inception", lambda path: network)
    monkeypatch.setattr(scoring, "load_reference", lambda path: path)
    monkeypatch.setattr(scoring, "fid_scores", mean_grey)
    files = ["--data", str(latents), "--inception", "inception.pth", "--reference", "reference.npz"]
    more = ["--seeds", "2", "--num-samples", "6", "--device", "cpu", "--sample-method", "euler"]
    assert main(["--output", str(tmp_path), *QUICK, *files, *more]) == 0
    assert seen == [6] * 5  # four runs, and the real images once
    record = json.loads((tmp_path / "parity.json").read_text())
    assert record["distance"] == "FID of 6 samples"
    (expected,) = (tmp_path / "DSMoE-digits" / "seed-1").rglob("samples.npz")
    score = record["models"][1]["seeds"][1]["score"]
    assert score["distance"] == pytest.approx(load_npz(expected)[0].double().mean().item())
    assert (score["inception_score"], score["kid"], score["kid_floor"]) == (7.5, 0.1234, 0.1234)
    data = load_dataset(str(latents), flip=False)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        drawn = data.draw(collect(data.train)[0])
    assert score["floor"] == pytest.approx(to_images(drawn, data.autoencoder).double().mean().item())
    assert record["comparisons"]["DSMoE-digits"]["seeds"] == 2
    report = (tmp_path / "parity.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines()[:4]]
    assert cells[0][-6:] == ["FID of 6 samples", "floor", "KID", "KID floor", "Inception Score", "published"]
    assert cells[3][-5:] == [f"{score['floor']:.2f}", "0.1234", "0.1234", "7.5", ""]
    assert "9.80" in report
    assert (tmp_path / "samples.png").exists() and (tmp_path / "loss.png").exists()


def test_without_inception_fid_is_not_measured(latents, tmp_path, capsys):
    more = ["--data", str(latents), "--seeds", "1", "--num-samples", "3", "--sample-method", "euler"]
    assert main(["--output", str(tmp_path), *QUICK, *more]) == 0
    assert "DSMoE-digits against DiT-digits: not measured." in capsys.readouterr().out
    assert len(archives(tmp_path)) == 2
