"""Rectified flow: straight paths from noise at t = 0 to data at t = 1, and the ODE solvers that follow them.

Source: X. Liu, C. Gong, Q. Liu, "Flow Straight and Fast" (ICLR 2023); time runs as in DiffMoE's and DSMoE's training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffmoe_kernels.checks import at_least_float32
from models.data.splits import check_values
from models.objectives.base import Objective, Predict, check_numbers, check_settings


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow(Objective):
    """Trains `model(z_t, t, labels)` to predict the velocity x - noise of z_t = t * x + (1 - t) * noise, t in [0, 1].

    A model may predict more channels than the images have (a learned sigma): the first ones are the velocity.

    Samplers: "euler" calls the model once per step, "heun" twice, the last time at t = 1. "dopri5" (Dormand and
    Prince, through torchdiffeq) chooses its steps by the error of the whole batch, so that a sample depends on the
    others of its batch to within the tolerances.

    Attributes:
        noise_scale: standard deviation of the noise that paths start from.
        rtol, atol: relative and absolute tolerance of "dopri5".
    """

    noise_scale: float = 1.0
    rtol: float = 1e-3
    atol: float = 1e-6

    methods = {"euler": 50, "heun": 50, "dopri5": None}
    last_step_is_euler: ClassVar[bool] = False  # so that the model is never asked at t = 1

    def __post_init__(self) -> None:
        check_numbers(self)
        above_0 = ("noise_scale", "rtol", "atol")
        check_settings(self, **{name: (getattr(self, name) > 0, "above 0") for name in above_0})

    def draw_times(self, count: int, device: torch.device) -> Tensor:
        """(count,) uniform times from torch's global generator."""
        return torch.rand(count, device=device)

    def check_times(self, t: Tensor) -> None:
        if not t.is_floating_point():
            raise TypeError(f"t must be float, got {t.dtype}: flow times lie in [0, 1], they are not step numbers")
        check_values(
            (t >= 0) & (t <= 1),
            "t must be in [0, 1] (0 is noise, 1 is data)",
            lambda outside: (
                f"{t[outside][:5].tolist()}: pass the fraction of the path, not a diffusion step or t * 1000"
            ),
        )

    def velocity(self, prediction: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """What the first channels of the model's output mean at z (N, C, H, W) and t (N, 1, 1, 1)."""
        return prediction

    def target(self, data: Tensor, noise: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The velocity that z (N, C, H, W) on its path from noise to data should have."""
        return data - noise * self.noise_scale

    def guidance(self, cfg_scale: float, time: float) -> float:
        """The guidance at a time of sampling."""
        return cfg_scale

    def corrupt(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        weight = _weights(t)
        return weight * data + (1 - weight) * (noise * self.noise_scale)

    def losses(self, prediction: Tensor, data: Tensor, noise: Tensor, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        weight = _weights(t)
        predicted = self.velocity(prediction[:, : data.shape[1]], z, weight)
        mse = (predicted - self.target(data, noise, z, weight)).square().flatten(1).mean(1)
        return mse, mse

    def pick_method(self, method: str | None, steps: int | None) -> tuple[str, int | None]:
        if method == "dopri5":
            _odeint()
        return super().pick_method(method, steps)

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
        channels = noise.shape[1]

        def velocity(z: Tensor, time: float) -> Tensor:
            scale = self.guidance(cfg_scale, time)
            t = torch.full((len(z), 1, 1, 1), time, device=z.device)
            outputs = predict(z, time, scale != 1.0)
            conditional, *unconditional = [self.velocity(out[:, :channels], z, t) for out in outputs if out is not None]
            return conditional if scale == 1.0 else unconditional[0] + scale * (conditional - unconditional[0])

        z = noise * self.noise_scale
        if method == "dopri5":
            return _dopri5(velocity, z, self.rtol, self.atol)
        for i in range(steps):
            is_euler = method == "euler" or (self.last_step_is_euler and i == steps - 1)
            step = _euler_step if is_euler else _heun_step
            z = step(velocity, z, i / steps, (i + 1) / steps)
        return z


Velocity = Callable[[Tensor, float], Tensor]


def _weights(t: Tensor) -> Tensor:
    """(N,) times -> (N, 1, 1, 1) float32, for products with images."""
    return at_least_float32(t).view(-1, 1, 1, 1)


def _euler_step(velocity: Velocity, z: Tensor, t: float, t_next: float) -> Tensor:
    return z + (t_next - t) * velocity(z, t)


def _heun_step(velocity: Velocity, z: Tensor, t: float, t_next: float) -> Tensor:
    v = velocity(z, t)
    v_next = velocity(z + (t_next - t) * v, t_next)
    return z + (t_next - t) * (v + v_next) / 2


def _odeint() -> Callable[..., Tensor]:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError(f"{error}; the method 'dopri5' needs: pip install torchdiffeq") from error
    return odeint


def _dopri5(velocity: Velocity, z: Tensor, rtol: float, atol: float) -> Tensor:
    ends = torch.tensor([0.0, 1.0], device=z.device)
    odeint = _odeint()
    try:
        return odeint(lambda t, z: velocity(z, t.item()), z, ends, rtol=rtol, atol=atol, method="dopri5")[-1]
    except AssertionError as error:  # its word for a step of 0
        raise ValueError(
            f"dopri5 finds no step ({error}): the model's output is not finite, or changes too fast"
        ) from error
