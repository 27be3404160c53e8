"""DDPM with learned variance: against closed forms, an independent scheduler, and bad input."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from models import create_model
from models.objectives import DDPM, objective_for
from models.objectives.ddpm import BIN, NUM_STEPS, evenly_spaced
from tests.models.helpers import randomize

OBJECTIVE = DDPM()
SIGNAL = (1 - torch.linspace(1e-4, 0.02, NUM_STEPS, dtype=torch.float64)).cumprod(0)


class GaussianModel(nn.Module):
    """The exact model of data that are independent normal numbers: no other can do better."""

    in_channels, out_channels, num_classes = 1, 2, 10
    null_label: int | None = 10
    mean, std = 0.1, 0.2

    def __init__(self, times: tuple[int, ...] = tuple(range(NUM_STEPS))) -> None:
        super().__init__()
        self.signal = SIGNAL[list(times)]
        self.index = torch.zeros(NUM_STEPS, dtype=torch.int64)
        self.index[list(times)] = torch.arange(len(times))
        self.seen: list[Tensor] = []

    def forward(self, z: Tensor, t: Tensor, labels: Tensor, return_aux: bool = False):
        self.seen.append(t)
        step = self.index[t].view(-1, 1, 1, 1)
        before = torch.cat([self.signal.new_ones(1), self.signal[:-1]])
        kept, kept_before = self.signal[step], before[step]
        variance = kept * self.std**2 + 1 - kept  # of z
        noise = (1 - kept).sqrt() * (z - kept.sqrt() * self.mean) / variance
        # The step back, z_before given z, is normal: condition their joint distribution.
        beta = 1 - kept / kept_before
        variance_before = kept_before * self.std**2 + 1 - kept_before
        exact = (variance_before * beta / variance).log()
        least = beta * (1 - kept_before) / (1 - kept)
        second = (1 - self.signal[1] / self.signal[0]) * (1 - self.signal[0]) / (1 - self.signal[1])
        least = torch.where(step == 0, second, least).log()
        v = 2 * (exact - least) / (beta.log() - least) - 1
        out = torch.cat([noise, v.expand_as(noise)], dim=1).to(z.dtype)
        return (out, None) if return_aux else out


class RandomModel(nn.Module):
    """Noise and v that depend on everything."""

    num_classes = 10
    null_label: int | None = 10

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.in_channels, self.out_channels = channels, 2 * channels
        self.mix = nn.Parameter(torch.randn(2 * channels, channels))
        self.label = nn.Embedding(11, 2 * channels)

    def forward(self, z: Tensor, t: Tensor, labels: Tensor, return_aux: bool = False):
        out = torch.einsum("oc,nchw->nohw", self.mix, z.tanh()) + (t / 1000).view(-1, 1, 1, 1)
        out = 0.5 * (out + self.label(labels)[:, :, None, None]).tanh()
        return (out, None) if return_aux else out


@pytest.fixture
def model() -> RandomModel:
    torch.manual_seed(0)
    return RandomModel().eval()


def batch(n: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 2, 4, 4, generator=generator).clamp(-1, 1), torch.arange(n)


def test_steps_are_evenly_spaced():
    assert evenly_spaced(1000) == tuple(range(1000))
    assert evenly_spaced(1) == (999,)
    steps = evenly_spaced(250)
    assert steps[:4] == (0, 4, 8, 12) and steps[-2:] == (995, 999) and len(set(steps)) == 250
    position = [0.0]
    for _ in range(249):  # as guided-diffusion counts them
        position.append(position[-1] + 999 / 249)
    assert steps == tuple(round(x) for x in position)


@pytest.mark.parametrize(("method", "steps"), [("ancestral", 250), ("ancestral", 1000), ("ddim", 1000)])
def test_an_exact_model_samples_its_distribution(method, steps):
    torch.manual_seed(0)
    noise, labels = torch.randn(16, 1, 32, 32), torch.zeros(16, dtype=torch.int64)
    model = GaussianModel(evenly_spaced(steps)).eval()
    samples = OBJECTIVE.sample(model, noise, labels, method=method, steps=steps)
    assert samples.mean().item() == pytest.approx(GaussianModel.mean, abs=0.01)
    assert samples.std().item() == pytest.approx(GaussianModel.std, rel=0.02)


def test_the_bound_of_an_exact_model_is_the_entropy():
    """Summed over the steps, with the divergence of the last from pure noise, it is the data's bits per dimension."""
    torch.manual_seed(0)
    model, t = GaussianModel().eval(), torch.arange(NUM_STEPS)
    data = GaussianModel.mean + GaussianModel.std * torch.randn(NUM_STEPS, 1, 32, 32)
    z = OBJECTIVE.corrupt(data, noise := torch.randn_like(data), t)
    loss, mse = OBJECTIVE.losses(model(z, t, t), data, noise, z, t)
    kept = SIGNAL[-1]
    prior = 0.5 * (kept * (GaussianModel.mean**2 + GaussianModel.std**2) - kept - (1 - kept).log()) / math.log(2)
    entropy = math.log2(GaussianModel.std * math.sqrt(2 * math.pi * math.e) / BIN)
    assert ((loss - mse).sum() + prior).item() == pytest.approx(entropy, rel=0.01)


def test_loss_against_its_definition_in_float64(model):
    x, t = batch(4)[0], torch.tensor([1, 5, 500, 999])
    noise = torch.randn_like(x)
    result = OBJECTIVE.loss(model, x, torch.arange(4), t=t, noise=noise)

    x, noise, kept = x.double(), noise.double(), SIGNAL[t].view(-1, 1, 1, 1)
    before, beta = SIGNAL[t - 1].view(-1, 1, 1, 1), 1 - kept / SIGNAL[t - 1].view(-1, 1, 1, 1)
    z = kept.sqrt() * x + (1 - kept).sqrt() * noise
    predicted, v = model(z.float(), t, torch.arange(4)).double().chunk(2, dim=1)

    def mean(data: Tensor) -> Tensor:
        return (beta * before.sqrt() * data + (1 - before) * (1 - beta).sqrt() * z) / (1 - kept)

    least = beta * (1 - before) / (1 - kept)
    true = torch.distributions.Normal(mean(x), least.sqrt())
    log_variance = (v + 1) / 2 * beta.log() + (1 - v) / 2 * least.log()
    ours = torch.distributions.Normal(mean((z - (1 - kept).sqrt() * predicted) / kept.sqrt()), (log_variance / 2).exp())
    bits = torch.distributions.kl_divergence(true, ours).flatten(1).mean(1) / math.log(2)
    mse = (predicted - noise).square().flatten(1).mean(1)
    torch.testing.assert_close(result.mse.double(), mse, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.loss.double(), (mse + bits).mean(), rtol=1e-4, atol=0)


def test_step_0_is_scored_by_the_likelihood_of_the_levels():
    data = torch.tensor([-1.0, 0.5, 1.0]).view(3, 1, 1, 1)
    t, noise = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 1, 1, 1)
    z = OBJECTIVE.corrupt(data, noise, t)
    # Exact noise and v = 1: the mean is the data, the variance that of the first step.
    loss, mse = OBJECTIVE.losses(torch.cat([noise, noise + 1], dim=1), data, noise, z, t)
    normal = torch.distributions.Normal(0.0, math.sqrt(1e-4))
    outer, inner = normal.cdf(torch.tensor(BIN / 2)), 2 * normal.cdf(torch.tensor(BIN / 2)) - 1
    expected = -torch.stack([outer, inner, outer]).log2()
    torch.testing.assert_close(loss - mse, expected, rtol=0, atol=2e-3)  # the cdf is approximated


def test_noise_learns_from_the_error_and_v_from_the_bound(model):
    (x, labels), t = batch(), torch.tensor([0, 10, 900])
    noise = torch.randn_like(x)
    z = OBJECTIVE.corrupt(x, noise, t)
    prediction = model(z, t, labels).detach().requires_grad_()
    loss, mse = OBJECTIVE.losses(prediction, x, noise, z, t)
    loss.sum().backward()
    (of_mse,) = torch.autograd.grad(
        OBJECTIVE.losses(prediction, x, noise, z, t)[1].sum(), prediction, materialize_grads=True
    )
    assert torch.equal(prediction.grad[:, :2], of_mse[:, :2])
    assert not of_mse[:, 2:].any() and (prediction.grad[:, 2:] != 0).all()


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
@pytest.mark.parametrize("steps", [1, 2, 50, 250])
@pytest.mark.parametrize("method", ["ancestral", "ddim"])
def test_samples_match_an_independent_scheduler(model, method, steps, cfg_scale):
    diffusers = pytest.importorskip("diffusers")
    settings = {"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False, "timestep_spacing": "linspace"}
    if method == "ancestral":
        scheduler = diffusers.DDPMScheduler(variance_type="learned_range", **settings)
    else:
        scheduler = diffusers.DDIMScheduler(set_alpha_to_one=True, **settings)
    # Its own steps back are not this spacing's where the steps do not divide 1000, so it is given them.
    times = list(reversed(evenly_spaced(steps)))
    if method == "ancestral":
        scheduler.set_timesteps(timesteps=times)
    (noise, labels), generator = batch(), torch.Generator().manual_seed(1)
    ours = OBJECTIVE.sample(
        model, noise, labels, method=method, steps=steps, cfg_scale=cfg_scale,
        step_noise=lambda: torch.randn(noise.shape, generator=generator),
    )  # fmt: skip
    generator.manual_seed(1)
    z = noise
    with torch.no_grad():
        for index, time in enumerate(times):
            output = model(z, torch.full((3,), time), labels)
            null = model(z, torch.full((3,), time), torch.full((3,), 10))[:, :2]
            guided = null + cfg_scale * (output[:, :2] - null)
            output = torch.cat([guided, output[:, 2:]], dim=1)  # the variance is the conditional one
            if method == "ancestral":
                z = scheduler.step(output, time, z, generator=generator).prev_sample
            else:
                before = times[index + 1] if index + 1 < len(times) else -1
                scheduler.num_inference_steps = Fraction(NUM_STEPS, time - before)  # it steps by 1000 // this
                z = scheduler.step(output[:, :2], time, z).prev_sample
    torch.testing.assert_close(ours, z, rtol=0, atol=2e-4 * z.abs().max().item())


def test_the_model_sees_the_training_steps_from_last_to_first():
    model = GaussianModel(evenly_spaced(4)).eval()
    OBJECTIVE.sample(model, torch.randn(2, 1, 4, 4), torch.tensor([1, 2]), steps=4)
    assert [t.tolist() for t in model.seen] == [[999] * 16, [666] * 16, [333] * 16, [0] * 16]
    assert all(t.dtype == torch.int64 for t in model.seen)


def test_guidance_changes_the_channels_asked_for(model):
    noise, labels = batch()

    def sample(scale: float, **settings) -> Tensor:
        return DDPM(**settings).sample(model, noise, labels, method="ddim", steps=1, cfg_scale=scale)

    plain, all_channels, first = sample(1.0), sample(3.0), sample(3.0, guided_channels=1)
    torch.testing.assert_close(first[:, :1], all_channels[:, :1])
    torch.testing.assert_close(first[:, 1:], plain[:, 1:], rtol=1e-5, atol=1e-3)
    assert not torch.allclose(all_channels[:, 1:], plain[:, 1:])
    null = torch.full_like(labels, 10)
    unconditional = OBJECTIVE.sample(model, noise, null, method="ddim", steps=1)
    # One step is linear in the noise: u + s (c - u).
    torch.testing.assert_close(all_channels, unconditional + 3 * (plain - unconditional), rtol=1e-4, atol=1e-3)


def test_step_noise_comes_from_the_global_generator_by_default(model):
    noise, labels = batch()
    torch.manual_seed(5)
    first = OBJECTIVE.sample(model, noise, labels, steps=3)
    torch.manual_seed(5)
    drawn = OBJECTIVE.sample(model, noise, labels, steps=3, step_noise=lambda: torch.randn(noise.shape))
    assert torch.equal(first, drawn) and not torch.equal(first, OBJECTIVE.sample(model, noise, labels, steps=3))


def test_training_times_are_all_steps():
    torch.manual_seed(0)
    times = OBJECTIVE.draw_times(20_000, torch.device("cpu"))
    assert times.dtype == torch.int64 and times.unique().tolist() == list(range(1000))


@pytest.mark.parametrize(
    ("t", "error", "message"),
    [
        ([0.0, 0.5, 1.0], TypeError, "t must be integers .*, got torch.float32"),
        ([True, False, True], TypeError, "t must be integers .*, got torch.bool"),
        (torch.tensor([1, 2, 3], dtype=torch.uint8), TypeError, "t must be integers .*, got torch.uint8"),
        ([0, 5, 1000], ValueError, r"t must be in \[0, 999\].*got \[1000\]"),
        ([0, -1, 3], ValueError, r"t must be in \[0, 999\].*got \[-1\]"),
        ([0, 1], ValueError, "one entry per sample"),
    ],
)
def test_loss_refuses_times(model, t, error, message):
    x, labels = batch()
    with pytest.raises(error, match=message):
        OBJECTIVE.loss(model, x, labels, t=torch.as_tensor(t))


def test_loss_refuses_a_list_of_times_and_a_model_without_sigma(model):
    x, labels = batch()
    with pytest.raises(TypeError, match="t must be a tensor of times, got list"):
        OBJECTIVE.loss(model, x, labels, t=[0, 1, 2])
    with pytest.raises(ValueError, match="build it with learn_sigma=True"):
        OBJECTIVE.loss(create_model("DiT-digits"), torch.randn(3, 1, 8, 8), labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 1001}, "steps must be at most 1000"),
        ({"steps": 0}, "steps must be a whole number, at least 1, got 0"),
        ({"steps": 2.5}, "steps must be a whole number, at least 1, got 2.5"),
        ({"method": "heun"}, "method must be 'ancestral' or 'ddim', got 'heun'"),
        ({"labels": torch.tensor([0, 1, 11])}, r"labels must be in \[0, 9\]"),
    ],
)
def test_sample_refuses(model, change, message):
    noise, labels = batch()
    with pytest.raises(ValueError, match=message):
        OBJECTIVE.sample(model, **{"noise": noise, "labels": labels, "steps": 2, **change})


def test_a_model_without_sigma_is_refused():
    with pytest.raises(ValueError, match=r"DDPM needs.*2, got 1: build it with learn_sigma=True"):
        objective_for(create_model("DiT-digits"), "ddpm")


def test_settings_are_checked():
    for wrong in (0, 2.5):
        with pytest.raises(ValueError, match="guided_channels must be at least 1"):
            DDPM(guided_channels=wrong)
    with torch.device("meta"), pytest.raises(ValueError, match="guided_channels must be at most 1, .* got 7"):
        objective_for(create_model("DiT-digits", learn_sigma=True), "ddpm", guided_channels=7)


@pytest.mark.parametrize("name", ["DiT-digits", "DiffMoE-digits"])
def test_models_with_sigma_train_and_sample(name):
    torch.manual_seed(0)
    model = randomize(create_model(name, learn_sigma=True, depth=2))
    objective = objective_for(model, "ddpm")
    result = objective.loss(model.train(), torch.randn(4, 1, 8, 8), torch.arange(4))
    result.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.update_routing_state(result.aux)
    samples = objective.sample(model.eval(), torch.randn(4, 1, 8, 8), torch.arange(4), steps=3, cfg_scale=2.0)
    assert samples.isfinite().all() and samples.shape == (4, 1, 8, 8)
