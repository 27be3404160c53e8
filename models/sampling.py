"""Images from a model: each with noise of its own, whatever it is drawn beside."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.data import load_autoencoder, to_uint8
from models.objectives import Method, Objective, objective_for
from models.objectives.base import unwrapped
from models.precision import Precision, float32_products, weights_cast_once


def balanced_labels(num_samples: int, classes: Sequence[int]) -> Tensor:
    """(num_samples,) int64 running through `classes` again and again, so that each comes as often, to within one."""
    return torch.tensor(classes, dtype=torch.int64).repeat(-(-num_samples // len(classes)))[:num_samples]


def sample_images(model: nn.Module, labels: Tensor, *, precision: Precision = "float32", **options: Any) -> Tensor:
    """Images of the given labels: all that `sample_batches` yields, which has the arguments, as one.

    Returns:
        (N, C, H, W) float32 on the CPU, about [-1, 1], not clipped; latents of a latent model.
    """
    batches = sample_batches(model, labels, precision=precision, **options)
    with weights_cast_once(model, precision):
        return torch.cat([batch.cpu() for batch in batches])


def sample_batches(
    model: nn.Module,
    labels: Tensor,
    *,
    objective: Objective | None = None,
    seed: int = 0,
    steps: int | None = None,
    method: Method | None = None,
    cfg_scale: float = 1.0,
    batch_size: int = 256,
    precision: Precision = "float32",
    first: int = 0,
) -> Iterator[Tensor]:
    """Images of the given labels, `batch_size` at a time; all noise of image i depends on `seed` and i alone.

    Neither `batch_size` nor the device changes that noise, and torch's global generators are left as they are.

    Args:
        model: in evaluation mode; it may be in a wrapper, such as CapturedModel.
        labels: (N,) int64 in [0, model.num_classes), or model.null_label.
        objective: that the model was trained with; by default the one of its family.
        steps, method, cfg_scale: see `Objective.sample`.
        precision: "bfloat16" runs the model under autocast; the sampler's own arithmetic is float32. Each call of the
            model may cast weights, unless the caller holds `weights_cast_once`.
        first: i of the first label, for a part of a larger run.

    Yields:
        (batch_size or fewer, C, H, W) float32 on the model's device.

    Raises:
        TypeError, ValueError: as `Objective.sample` does.
    """
    if batch_size < 1 or len(labels) < 1:
        raise ValueError(f"batch_size and labels: expected at least 1 of each, got {batch_size} and {len(labels)}")
    objective = objective_for(model) if objective is None else objective
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    bare = unwrapped(model)
    shape = (bare.in_channels, bare.input_size, bare.input_size)
    skipped = torch.empty(shape)
    for _ in range(first):
        skipped.normal_(generator=generator)
    for start in range(0, len(labels), batch_size):
        part = labels[start : start + batch_size]
        noise = torch.empty(len(part), *shape)
        for image in noise:
            image.normal_(generator=generator)
        autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()
        with float32_products(precision), autocast:
            samples = objective.sample(
                model,
                noise.to(device),
                part.to(device),
                steps=steps,
                method=method,
                cfg_scale=cfg_scale,
                step_noise=_StepNoise(seed, first + start, noise),
            )
        yield samples


class _StepNoise:
    """The noise that a sampler adds on its way: each image has a generator of its own."""

    def __init__(self, seed: int, first: int, like: Tensor) -> None:
        seeds = [np.random.SeedSequence([seed % 2**64, first + i]) for i in range(len(like))]
        self.generators = [torch.Generator().manual_seed(int(s.generate_state(1, np.uint64)[0])) for s in seeds]
        self.shape = like.shape[1:]

    def __call__(self) -> Tensor:
        """(N, C, H, W) standard normal."""
        return torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])


def to_images(samples: Tensor, autoencoder: str | None) -> Tensor:
    """Samples, or latents by the autoencoder of that path or hub name, to uint8 (N, H, W, C) on the CPU."""
    return to_uint8(samples if autoencoder is None else load_autoencoder(autoencoder).decode(samples)).cpu()


def check_decodable(model: nn.Module, autoencoder: str | None) -> None:
    """Refuse, before anything is sampled, a model whose samples that autoencoder does not make images of.

    Raises:
        ValueError: latents without an autoencoder, or of other channels than its; no such autoencoder.
        ImportError: diffusers is not installed.
    """
    channels = model.in_channels
    if autoencoder is None:
        if channels not in (1, 3):
            raise ValueError(
                f"the model makes latents of {channels} channels, which need a decoder: pass --autoencoder, such as "
                "stabilityai/sd-vae-ft-ema"
            )
    elif load_autoencoder(autoencoder).channels != channels:
        raise ValueError(
            f"autoencoder {autoencoder!r} has latents of {load_autoencoder(autoencoder).channels} channels, "
            f"but the model makes {channels}: pass the one that the model was trained with"
        )
