"""DDPM with a learned variance, as DiT is trained and sampled: 1000 steps of a linear schedule.

Sources: J. Ho, A. Jain, P. Abbeel, "Denoising Diffusion Probabilistic Models" (arXiv:2006.11239); A. Nichol,
P. Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (arXiv:2102.09672), equations 14 to 16 for the variance
and the hybrid loss; J. Song, C. Meng, S. Ermon, "Denoising Diffusion Implicit Models" (arXiv:2010.02502). Conventions
are guided-diffusion's (github.com/openai/guided-diffusion), which DiT took over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from models.data.splits import check_values
from models.objectives.base import Objective, Predict, check_numbers, check_settings

NUM_STEPS = 1000
BETAS = (1e-4, 0.02)  # first and last
BIN = 1 / 127.5  # between two levels of an 8-bit image in [-1, 1]


@dataclass(frozen=True, kw_only=True)
class DDPM(Objective):
    """Trains `model(x_t, t, labels)` to predict the noise of x_t, and the variance of the step back; t is 0 to 999.

    The model has twice the images' channels: the noise, then v in about [-1, 1] that picks the log-variance between the
    least and the largest sensible one. The loss is the squared error of the noise plus, for v alone, the variational
    bound in bits per dimension.

    Samplers: "ancestral" draws each step from the model's distribution, "ddim" follows the model without noise. Both
    take `steps` of the 1000, evenly spaced from the last to the first.

    Attributes:
        guided_channels: how many of the noise's channels guidance changes; None for all. DiT's published samples and
            scores guide 3 of the 4 latent channels.
    """

    guided_channels: int | None = None

    methods = {"ancestral": 250, "ddim": 50}

    def __post_init__(self) -> None:
        check_numbers(self)
        fine = self.guided_channels is None or (isinstance(self.guided_channels, int) and self.guided_channels >= 1)
        check_settings(self, guided_channels=(fine, "at least 1, or null for all"))

    def check_model(self, model: nn.Module) -> None:
        if model.out_channels != 2 * model.in_channels:
            raise ValueError(
                f"DDPM needs a model with twice as many output channels as input channels, {2 * model.in_channels}, "
                f"got {model.out_channels}: build it with learn_sigma=True"
            )
        if self.guided_channels is not None and self.guided_channels > model.in_channels:
            raise ValueError(
                f"guided_channels must be at most {model.in_channels}, the model's channels, got {self.guided_channels}"
            )

    def draw_times(self, count: int, device: torch.device) -> Tensor:
        """(count,) int64 steps from torch's global generator, 0 to 999."""
        return torch.randint(NUM_STEPS, (count,), device=device)

    def check_times(self, t: Tensor) -> None:
        if t.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"t must be integers (torch.int64), got {t.dtype}: DDPM times are step numbers, not fractions of a path"
            )
        check_values(
            (t >= 0) & (t < NUM_STEPS),
            f"t must be in [0, {NUM_STEPS - 1}] (0 is nearly data)",
            lambda outside: f"{t[outside][:5].tolist()}: pass step numbers",
        )

    def pick_method(self, method: str | None, steps: int | None) -> tuple[str, int | None]:
        method, steps = super().pick_method(method, steps)
        if steps > NUM_STEPS:
            raise ValueError(f"steps must be at most {NUM_STEPS}, the steps of training, got {steps}")
        return method, steps

    def corrupt(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        schedule = _schedule(t.device)
        return _at(schedule.data_scale, t) * data + _at(schedule.noise_scale, t) * noise

    def losses(self, prediction: Tensor, data: Tensor, noise: Tensor, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        predicted, v = prediction.split(data.shape[1], dim=1)
        mse = (predicted - noise).square().flatten(1).mean(1)
        # Only v learns from the bound: through the mean it would drown the squared error's weighting.
        bound = _bound(_schedule(z.device), predicted.detach(), v, data, z, t)
        return mse + bound, mse

    def integrate(
        self,
        predict: Predict,
        noise: Tensor,
        *,
        steps: int | None,
        method: str,
        cfg_scale: float,
        step_noise: Callable[[], Tensor],
    ) -> Tensor:
        times = evenly_spaced(steps)
        schedule, channels, z = _schedule(noise.device, times), noise.shape[1], noise
        for step in range(steps - 1, -1, -1):
            output, unconditional = predict(z, times[step], cfg_scale != 1.0)
            predicted, v = output.split(channels, dim=1)
            if unconditional is not None:
                predicted = self._guide(predicted, unconditional[:, :channels], cfg_scale)
            t = torch.full((len(z),), step, device=z.device)
            data = _predicted_data(schedule, predicted, z, t)
            if method == "ddim":
                z = _at(schedule.data_scale_before, t) * data + _at(schedule.noise_scale_before, t) * predicted
                continue
            mean, log_variance = _posterior_mean(schedule, data, z, t), _log_variance(schedule, v, t)
            z = mean if step == 0 else mean + (0.5 * log_variance).exp() * step_noise().to(z)
        return z

    def _guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        count = conditional.shape[1] if self.guided_channels is None else self.guided_channels
        guided = unconditional + scale * (conditional - unconditional)
        return torch.cat([guided[:, :count], conditional[:, count:]], dim=1)


def evenly_spaced(steps: int) -> tuple[int, ...]:
    """`steps` of the 1000 training steps, rising, the first and the last among them; the last alone for one.

    guided-diffusion's own spacing, which adds up rounded strides, differs by one step at some odd counts (not 50, 100
    or 250).
    """
    if steps == 1:
        return (NUM_STEPS - 1,)
    return tuple(int(time) for time in np.linspace(0, NUM_STEPS - 1, steps).round())


@dataclass(frozen=True, eq=False)
class _Schedule:
    """Float32 tensors (S,) over the steps of a schedule, noise rising.

    data_scale, noise_scale: of the data and of the noise in z; their squares sum to 1.
    data_scale_before, noise_scale_before: the same one step nearer to the data.
    log_most: log of the variance that the step adds.
    log_least: log of the variance of the step back if the data were known; the second one in place of the first, 0.
    data_weight, z_weight: of the data and of z in the mean of the step back.
    """

    data_scale: Tensor
    noise_scale: Tensor
    data_scale_before: Tensor
    noise_scale_before: Tensor
    log_most: Tensor
    log_least: Tensor
    data_weight: Tensor
    z_weight: Tensor


@lru_cache(maxsize=32)
def _schedule(device: torch.device, times: tuple[int, ...] = tuple(range(NUM_STEPS))) -> _Schedule:
    """The schedule over some of the training steps; computed in float64."""
    signal = np.cumprod(1 - np.linspace(*BETAS, NUM_STEPS, dtype=np.float64))[list(times)]  # share of variance left
    before = np.append(1.0, signal[:-1])
    beta = 1 - signal / before
    variance = beta * (1 - before) / (1 - signal)
    least = np.append(variance[1:2], variance[1:]) if len(signal) > 1 else beta
    arrays = {
        "data_scale": np.sqrt(signal),
        "noise_scale": np.sqrt(1 - signal),
        "data_scale_before": np.sqrt(before),
        "noise_scale_before": np.sqrt(1 - before),
        "log_most": np.log(beta),
        "log_least": np.log(least),
        "data_weight": beta * np.sqrt(before) / (1 - signal),
        "z_weight": (1 - before) * np.sqrt(1 - beta) / (1 - signal),
    }
    with torch.inference_mode(False):  # training may follow
        return _Schedule(**{name: torch.from_numpy(array).float().to(device) for name, array in arrays.items()})


def _at(values: Tensor, t: Tensor) -> Tensor:
    """Entries of a schedule at steps (N,), as (N, 1, 1, 1) for products with images."""
    return values[t].view(-1, 1, 1, 1)


def _predicted_data(schedule: _Schedule, noise: Tensor, z: Tensor, t: Tensor) -> Tensor:
    return (z - _at(schedule.noise_scale, t) * noise) / _at(schedule.data_scale, t)


def _posterior_mean(schedule: _Schedule, data: Tensor, z: Tensor, t: Tensor) -> Tensor:
    return _at(schedule.data_weight, t) * data + _at(schedule.z_weight, t) * z


def _log_variance(schedule: _Schedule, v: Tensor, t: Tensor) -> Tensor:
    share = (v + 1) / 2
    return share * _at(schedule.log_most, t) + (1 - share) * _at(schedule.log_least, t)


def _bound(schedule: _Schedule, noise: Tensor, v: Tensor, data: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """(N,) one term of the variational bound, in bits per dimension: the divergence of the model's step back from the
    true one, and for step 0 the negative log-likelihood of the 8-bit image."""
    log_variance = _log_variance(schedule, v, t)
    mean = _posterior_mean(schedule, _predicted_data(schedule, noise, z, t), z, t)
    true_mean, true_log_variance = _posterior_mean(schedule, data, z, t), _at(schedule.log_least, t)
    difference = true_log_variance - log_variance
    divergence = 0.5 * (difference.exp() - 1 - difference + (true_mean - mean).square() * (-log_variance).exp())
    likelihood = _log_likelihood(data, mean, 0.5 * log_variance)
    terms = torch.where(t.view(-1, 1, 1, 1) == 0, -likelihood, divergence)
    return terms.flatten(1).mean(1) / math.log(2)


def _log_likelihood(data: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of the 8-bit level that the data lie at under a normal distribution; the ends have open bins."""
    scale = (-log_std).exp()
    above = _normal_cdf((data + BIN / 2 - mean) * scale)
    below = _normal_cdf((data - BIN / 2 - mean) * scale)
    share = torch.where(data < -0.999, above, torch.where(data > 0.999, 1 - below, above - below))
    return share.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """By tanh, as guided-diffusion approximates it, to within 2e-4."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
