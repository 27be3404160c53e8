"""Sampling from a run: files, labels, noise, and requests that can't be met."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from torch import nn

from models import create_model
from models.data import iterate_images, load_samples, sample_files
from models.metrics import fid_scores, reference_statistics
from models.sample import SampleConfig, main
from models.sampling import balanced_labels, sample_images
from models.training.checkpoints import CheckpointError, list_checkpoints, load_checkpoint, load_newest, save_checkpoint
from models.training.loading import load_model
from models.training.trainer import Trainer
from tests.models.runs import one_thread, tiny
from tests.models.tiny_inception import TinyInception


@pytest.fixture(autouse=True)
def threads():
    with one_thread():
        yield


def train(run, model="DSMoE-digits", **model_options):
    """A run whose weights are far enough from their zeros that samples depend on labels and weights."""
    config = tiny(run, model=model, steps=30, learning_rate=1e-2, model_options=model_options)
    if model.startswith("JiT"):
        config.model_options.pop("balance")
        config.model_options["context_start"] = 1
    trainer = Trainer(config)
    batches = trainer._batches()
    for _ in range(30):
        trainer.train_step(*next(batches))
    trainer.save()
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with one_thread():
        return train(tmp_path_factory.mktemp("sample") / "run")


@pytest.fixture(scope="module", params=["DSMoE-digits", "JiTMoE-digits"])
def run_without_null_label(request, tmp_path_factory):
    """JiT's embedding has a row for no class all the same."""
    with one_thread():
        return train(tmp_path_factory.mktemp("sample") / "run", request.param, class_dropout_prob=0.0)


def sample(run, output, *arguments) -> dict[str, np.ndarray]:
    words = ["--checkpoint", str(run), "--output", str(output), "--steps", "3", *arguments]
    assert main(words) == 0
    with np.load(output / "samples.npz") as archive:
        return dict(archive)


def test_compiled_blocks_sample_the_same(run, tmp_path, monkeypatch):
    """But for rounding; the last batch is of another size."""
    compiled, compile = [], nn.Module.compile

    def note(self, dynamic):
        compiled.append(dynamic)
        compile(self, backend="aot_eager", dynamic=dynamic)

    monkeypatch.setattr(nn.Module, "compile", note)
    arguments = "--num-samples", "7", "--batch-size", "4"
    plain, found = (sample(run, tmp_path / name, *arguments, f"--{name}compile") for name in ("no-", ""))
    assert compiled == [False, False]  # of two blocks
    assert np.abs(plain["arr_0"].astype(int) - found["arr_0"]).max() <= 1
    assert np.array_equal(plain["labels"], found["labels"])


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


def call(run, output, *arguments) -> int:
    return main(["--checkpoint", str(run), "--output", str(output), "--steps", "2", *map(str, arguments)])


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """50 samples by one call."""
    output = tmp_path_factory.mktemp("whole")
    with one_thread():
        assert call(run, output, "--num-samples", 50) == 0
    return output


def assert_equal_runs(parts, whole):
    """The same images and labels, bit by bit, and the same FID to the last digit."""
    images, labels = load_samples(parts)
    expected, expected_labels = load_samples(whole)
    assert torch.equal(images, expected) and torch.equal(labels, expected_labels)
    network = TinyInception()
    reference = reference_statistics([images.roll(4, 1)], network)
    folders = (parts, whole)
    scores = [fid_scores(iterate_images(sample_files(folder), 8), network, reference) for folder in folders]
    assert scores[0] == scores[1] and scores[0].num_samples == 50 and scores[0].fid > 0.01


def test_several_processes_draw_what_one_does(run, whole, tmp_path):
    """In any order, with their own batch sizes, cut where no class and no batch begins."""
    calls = [(33, 17, []), (0, 15, ["--batch-size", 6]), (15, 18, ["--part-size", 10])]
    for first, count, options in calls:
        assert call(run, tmp_path, "--first", first, "--num-samples", count, "--part-size", count, *options) == 0
    names = [path.name for path in sample_files(tmp_path)]
    assert names == ["samples-000000.npz", "samples-000015.npz", "samples-000025.npz", "samples-000033.npz"]
    assert {path.name for path in tmp_path.glob("*.png")} == {"grid.png", "grid-000015.png", "grid-000033.png"}
    assert_equal_runs(tmp_path, whole)


def test_a_call_that_was_stopped_goes_on(run, whole, tmp_path, monkeypatch, capsys):
    import models.sample

    words, save, written = ("--num-samples", 50, "--part-size", 15), models.sample.save_npz, []

    def save_twice(path, *arguments, **options):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        save(path, *arguments, **options)

    monkeypatch.setattr(models.sample, "save_npz", save_twice)
    assert call(run, tmp_path, *words) == 130
    assert "the same command goes on after the last file" in capsys.readouterr().err
    with monkeypatch.context() as context:
        context.setattr(
            models.sample, "save_npz", lambda path, *a, **o: (written.append(path.name), save(path, *a, **o))
        )
        assert call(run, tmp_path, *words, "--join", tmp_path / "new" / "all.npz") == 0
        assert call(run, tmp_path, *words) == 0
    assert written == [f"samples-{first:06d}.npz" for first in (0, 15, 30, 45)], "each was drawn once"
    assert "samples-000000.npz to samples-000045.npz" in capsys.readouterr().out
    assert_equal_runs(tmp_path, whole)
    with np.load(tmp_path / "new" / "all.npz") as joined, np.load(whole / "samples.npz") as single:
        assert set(joined) == set(single) and all(np.array_equal(joined[name], single[name]) for name in single)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", 1], "samples-000000.npz was sampled with seed 0, but this run is with 1"),
        (["--cfg-scale", 3], "with cfg_scale 1.5, but this run is with 3.0"),
        (["--weights", "model"], "with weights '[0-9a-f]{64}', but this run is with '[0-9a-f]{64}'"),
        (["--objective-options", "{rtol: 0.5}"], r"with objective \['RectifiedFlow', .*'rtol': 0.001"),
        (["--unconditional"], "with unconditional False, but this run is with True"),
        (["--part-size", 5], "holds 4 images, but 5 belong into it: keep --num-samples and --part-size"),
    ],
)
def test_parts_of_another_run_are_not_taken(run, tmp_path, capsys, words, message):
    assert call(run, tmp_path, "--num-samples", 8, "--part-size", 4) == 0
    content = (tmp_path / "samples-000000.npz").read_bytes()
    assert call(run, tmp_path, "--num-samples", 8, "--part-size", 4, *words) == 2
    assert re.search(message, capsys.readouterr().err)
    assert (tmp_path / "samples-000000.npz").read_bytes() == content


def test_parts_are_known_by_what_was_drawn_not_by_what_was_typed(run, tmp_path, capsys):
    words = ["--checkpoint", str(run), "--output", str(tmp_path), "--num-samples", "2", "--part-size", "2"]
    assert main(words) == 0
    (part,) = tmp_path.glob("*.npz")
    written = part.stat().st_mtime_ns
    assert main([*words, "--method", "euler", "--steps", "50", "--classes", *map(str, range(10))]) == 0
    assert part.stat().st_mtime_ns == written
    assert main([*words, "--method", "heun"]) == 2
    assert "was sampled with method 'euler', but this run is with 'heun'" in capsys.readouterr().err


def test_parts_of_samples_that_depend_on_their_batch(run, tmp_path, capsys):
    words = ("--num-samples", 8, "--method", "dopri5", "--steps", "null", "--batch-size", 4)
    for parts in (["--part-size", 6], ["--part-size", 4, "--first", 2]):
        assert call(run, tmp_path, *words, *parts) == 2
        assert "--first and --part-size must be multiples of --batch-size, 4, got" in capsys.readouterr().err
    pytest.importorskip("torchdiffeq")
    assert call(run, tmp_path / "parts", *words, "--part-size", 4) == 0
    assert call(run, tmp_path / "whole", *words) == 0
    assert torch.equal(load_samples(tmp_path / "parts")[0], load_samples(tmp_path / "whole")[0])
    assert call(run, tmp_path / "parts", *words[:-1], 2, "--part-size", 4) == 2
    assert "with batch_size 4, but this run is with 2" in capsys.readouterr().err


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
        (["--first", "-1"], "first must be at least 0, got -1"),
        (["--part-size", "0"], "part_size must be at least 1, got 0: correct --part-size"),
        (["--join", "all.npz"], "join must be left out without --part-size"),
        (["--join", "all.npz", "--part-size", "4", "--first", "8"], "join must be left out with --first"),
        (["--join", ".", "--part-size", "4"], "join must be the path of a file, got"),
        (["--num-samples", "0"], "num_samples must be at least 1, got 0: correct --num-samples"),
        (["--seed", str(2**63)], "seed must be an integer of 64 bits, got 9223372036854775808: correct --seed"),
        (["--cfg-scale", ".nan"], "cfg_scale must be a finite number, got nan: correct --cfg-scale"),
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


def test_parts_of_another_configuration_are_refused(run, tmp_path, monkeypatch, capsys):
    words = ("--num-samples", 4, "--part-size", 2)
    assert call(run, tmp_path, *words) == 0
    load = SampleConfig.load

    def changed(config, *names):
        trained = load(config, *names)
        trained.model.config = dataclasses.replace(trained.model.config, scaling_factor=3.0)
        return trained

    monkeypatch.setattr(SampleConfig, "load", changed)
    assert call(run, tmp_path, *words) == 2
    assert "samples-000000.npz" in capsys.readouterr().err


def test_no_classes_are_refused():
    with pytest.raises(ValueError, match="classes must be at least one label"):
        SampleConfig(classes=[])


def test_a_run_on_kernels_is_sampled_anywhere(tmp_path):
    """Where its backend can't run, too."""
    trainer = Trainer(tiny(tmp_path / "run"))
    trainer.save()
    path, state = load_newest(tmp_path / "run")
    for options in (state["model_overrides"], state["model_config"]):
        options["backend"] = "cuda"
    save_checkpoint(tmp_path / "run", state, keep=1)
    assert load_model(tmp_path / "run").config.backend == "auto"
