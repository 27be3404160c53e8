"""The demo, shortened to two steps."""

import json

import pytest

from models.data import load_npz
from models.demo import MODELS, main
from models.training.trainer import Trainer, TrainResult


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "demo"
    assert main(["--output", str(output), "--steps", "2", "--sample-steps", "1"]) == 0
    return output


def test_demo_shows_both_models_side_by_side(demo):
    table = (demo / "demo.md").read_text()
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    for column in ("model", "activated", "total", "images/s", "loss", "digits-FD", "floor", "nearer to training"):
        assert column in lines[0]
    assert "torch" in table and "steps" in lines[0]

    rows = json.loads((demo / "demo.json").read_text())["models"]
    assert [row["model"] for row in rows] == list(MODELS)
    moe, dense = rows
    assert moe["activated_parameters"] == pytest.approx(dense["activated_parameters"], rel=0.05)
    assert moe["total_parameters"] > 1.2 * dense["total_parameters"]
    for row in rows:
        assert row["steps"] == 2 and row["scores"]["digits_fd"] > row["scores"]["floor"] > 0


def test_demo_leaves_pictures_and_samples(demo):
    for name in ("grid.png", "loss.png"):
        assert (demo / name).read_bytes().startswith(b"\x89PNG")
    for name in MODELS:
        images, labels = load_npz(demo / name / "samples.npz")
        assert images.shape == (500, 8, 8, 3) and labels.bincount().tolist() == [50] * 10


def test_an_earlier_demo_is_not_overwritten_unasked(demo, capsys):
    before = (demo / "demo.md").read_bytes()
    assert main(["--output", str(demo), "--steps", "1"]) == 2
    assert f"{demo} holds an earlier demo: replace it with --overwrite" in capsys.readouterr().err
    assert (demo / "demo.md").read_bytes() == before


def test_demo_of_chosen_models_each_for_its_own_time(tmp_path):
    chosen = ["JiT-digits", "EC-DiT-digits"]
    arguments = ["--output", str(tmp_path), "--sample-steps", "1", "--minutes-each", "--models", *chosen]
    assert main([*arguments, "--minutes", "0.005"]) == 0
    rows = json.loads((tmp_path / "demo.json").read_text())["models"]
    assert [row["model"] for row in rows] == chosen
    assert all(row["steps"] >= 1 and row["scores"]["kid_error"] > 0 for row in rows)


def test_demo_refuses_an_unknown_model_before_training(tmp_path, capsys):
    assert main(["--output", str(tmp_path), "--models", "DiT-digits", "DiT-digit"]) == 2
    assert "did you mean 'DiT-digits'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("option", "name"), [("--minutes", "minutes"), ("--steps", "steps")])
def test_demo_options_out_of_range(tmp_path, capsys, option, name):
    assert main(["--output", str(tmp_path), option, "0"]) == 2
    assert f"{name} must be" in capsys.readouterr().err


def test_ctrl_c_ends_the_demo(tmp_path, monkeypatch, capsys):
    def stopped(trainer):
        return TrainResult(step=1, images_per_second=1.0, checkpoint=tmp_path / "step.pt", ended_by="signal")

    monkeypatch.setattr(Trainer, "fit", stopped)
    assert main(["--output", str(tmp_path / "demo")]) == 130
    assert "start again with --overwrite" in capsys.readouterr().err
    assert not (tmp_path / "demo" / "demo.md").exists()


def test_bad_options_leave_an_earlier_demo(tmp_path, capsys):
    earlier = tmp_path / "DSMoE-digits" / "config.yaml"
    earlier.parent.mkdir()
    earlier.write_text("")
    assert main(["--output", str(tmp_path), "--overwrite", "--learning-rate", "-1"]) == 2
    assert "learning_rate must be above 0" in capsys.readouterr().err and earlier.exists()
