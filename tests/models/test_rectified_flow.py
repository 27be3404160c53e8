"""Rectified flow against the official implementation's vectors, its own definition, and bad input."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.objectives import RectifiedFlow

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parents[1] / "golden"))
FLOW = RectifiedFlow()


class ToyModel(nn.Module):
    """A model small enough to write down: v = A tanh(z) + t B z + emb[y], with more output channels than input."""

    num_classes = 10
    null_label: int | None = 10

    def __init__(self, channels: int = 4, out_channels: int = 8) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(out_channels, channels))
        self.B = nn.Parameter(torch.randn(out_channels, channels))
        self.emb = nn.Embedding(self.num_classes + 1, out_channels)
        self.aux: SimpleNamespace | None = None
        self.calls: list[tuple[int, float]] = []

    def forward(self, z: Tensor, t: Tensor, labels: Tensor, return_aux: bool = False):
        self.calls.append((len(z), t[0].item()))
        v = torch.einsum("oc,nchw->nohw", self.A, z.tanh())
        v = v + t.view(-1, 1, 1, 1) * torch.einsum("oc,nchw->nohw", self.B, z) + self.emb(labels)[:, :, None, None]
        return (v, self.aux) if return_aux else v


@pytest.fixture
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "rf_simple.safetensors")


@pytest.fixture
def golden_model(golden) -> ToyModel:
    model = ToyModel().eval()
    model.load_state_dict({key.removeprefix("param."): v for key, v in golden.items() if key.startswith("param.")})
    return model


@pytest.fixture
def model() -> ToyModel:
    torch.manual_seed(0)
    return ToyModel().eval()


def batch(n: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, 8, 8, generator=generator), torch.arange(n) % 10


def assert_near(actual: Tensor, expected: Tensor, fraction: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=fraction * expected.abs().max().item())


def test_loss_and_gradients_match_the_official_ones(golden, golden_model):
    result = FLOW.loss(
        golden_model, golden["input.x"], golden["input.y"], t=golden["input.t"], noise=golden["input.z0"]
    )
    assert_near(result.loss, golden["output.terms.loss"], 1e-5)
    assert_near(result.mse, golden["output.terms.mse"], 1e-5)
    assert result.aux is None

    result.loss.backward()
    for name, parameter in golden_model.named_parameters():
        assert_near(parameter.grad, golden[f"grad.{name}"], 5e-5)


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize(("suffix", "cfg_scale"), [("nocfg", 1.0), ("cfg", 1.5)])
def test_samples_match_the_official_ones(golden, golden_model, method, suffix, cfg_scale):
    z, labels = golden["input.sample.z"], golden["input.sample.y"]
    samples = FLOW.sample(golden_model, z, labels, steps=4, method=method, cfg_scale=cfg_scale)
    assert_near(samples, golden[f"output.sample.{method}.{suffix}"], 1e-5)
    assert not samples.requires_grad


def test_a_perfect_model_has_no_loss_and_samples_the_data(model):
    x, labels = batch()
    noise = torch.randn_like(x)

    class Perfect(ToyModel):
        def forward(self, z, t, labels, return_aux=False):
            return (x - noise, None) if return_aux else x - noise

    perfect = Perfect().eval()
    assert FLOW.loss(perfect, x, labels, noise=noise).loss == 0
    torch.testing.assert_close(FLOW.sample(perfect, noise, labels, steps=7), x)


def test_auxiliary_loss_is_added_to_the_mean_error(model):
    x, labels = batch()
    t, noise = torch.rand(3), torch.randn_like(x)
    plain = FLOW.loss(model, x, labels, t=t, noise=noise)
    model.aux = SimpleNamespace(loss=torch.tensor(0.25))
    with_aux = FLOW.loss(model, x, labels, t=t, noise=noise)
    torch.testing.assert_close(plain.loss, plain.mse.mean())
    torch.testing.assert_close(with_aux.loss, plain.loss + 0.25)
    assert with_aux.aux is model.aux


def test_loss_draws_times_and_noise_from_the_global_generator(model):
    x, labels = batch()
    torch.manual_seed(3)
    drawn = FLOW.loss(model, x, labels)
    torch.manual_seed(3)
    t = torch.rand(3)
    given = FLOW.loss(model, x, labels, t=t, noise=torch.randn_like(x))
    assert torch.equal(drawn.mse, given.mse)


def test_loss_is_float32_for_a_bfloat16_model(model):
    x, labels = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = FLOW.loss(model, x, labels)
    assert result.loss.dtype == result.mse.dtype == torch.float32


@pytest.mark.parametrize(
    ("method", "times"), [("euler", [0.0, 0.5]), ("heun", [0.0, 0.5, 0.5, 1.0])], ids=["euler", "heun"]
)
@pytest.mark.parametrize(("cfg_scale", "copies"), [(1.0, 1), (2.0, 2)])
def test_model_is_called_once_per_evaluation(model, method, times, cfg_scale, copies):
    z, labels = batch()
    FLOW.sample(model, z, labels, steps=2, method=method, cfg_scale=cfg_scale)
    # On a CPU batches are filled up to whole 16.
    assert model.calls == [(16, t) for t in times]
    model.calls.clear()
    FLOW.sample(model, z.repeat(8, 1, 1, 1), labels.repeat(8), steps=2, method=method, cfg_scale=cfg_scale)
    assert model.calls == [(-(-24 * copies // 16) * 16, t) for t in times]


def test_guidance_of_scale_zero_is_unconditional_sampling(model):
    z, labels = batch()
    unconditional = FLOW.sample(model, z, torch.full((3,), 10), steps=3)
    torch.testing.assert_close(FLOW.sample(model, z, labels, steps=3, cfg_scale=0.0), unconditional)
    given = FLOW.sample(model, z, labels, steps=3, cfg_scale=0.0, null_labels=torch.full((3,), 10))
    torch.testing.assert_close(given, unconditional)
    with pytest.raises(ValueError, match="cfg_scale: expected a finite number, got nan"):
        FLOW.sample(model, z, labels, steps=3, cfg_scale=float("nan"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(0, 4, 8, 8), "labels": torch.zeros(0, dtype=torch.int64)}, "empty batch"),
        ({"x": torch.zeros(4, 8, 8)}, r"\(N, C, H, W\)"),
        ({"labels": torch.tensor([0, 10, 2])}, r"\[0, 9\].*got \[10\]"),
        ({"labels": torch.tensor([0, -1, 2])}, r"\[0, 9\].*got \[-1\]"),
        ({"labels": torch.tensor([0, 1])}, "one entry per sample"),
        ({"t": torch.tensor([0.0, 0.5, 1.5])}, r"t must be in \[0, 1\].*1\.5"),
        ({"t": torch.tensor([0.0, float("nan"), 1.0])}, r"t must be in \[0, 1\].*nan"),
        ({"t": torch.tensor([0.5])}, "one entry per sample"),
        ({"noise": torch.zeros(3, 1, 8, 8)}, "shape of x"),
    ],
)
def test_loss_refuses(model, change, message):
    x, labels = batch()
    with pytest.raises(ValueError, match=message):
        FLOW.loss(model, **{"x": x, "labels": labels, **change})


def test_loss_refuses_step_numbers_as_times(model):
    x, labels = batch()
    with pytest.raises(TypeError, match="t must be float"):
        FLOW.loss(model, x, labels, t=torch.tensor([0, 500, 999]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": torch.zeros(0, 4, 8, 8), "labels": torch.zeros(0, dtype=torch.int64)}, "empty batch"),
        ({"labels": torch.tensor([0, 11, 2])}, r"\[0, 9\].*got \[11\]"),
        ({"labels": torch.tensor([0, 1])}, "labels must have one entry"),
        ({"cfg_scale": 2.0, "null_labels": torch.tensor([10])}, "null_labels must have one entry"),
        ({"steps": 0}, "steps must be a whole number, at least 1"),
        ({"method": "rk4"}, "method must be 'euler' or 'heun' or 'dopri5', got 'rk4'"),
        ({"method": "dopri5"}, "steps must be left out with 'dopri5'.*got 2"),
    ],
)
def test_sample_refuses(model, change, message):
    z, labels = batch()
    with pytest.raises(ValueError, match=message):
        FLOW.sample(model, **{"noise": z, "labels": labels, "steps": 2, **change})


def test_sample_refuses_a_model_in_training_mode(model):
    z, labels = batch()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        FLOW.sample(model.train(), z, labels, steps=2)


@pytest.mark.parametrize(
    ("labels", "cfg_scale", "request_"), [([10, 1, 2], 1.0, "samples of no class"), ([0, 1, 2], 1.5, "guidance")]
)
def test_sample_refuses_what_needs_a_null_label_where_there_is_none(model, labels, cfg_scale, request_):
    model.null_label = None
    z, _ = batch()
    with pytest.raises(ValueError, match=rf"{request_}.*class_dropout_prob=0.*cfg_scale=1"):
        FLOW.sample(model, z, torch.tensor(labels), steps=2, cfg_scale=cfg_scale)


def test_bfloat16_images_keep_the_noise_near_the_data():
    """A time of 0.9995 is 1 in bfloat16: the mixture is float32, and what is left of the noise is rounded once."""
    seen = {}

    class Recorder(torch.nn.Module):
        num_classes, null_label = 10, 10

        def forward(self, z, t, labels, return_aux=False):
            seen["z"] = z
            return torch.zeros_like(z), None

    x, noise = torch.zeros(2, 1, 4, 4, dtype=torch.bfloat16), torch.ones(2, 1, 4, 4, dtype=torch.bfloat16)
    t = torch.full((2,), 0.9995)
    result = RectifiedFlow().loss(Recorder(), x, torch.tensor([1, 2]), t=t, noise=noise)
    assert seen["z"].dtype == torch.bfloat16
    torch.testing.assert_close(seen["z"].float(), torch.full_like(x, 0.0005, dtype=torch.float32), rtol=5e-3, atol=0)
    assert result.loss.dtype == torch.float32
