"""What training steps and runs come to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor


class NonFiniteError(RuntimeError):
    """Training met a NaN or an infinity and stopped; the message has the step and the last good checkpoint."""


@dataclass(frozen=True)
class StepStats:
    """One optimizer step.

    loss: what was minimised, auxiliary losses included.
    mse: squared error of what the objective predicts: the velocity, or the noise for DDPM.
    grad_norm: of all gradients, before they were clipped.
    """

    loss: float
    mse: float
    grad_norm: float


class LaunchedStep:
    """An optimizer step that a GPU may still be at.

    Args:
        step: its number.
        figures: (3,) loss, squared error and gradient norm, as `StepStats` has them; the copy to the host begins now.
    """

    def __init__(self, step: int, figures: Tensor) -> None:
        self.step, self.figures = step, figures.to("cpu", non_blocking=True)
        self.done = None
        if figures.is_cuda:
            self.done = torch.cuda.Event()
            self.done.record()

    def stats(self) -> StepStats:
        """Its figures, once they are there."""
        if self.done:
            self.done.synchronize()
        return StepStats(*self.figures.tolist())


@dataclass(frozen=True)
class TrainResult:
    """How a call of `Trainer.fit` ended.

    step: optimizer steps done since the start of the run.
    images_per_second: training images per second of all training steps in this process, the first one's compilation
        too; sampling and writing not counted. `metrics.jsonl` has that of the steps since the record before.
    checkpoint: the one of `step`.
    ended_by: what stopped it.
    """

    step: int
    images_per_second: float
    checkpoint: Path
    ended_by: Literal["steps", "time", "signal"]
