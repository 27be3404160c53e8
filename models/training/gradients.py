"""The gradients of a batch: forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.objectives import Objective
from models.precision import Precision, float32_products
from models.training.processes import Processes


@dataclass(frozen=True)
class Gradients:
    """What a training step computes of a batch, in parts that have a forward and backward each.

    Calling it with images, labels, times and noise adds to the parameters' gradients, and returns the means of loss and
    error, (2,) float32, and each part's record of router statistics.
    """

    model: nn.Module
    objective: Objective
    processes: Processes
    precision: Precision
    parts: int = 1

    def __call__(self, *batch: Tensor) -> tuple[Tensor, list[Any]]:
        images, device = batch[0], batch[0].device
        totals, auxes = torch.zeros(2, device=device), []
        parts = zip(*(tensor.tensor_split(self.parts) for tensor in batch), strict=True)
        with float32_products(self.precision):
            for part, (x, labels, t, noise) in enumerate(parts, 1):
                share = len(x) / len(images)
                with self.processes.combine(self.model, last=part == self.parts):
                    with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                        result = self.objective.loss(self.model, x, labels, t=t, noise=noise)
                    (result.loss * share).backward()
                totals += share * torch.stack([result.loss, result.mse.mean()]).detach()
                auxes.append(result.aux)
        return totals, auxes
