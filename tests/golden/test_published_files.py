"""Files laid out as the authors publish them, made of the golden parameters: load, sample, convert back."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch

from models.checkpoint import build_official, load_official, official_state_dict
from models.sample import main
from models.sampling import balanced_labels, sample_images
from tests.golden.test_models import MODELS, TARGETS
from tests.golden.vectors import Case, load_case

ARGS = argparse.Namespace(global_batch_size=256, lr=1e-4, results_dir="results")


def published(case: Case) -> dict:
    """The content of the family's checkpoint files, the golden parameters being the average that sampling takes."""
    averaged = case.state_dict
    last = {key: value + 1 for key, value in averaged.items()}
    if case.config["kind"] == "jit":
        files = {"model": last, "model_ema1": averaged, "model_ema2": {k: v - 1 for k, v in averaged.items()}}
        files = {name: {f"net.{key}": value for key, value in state.items()} for name, state in files.items()}
        return {**files, "optimizer": {"state": {}, "param_groups": []}, "epoch": 600, "args": ARGS}
    model = {f"module.{key}": value for key, value in last.items()}
    return {"model": model, "ema": averaged, "opt": {"state": {}, "param_groups": []}, "args": ARGS, "train_steps": 7}


@pytest.mark.parametrize("name", MODELS)
def test_load_sample_and_convert_back(name, tmp_path) -> None:
    case = load_case(name)
    torch.save(published(case), tmp_path / "0400000.pt")
    params = case.config["ctor"]
    model = load_official(build_official(TARGETS[case.config["kind"]], params), tmp_path / "0400000.pt").eval()
    actual = official_state_dict(model)
    assert actual.keys() == case.state_dict.keys()
    for key, tensor in case.state_dict.items():
        assert actual[key].dtype == tensor.dtype and torch.equal(actual[key], tensor), key

    labels = balanced_labels(5, range(model.num_classes))
    arguments = {"steps": 2, "cfg_scale": 1.5}
    samples = sample_images(model, labels, **arguments)
    plain = load_official(build_official(TARGETS[case.config["kind"]], params), case.state_dict).eval()
    assert samples.isfinite().all() and torch.equal(samples, sample_images(plain, labels, **arguments))
    if not getattr(model, "mixes_samples", False):
        assert torch.equal(sample_images(model, labels, batch_size=2, **arguments), samples)


@pytest.mark.parametrize("under_model", [True, False])
def test_the_command_line_samples_them(under_model, tmp_path) -> None:
    yaml = pytest.importorskip("yaml")
    case = load_case("model_jit_moe")
    content = {"target": TARGETS["jit"], "params": case.config["ctor"]}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": content} if under_model else content))
    torch.save(published(case), tmp_path / "checkpoint-last.pth")
    words = ["--checkpoint", str(tmp_path / "checkpoint-last.pth"), "--official", str(tmp_path / "model.yaml")]
    words += ["--output", str(tmp_path / "out"), "--num-samples", "6", "--steps", "2"]
    samples = {}
    for weights in ("ema", "ema2", "model"):  # "ema" is what is taken where nothing is said
        for batch in ("8", "3"):
            assert main([*words, "--weights", weights, "--batch", batch]) == 0
            with np.load(tmp_path / "out" / "samples.npz") as archive:
                samples[weights, batch] = archive["arr_0"]
        assert np.array_equal(samples[weights, "8"], samples[weights, "3"])
    assert not np.array_equal(samples["ema", "8"], samples["ema2", "8"])
    assert not np.array_equal(samples["ema", "8"], samples["model", "8"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_in_half_precision_is_sampled_in_float32(dtype, tmp_path) -> None:
    yaml = pytest.importorskip("yaml")
    case = load_case("model_jit_moe")
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"target": TARGETS["jit"], "params": case.config["ctor"]}))
    torch.save({"model": {key: one.to(dtype) for key, one in case.state_dict.items()}}, tmp_path / "file.pth")
    words = ["--checkpoint", str(tmp_path / "file.pth"), "--official", str(tmp_path / "model.yaml")]
    assert main([*words, "--output", str(tmp_path / "out"), "--num-samples", "2", "--steps", "1"]) == 0


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ("target: model_jit.JiT", [], "must name the official model's target and params"),
        ("target: model_jit.JiT\nparams: {depths: 3}", [], "depths"),
        ("{target", [], "model.yaml is no YAML file"),
        ("[1]", [], "must hold options as 'name: value' lines"),
        (
            "target: model_jit.JiT\nparams: {depth: 1}",
            ["--model", "JiT-B/16"],
            "model must be left out with --official",
        ),
    ],
)
def test_wrong_requests(tmp_path, capsys, content, more, message) -> None:
    (tmp_path / "model.yaml").write_text(content)
    assert main(["--official", str(tmp_path / "model.yaml"), "--checkpoint", str(tmp_path / "none.pt"), *more]) == 2
    assert message in capsys.readouterr().err


def test_an_objective_belongs_to_official_models(tmp_path, capsys) -> None:
    assert main(["--checkpoint", str(tmp_path), "--objective", "ddpm"]) == 2
    assert "objective must be left out without --official" in capsys.readouterr().err


def test_an_average_that_is_not_there_is_not_replaced(tmp_path, capsys) -> None:
    yaml = pytest.importorskip("yaml")
    case = load_case("model_jit_moe")
    content = {"target": TARGETS["jit"], "params": case.config["ctor"]}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(content))
    torch.save({"model": case.state_dict}, tmp_path / "file.pth")
    words = ["--checkpoint", str(tmp_path / "file.pth"), "--official", str(tmp_path / "model.yaml")]
    words += ["--output", str(tmp_path / "out"), "--num-samples", "2", "--steps", "1"]
    assert main([*words, "--weights", "ema"]) == 2
    assert "expected a checkpoint with ema or model_ema1, found model" in capsys.readouterr().err
    assert main(words) == 0
