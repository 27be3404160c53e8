"""Whether training on a backend ends where the reference's does, with what another seed changes as the measure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from diffmoe_kernels.backend import Backend
from diffmoe_kernels.testing import relative_error
from models.objectives import Objective, objective_for
from models.training.state import MovingAverage

SEEDS = (0, 1, 2)  # of the reference's runs; the backend under test runs the first
WINDOW = 20  # steps that losses are averaged over
LEARNING_RATE, EMA_DECAY, GRAD_CLIP = 1e-3, 0.98, 1.0

Batch = tuple[Tensor, Tensor]  # images (N, C, H, W) in [-1, 1] and int64 labels (N,)


@dataclass(frozen=True)
class Trained:
    """What is kept of one run.

    losses: (steps,) float64, mean squared error of the velocity on the batch of each step.
    prediction: (N, C, H, W) float32, output of the averaged weights at noised images that are the same for all runs.
    """

    losses: Tensor
    prediction: Tensor


@dataclass(frozen=True)
class Measure:
    """How far the backend's run lies from the reference's of the same seed, and how far other seeds lie apart."""

    name: str
    distance: float
    spread: float

    @property
    def passes(self) -> bool:
        return self.distance <= self.spread  # false for NaN


def compare_backends(
    make_model: Callable[[Backend], nn.Module],
    batches: Sequence[Batch],
    *,
    backend: Backend,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Measure]:
    """Train once on `backend` and three times on the reference, and measure.

    The runs see the same batches in the same order. Runs of one seed share initial weights, times, noise and dropped
    labels, runs of different seeds none of them. The measures, each of which must be within its spread:

    - final loss: |difference| of the mean loss of the last 20 steps. Spread: greatest less least of the three seeds.
    - loss curve: mean |difference| of the running means over 20 steps. Spread: that of the nearest two seeds.
    - prediction: relative Frobenius distance of what the averaged weights predict at the end. Spread: as before.

    Args:
        make_model: gives a model on a backend, its weights drawn from torch's global generator, on the CPU.
        batches: one per step, on the device to train on.
        dtype: of autocast, for all runs; float32 for none.

    Raises:
        ValueError: no batches, or a loss that is not finite.
        NotImplementedError: the backend can't run here.
    """
    if not batches:
        raise ValueError("batches must hold at least one, got none")
    ours = train(make_model, batches, backend=backend, seed=SEEDS[0], dtype=dtype)
    references = [train(make_model, batches, backend="reference", seed=seed, dtype=dtype) for seed in SEEDS]
    pairs = list(combinations(references, 2))
    return [
        Measure("final loss", _final_loss(ours, references[0]), max(_final_loss(a, b) for a, b in pairs)),
        Measure("loss curve", _loss_curve(ours, references[0]), min(_loss_curve(a, b) for a, b in pairs)),
        Measure("prediction", _prediction(ours, references[0]), min(_prediction(a, b) for a, b in pairs)),
    ]


def train(
    make_model: Callable[[Backend], nn.Module],
    batches: Sequence[Batch],
    *,
    backend: Backend,
    seed: int,
    dtype: torch.dtype,
) -> Trained:
    """One run, a step for each batch; arguments as in `compare_backends`. Leaves the global generators as they were."""
    device = batches[0][0].device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = make_model(backend).to(device).train()
        objective, ema = objective_for(model), MovingAverage(model, EMA_DECAY)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.0)
        losses = []
        for images, labels in batches:
            with _autocast(device, dtype):
                result = objective.loss(model, images, labels)
            optimizer.zero_grad(set_to_none=True)
            result.loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, GRAD_CLIP)
            optimizer.step()
            model.update_routing_state([result.aux])
            ema.update_parameters(model)
            losses.append(result.mse.detach().mean())
        prediction = _predict(ema.module, objective, batches[0], dtype)
    trained = Trained(torch.stack(losses).double().cpu(), prediction)
    if not (trained.losses.isfinite().all() and trained.prediction.isfinite().all()):
        raise ValueError(f"backend {backend!r}, seed {seed}: the loss or the prediction is not finite")
    return trained


@torch.no_grad()
def _predict(model: nn.Module, objective: Objective, batch: Batch, dtype: torch.dtype) -> Tensor:
    images, labels = batch
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator).to(images)
    t = ((torch.arange(len(images)) + 0.5) / len(images)).to(images)
    with _autocast(images.device, dtype):
        return model(objective.corrupt(images, noise, t), t, labels).float().cpu()


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def _final_loss(a: Trained, b: Trained) -> float:
    return (a.losses[-WINDOW:].mean() - b.losses[-WINDOW:].mean()).abs().item()


def _loss_curve(a: Trained, b: Trained) -> float:
    window = min(WINDOW, len(a.losses))
    smooth = [run.losses.unfold(0, window, 1).mean(1) for run in (a, b)]
    return (smooth[0] - smooth[1]).abs().mean().item()


def _prediction(a: Trained, b: Trained) -> float:
    return relative_error(a.prediction, b.prediction)


def blobs(steps: int, batch_size: int, *, image_size: int = 8, num_classes: int = 10, seed: int = 0) -> list[Batch]:
    """Batches of grey images that need no data: a bright spot whose place is the class, give or take a pixel.

    Returns:
        float32 (batch_size, 1, image_size, image_size) in [-1, 1] and int64 (batch_size,), on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    grid = torch.arange(image_size, dtype=torch.float32) - (image_size - 1) / 2
    batches = []
    for _ in range(steps):
        labels = torch.randint(num_classes, (batch_size,), generator=generator)
        angle = 2 * math.pi * labels / num_classes
        centre = torch.stack([angle.sin(), angle.cos()], dim=1) * image_size / 4
        centre = centre + 0.5 * torch.randn(centre.shape, generator=generator)  # (N, 2)
        y, x = ((grid - place[:, None]) ** 2 for place in centre.T)  # (N, image_size) each
        spots = torch.exp(-(y[:, :, None] + x[:, None, :]) / 3)
        batches.append((2 * spots.unsqueeze(1) - 1, labels))
    return batches
