"""Sampling from a run: files, labels, noise, and requests that can't be met."""

import re

import numpy as np
import pytest
import torch

from models import create_model
from models.sample import balanced_labels, main, sample_images
from models.training.checkpoints import CheckpointError, list_checkpoints, load_checkpoint, load_newest, save_checkpoint
from models.training.loading import load_model
from models.training.trainer import Trainer
from tests.models.runs import one_thread, tiny


@pytest.fixture(autouse=True)
def threads():
    with one_thread():
        yield


def train(run, **model_options):
    """A run whose weights are far enough from their zeros that samples depend on labels and weights."""
    trainer = Trainer(tiny(run, steps=30, learning_rate=1e-2, model_options=model_options))
    batches = trainer._batches()
    for _ in range(30):
        trainer.train_step(*next(batches))
    trainer.save()
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with one_thread():
        return train(tmp_path_factory.mktemp("sample") / "run")


@pytest.fixture(scope="module")
def run_without_null_label(tmp_path_factory):
    with one_thread():
        return train(tmp_path_factory.mktemp("sample") / "run", class_dropout_prob=0.0)


def sample(run, output, *arguments) -> dict[str, np.ndarray]:
    words = ["--checkpoint", str(run), "--output", str(output), "--steps", "3", *arguments]
    assert main(words) == 0
    with np.load(output / "samples.npz") as archive:
        return dict(archive)


def test_files_hold_balanced_samples(run, tmp_path, capsys):
    arrays = sample(run, tmp_path, "--num-samples", "25")
    assert arrays["arr_0"].shape == (25, 8, 8, 3) and arrays["arr_0"].dtype == np.uint8
    counts = np.bincount(arrays["labels"], minlength=10)
    assert counts.min() == 2 and counts.max() == 3
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "grid.png") in capsys.readouterr().out


def test_options_change_the_samples(run, tmp_path):
    base = sample(run, tmp_path)["arr_0"]
    assert np.array_equal(sample(run, tmp_path)["arr_0"], base)
    options = (["--seed", "1"], ["--weights", "model"], ["--method", "heun"], ["--cfg-scale", "4"])
    for change in (*options, ["--precision", "bfloat16"]):
        assert not np.array_equal(sample(run, tmp_path, *change)["arr_0"], base), change


def test_chosen_classes(run, tmp_path):
    assert sample(run, tmp_path, "--classes", "7", "3", "--num-samples", "5")["labels"].tolist() == [7, 3, 7, 3, 7]


def test_unconditional_samples_have_no_labels(run, tmp_path):
    arrays = sample(run, tmp_path, "--unconditional", "--num-samples", "12")
    assert arrays["arr_0"].shape == (12, 8, 8, 3) and "labels" not in arrays


def test_a_single_sample(run, tmp_path):
    assert sample(run, tmp_path, "--num-samples", "1")["arr_0"].shape == (1, 8, 8, 3)


def test_images_depend_on_seed_and_place_alone(run):
    model, labels = load_model(run), balanced_labels(9, range(10))
    state = torch.get_rng_state()
    images = sample_images(model, labels, seed=3, steps=3, cfg_scale=2.0)
    for batch_size in (1, 4):
        parts = sample_images(model, labels, seed=3, steps=3, cfg_scale=2.0, batch_size=batch_size)
        torch.testing.assert_close(parts, images, rtol=1e-4, atol=1e-5)
    fewer = sample_images(model, labels[:5], seed=3, steps=3, cfg_scale=2.0)
    torch.testing.assert_close(fewer, images[:5], rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), state)


def test_loaded_models_hold_the_weights_asked_for(run):
    state = load_newest(run)[1]
    for weights in ("ema", "model"):
        model = load_model(list_checkpoints(run)[0], weights=weights)
        assert not model.training
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[weights][name]), name


def test_balanced_labels():
    assert balanced_labels(7, [4, 2, 9]).tolist() == [4, 2, 9, 4, 2, 9, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "3", "11"], r"labels must be in \[0, 9\].*got \[11\]"),
        (["--classes", "10"], r"labels must be in \[0, 9\].*got \[10\]"),
        (["--classes", "3", "--unconditional"], "classes must be left out with --unconditional"),
        (["--num-samples", "0"], "num_samples must be at least 1, got 0: correct --num-samples"),
        (["--model", "DiT-digits"], "is a checkpoint of DSMoE-digits, not of DiT-digits"),
    ],
)
def test_refuses(run, tmp_path, capsys, arguments, message):
    output = tmp_path / "new"
    assert main(["--checkpoint", str(run), "--output", str(output), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not output.exists()


@pytest.mark.parametrize(("arguments"), [["--unconditional"], ["--cfg-scale", "2"]])
def test_a_model_without_a_null_label_refuses_what_needs_one(run_without_null_label, tmp_path, capsys, arguments):
    words = ["--checkpoint", str(run_without_null_label), "--output", str(tmp_path), "--steps", "2"]
    assert main([*words, *arguments]) == 2
    assert "no null label: it was built with class_dropout_prob=0" in capsys.readouterr().err
    assert main([*words, "--cfg-scale", "1"]) == 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing", "missing does not exist: pass a run directory"),
        ("empty", "empty holds no checkpoint: pass the --output"),
    ],
)
def test_a_place_without_checkpoints(tmp_path, capsys, source, message):
    (tmp_path / "empty").mkdir()
    assert main(["--checkpoint", str(tmp_path / source), "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_truncated_checkpoint(run, tmp_path, capsys):
    path = tmp_path / "step-00000030.pt"
    path.write_bytes(list_checkpoints(run)[0].read_bytes()[:-1000])
    assert main(["--checkpoint", str(path), "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{path} can't be read as a checkpoint" in error and "Pass another checkpoint" in error


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state["model_config"].update(depth=12), "holds a DSMoE-digits with depth=12, .*depth=2"),
        (lambda state: state["ema"].pop("final_layer.linear.bias"), "does not fit the model.*linear.bias"),
        (
            lambda state: state.update(ema=create_model("DiT-digits").state_dict()),
            "does not fit.*size mismatch",
        ),
    ],
    ids=["config", "missing key", "other weights"],
)
def test_a_checkpoint_of_another_model_or_config(run, tmp_path, edit, message):
    state = load_checkpoint(list_checkpoints(run)[0])
    edit(state)
    path = save_checkpoint(tmp_path, state, keep=1)
    with pytest.raises(CheckpointError, match=rf"(?s){path} {message}"):
        load_model(path)
