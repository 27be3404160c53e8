"""Objectives by name with their settings, dopri5, and both on the command line."""

import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from models import create_model
from models.objectives import DDPM, JiTFlow, RectifiedFlow, objective_for
from models.sample import main as sample_main
from models.train import main as train_main
from models.training.checkpoints import load_newest
from models.training.config import TrainConfig
from models.training.loading import load_trained
from models.training.trainer import Trainer
from tests.models.runs import command_line, one_thread, tiny


@pytest.fixture(autouse=True)
def threads():
    with one_thread():
        yield


class Decay(nn.Module):
    """dz/dt = -(1 + label) z."""

    num_classes, null_label = 10, 10

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, z, t, labels, return_aux=False):
        self.calls += 1
        v = -(1.0 + labels.view(-1, 1, 1, 1)) * z
        return (v, None) if return_aux else v


@pytest.mark.parametrize(
    ("model", "name", "expected"),
    [
        ("DiT-digits", "auto", RectifiedFlow()),
        ("JiT-digits", "auto", JiTFlow()),
        ("JiTMoE-digits", "auto", JiTFlow()),
        ("DiffMoE-digits", "auto", RectifiedFlow()),
        ("JiT-digits", "flow", RectifiedFlow()),
        ("DiT-digits", "jit", JiTFlow()),
    ],
)
def test_objective_of_a_model(model, name, expected):
    with torch.device("meta"):
        model = create_model(model)
        assert objective_for(model, name) == objective_for(AveragedModel(model), name) == expected


def test_settings_reach_the_objective():
    with torch.device("meta"):
        jit, sigma = create_model("JiT-digits"), create_model("DiT-S/2")
    settings = {"noise_scale": 2.0, "time_mean": -0.4, "guidance_interval": [0.0, 0.9]}
    assert objective_for(jit, **settings) == JiTFlow(noise_scale=2.0, time_mean=-0.4, guidance_interval=(0.0, 0.9))
    assert objective_for(sigma, "ddpm", guided_channels=3) == DDPM(guided_channels=3)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("flows", {}, "objective must be auto, flow, jit, ddpm, got 'flows'"),
        ("flow", {"time_mean": 0.0}, "'flow' has no setting 'time_mean'; it has noise_scale, rtol, atol"),
        ("flow", {"noise_scale": 0.0}, "noise_scale must be above 0, got 0.0"),
        ("flow", {"rtol": -1.0}, "rtol must be above 0"),
        ("jit", {"min_gap": 0.0}, "min_gap must be between 0 and 1"),
        ("jit", {"time_std": -1.0}, "time_std must be at least 0"),
        ("jit", {"guidance_interval": (0.9, 0.1)}, "guidance_interval must be two rising times"),
        ("jit", {"guidance_interval": (0.9,)}, "guidance_interval must be two rising times"),
        ("jit", {"guidance_interval": (5, 6)}, r"guidance_interval must be two rising times in \[0, 1\]"),
        ("jit", {"guidance_interval": 0.5}, "guidance_interval must be two rising times"),
        ("jit", {"guidance_interval": [0.1, None]}, "guidance_interval must be made of finite numbers"),
        ("jit", {"time_mean": float("nan")}, "time_mean must be made of finite numbers, got nan"),
        ("flow", {"noise_scale": "big"}, "noise_scale must be made of finite numbers, got 'big'"),
        ("flow", {"noise_scale": float("inf")}, "noise_scale must be made of finite numbers, got inf"),
        ("flow", {"rtol": True}, "rtol must be made of finite numbers, got True"),
    ],
)
def test_wrong_settings(name, settings, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        objective_for(create_model("DiT-digits"), name, **settings)


def test_dopri5_is_as_exact_as_its_tolerances():
    pytest.importorskip("torchdiffeq")
    z, labels = torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 2])
    exact = z * torch.exp(-(1.0 + labels)).view(-1, 1, 1, 1)
    errors, calls = [], []
    for rtol in (1e-3, 1e-6):
        model = Decay().eval()
        samples = RectifiedFlow(rtol=rtol, atol=1e-7).sample(model, z, labels, method="dopri5")
        errors.append((samples - exact).abs().max().item())
        calls.append(model.calls)
    assert errors[0] < 1e-2 and errors[1] < 1e-5 and calls[1] > calls[0] > 6


def test_dopri5_is_guided():
    pytest.importorskip("torchdiffeq")
    z, labels = torch.randn(2, 1, 4, 4), torch.tensor([1, 2])
    samples = RectifiedFlow(rtol=1e-6).sample(
        Decay().eval(), z, labels, method="dopri5", cfg_scale=2.0, null_labels=torch.zeros(2, dtype=torch.int64)
    )
    rates = 1 + 2.0 * labels  # of u + s (c - u)
    torch.testing.assert_close(samples, z * torch.exp(-rates).view(-1, 1, 1, 1), rtol=1e-4, atol=1e-5)


def test_dopri5_of_a_model_that_diverged():
    pytest.importorskip("torchdiffeq")
    model = Decay().eval()
    z = torch.full((1, 1, 4, 4), torch.nan)
    with pytest.raises(ValueError, match="dopri5 finds no step .*not finite"):
        RectifiedFlow().sample(model, z, torch.tensor([0]), method="dopri5")


def test_dopri5_without_torchdiffeq(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match="pip install torchdiffeq"):
        RectifiedFlow().sample(Decay().eval(), torch.randn(1, 1, 4, 4), torch.tensor([0]), method="dopri5")


def test_ddpm_on_the_command_line(tmp_path):
    run, output = tmp_path / "run", tmp_path / "samples"
    config = tiny(run, steps=3, objective="ddpm", model_options={"learn_sigma": True}, sample_method="ddim")
    assert train_main(command_line(config)) == 0
    assert (run / "samples" / "step-00000003.png").exists()
    trained = load_trained(run)
    assert trained.objective == DDPM() and trained.autoencoder is None
    words = ["--checkpoint", str(run), "--output", str(output), "--num-samples", "10", "--steps", "4"]
    images = []
    for more in ([], ["--batch-size", "4"], ["--method", "ddim"], ["--seed", "-1"]):
        assert sample_main([*words, *more]) == 0
        with np.load(output / "samples.npz") as archive:
            images.append(archive["arr_0"])
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2]) and not np.array_equal(images[0], images[3])


def test_a_run_keeps_its_objective_and_sampling_may_change_settings(tmp_path):
    run = tmp_path / "run"
    options = {"num_heads": 2, "depth": 2, "hidden_size": 16, "context_start": 1}
    config = TrainConfig(
        model="JiT-digits", model_options=options, output=str(run), steps=1, objective_options={"noise_scale": 2.0}
    )
    Trainer(config).save()
    assert load_trained(run).objective == JiTFlow(noise_scale=2.0)
    changed = load_trained(run, objective_options={"guidance_interval": [0.0, 1.0]})
    assert changed.objective == JiTFlow(noise_scale=2.0, guidance_interval=(0.0, 1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "ddpm"}, "build it with learn_sigma=True"),
        ({"sample_method": "ancestral"}, "method must be 'euler' or 'heun' or 'dopri5', got 'ancestral'"),
        ({"sample_method": "dopri5"}, "steps must be left out with 'dopri5'"),
        ({"objective_options": {"min_gap": 0.1}}, "'flow' has no setting 'min_gap'"),
        ({"ema_decay2": 1.0}, r"ema_decay2 must be in \[0, 1\)"),
    ],
)
def test_the_trainer_refuses_at_once(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Trainer(tiny(tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_a_second_average_has_its_own_decay(tmp_path):
    trainer = Trainer(tiny(tmp_path / "run", ema_decay=0.9, ema_decay2=0.5, learning_rate=1e-2))
    batches, expected = trainer._batches(), {}
    for _ in range(3):
        trainer.train_step(*next(batches))
        for name, decay in (("ema", 0.9), ("ema2", 0.5)):
            for key, value in trainer.model.named_parameters():
                start = expected.get((name, key))
                expected[name, key] = value.detach().clone() if start is None else decay * start + (1 - decay) * value
    trainer.save()
    saved = load_newest(tmp_path / "run")[1]
    for (name, key), value in expected.items():
        torch.testing.assert_close(saved[name][key], value.detach(), rtol=1e-5, atol=1e-7)
    assert not torch.equal(saved["ema"]["final_layer.linear.weight"], saved["ema2"]["final_layer.linear.weight"])
    second = load_trained(tmp_path / "run", weights="ema2").model.state_dict()
    assert all(torch.equal(second[key], value) for key, value in saved["ema2"].items())


def test_a_run_without_a_second_average_says_so(tmp_path):
    Trainer(tiny(tmp_path / "run")).save()
    with pytest.raises(ValueError, match="holds no 'ema2' weights: its run had no --ema-decay2"):
        load_trained(tmp_path / "run", weights="ema2")
