"""The values that users get where they say nothing, and the parts of the losses that no other test pins."""

from __future__ import annotations

import math

import pytest
import torch

from models import create_model
from models.checkpoint import build_official
from models.objectives import DDPM, JiTFlow, RectifiedFlow
from models.objectives.ddpm import BIN
from tests.golden.vectors import load_case


def test_published_defaults():
    """Of github.com/LTH14/JiT, of adaptive solvers for flows, and of DDPM."""
    jit = JiTFlow()
    assert (jit.time_mean, jit.time_std, jit.noise_scale, jit.min_gap) == (-0.8, 0.8, 1.0, 0.05)
    assert jit.guidance_interval == (0.1, 1.0) and jit.methods["heun"] == 50
    flow = RectifiedFlow()
    assert (flow.noise_scale, flow.rtol, flow.atol) == (1.0, 1e-3, 1e-6)
    assert DDPM().guided_channels is None and DDPM.methods == {"ancestral": 250, "ddim": 50}


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_the_capacity_loss_has_its_weight(weight):
    torch.manual_seed(0)
    model = create_model("DiffMoE-digits", capacity_loss_weight=weight).train()
    x, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    result = RectifiedFlow().loss(model, x, labels)
    of_layers = sum(layer.loss for layer in result.aux.layers if layer is not None)
    assert of_layers > 1  # three layers, each about log 2
    torch.testing.assert_close(result.loss, result.mse.mean() + weight * of_layers)


def test_official_weights_of_the_capacity_loss():
    params = dict(load_case("model_diffmoe_dit").config["ctor"])
    params.pop("CapacityPred_loss_weight", None)
    with torch.device("meta"):
        assert create_model("DiffMoE-S-E16").aux_loss_weight == 1.0
        assert build_official("models.models_DiffMoE.DiT", params).aux_loss_weight == 0.01
        changed = build_official("models.models_DiffMoE.DiT", {**params, "CapacityPred_loss_weight": 1.0})
        assert changed.aux_loss_weight == 1.0


@pytest.mark.parametrize(
    ("level", "is_open"), [(0.95, False), (0.9985, False), (1.0, True), (-0.95, False), (-1.0, True)]
)
def test_only_the_end_levels_have_open_bins(level, is_open):
    data = torch.full((1, 1, 1, 1), level)
    t, noise = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, 1, 1)
    z = DDPM().corrupt(data, noise, t)
    loss, mse = DDPM().losses(torch.cat([noise, noise + 1], dim=1), data, noise, z, t)
    inside = torch.distributions.Normal(0.0, 1e-2).cdf(torch.tensor(BIN / 2)).item()
    share = inside if is_open else 2 * inside - 1
    assert (loss - mse).item() == pytest.approx(-math.log2(share), abs=2e-3)


def test_a_variance_beyond_the_range_is_extrapolated():
    """As guided-diffusion does: v is not held within [-1, 1]."""
    torch.manual_seed(0)
    data, noise, t = torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2), torch.tensor([2])
    z = DDPM().corrupt(data, noise, t)

    def bound(v: float) -> float:
        loss, mse = DDPM().losses(torch.cat([noise, torch.full_like(noise, v)], dim=1), data, noise, z, t)
        return (loss - mse).item()

    assert bound(3.0) > 2 * bound(1.0) > 0 and bound(-3.0) > bound(-1.0) + 1e-3
