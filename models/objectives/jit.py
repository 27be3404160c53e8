"""JiT's objective (arXiv:2511.13720): the model predicts the clean image, the loss compares velocities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.objectives.base import check_settings
from models.objectives.rectified_flow import RectifiedFlow


@dataclass(frozen=True, kw_only=True)
class JiTFlow(RectifiedFlow):
    """A flow whose model predicts x; its velocity is (x - z_t) / max(1 - t, min_gap), for the target alike.

    Labels are dropped by the model in training, not here. Sampling with "heun" ends with an Euler step.

    Attributes:
        time_mean, time_std: training times are the sigmoid of a normal number of this mean and deviation.
        noise_scale: standard deviation of the noise that paths start from (officially 1 at 256 pixels, 2 at 512).
        min_gap: least 1 - t that a velocity is divided by.
        guidance_interval: (low, high): guidance applies where low < t < high; low = 0 includes t = 0.
    """

    time_mean: float = -0.8
    time_std: float = 0.8
    min_gap: float = 0.05
    guidance_interval: tuple[float, float] = (0.1, 1.0)

    methods = {"heun": 50, "euler": 50, "dopri5": None}
    last_step_is_euler = True

    def __post_init__(self) -> None:
        super().__post_init__()
        interval = self.guidance_interval
        if isinstance(interval, list):  # as YAML has it
            object.__setattr__(self, "guidance_interval", interval := tuple(interval))
        fine = isinstance(interval, tuple) and len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1
        check_settings(
            self,
            time_std=(self.time_std >= 0, "at least 0"),
            min_gap=(0 < self.min_gap < 1, "between 0 and 1"),
            guidance_interval=(fine, "two rising times in [0, 1]"),
        )

    def draw_times(self, count: int, device: torch.device) -> Tensor:
        """(count,) logit-normal times from torch's global generator."""
        return torch.sigmoid(torch.randn(count, device=device) * self.time_std + self.time_mean)

    def velocity(self, prediction: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return (prediction - z) / (1 - t).clamp(min=self.min_gap)

    def target(self, data: Tensor, noise: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return self.velocity(data, z, t)

    def guidance(self, cfg_scale: float, time: float) -> float:
        low, high = self.guidance_interval
        return cfg_scale if time < high and (low == 0 or time > low) else 1.0
