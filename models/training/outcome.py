"""What training steps and runs come to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


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
