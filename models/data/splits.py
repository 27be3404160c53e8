"""What a dataset is to the trainer and to the metrics: two fixed splits and the facts a model is built from."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate


@dataclass(frozen=True)
class DataSplits:
    """A dataset cut once into images to train on and images that no model ever sees.

    Items of `holdout` are `(image, label)`: float32 (channels, image_size, image_size) in [-1, 1] and an int64 scalar
    tensor in [0, num_classes). So are those of `train` where there is no `draw`.

    Attributes:
        name: what the dataset is called in messages: "digits", or its folder.
        holdout: None where nothing is held out; such a dataset can't be scored against.
        image_size, channels: of what the model sees, latents where there is an `autoencoder`.
        class_names: by label; empty where classes have no names but their numbers.
        draw: turns a batch of the items' first entries, on the device that trains, into images for the model (N,
            channels, image_size, image_size), drawing from torch's global generators: flips, latents.
        autoencoder: local path or hub name of the diffusers AutoencoderKL that decodes latents; None for pixels.
    """

    name: str
    train: Dataset
    holdout: Dataset | None
    num_classes: int
    image_size: int
    channels: int
    class_names: tuple[str, ...] = ()
    draw: Callable[[Tensor], Tensor] | None = None
    autoencoder: str | None = None


def collect(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """A whole split in memory: images (N, C, H, W) and labels (N,), as its items have them.

    Goes item by item because a DataLoader would draw from the caller's random state.
    """
    images, labels = default_collate([dataset[i] for i in range(len(dataset))])
    return images, labels


def rank_in_class(labels: Tensor, num_classes: int) -> Tensor:
    """How many earlier entries carry the same label: (N,) int64 -> (N,) int64, 0 for the first of each class."""
    one_hot = torch.nn.functional.one_hot(labels, num_classes)
    return one_hot.cumsum(0).gather(1, labels.unsqueeze(1)).squeeze(1) - 1


def check_labels(labels: Tensor, num_classes: int, *, wait: bool = True) -> None:
    """Refuse class labels that no class-conditional model of `num_classes` classes was trained on.

    Args:
        labels: (N,) integer tensor, N at least 1.
        num_classes: number of classes; the largest valid label is one less.
        wait: for the values of labels on a GPU; without it see `check_values`.

    Raises:
        TypeError: `labels` is not a tensor of integers.
        ValueError: `labels` is empty, not 1-d, or holds a value outside [0, num_classes).
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor of integers, got {type(labels).__name__}; use torch.tensor(...)")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}; pass class numbers as torch.int64")
    if labels.ndim != 1 or labels.numel() == 0:
        raise ValueError(f"labels must be 1-d with at least one entry, got shape {tuple(labels.shape)}")
    inside = (labels >= 0) & (labels < num_classes)
    check_values(
        inside.cpu() if wait else inside,
        f"labels must be in [0, {num_classes - 1}] for {num_classes} classes",
        lambda outside: (
            f"{labels[outside].unique()[:5].tolist()} ({outside.sum()} of {len(labels)} labels); correct those labels"
        ),
    )


def check_values(holds: Tensor, rule: str, found: Callable[[Tensor], str]) -> None:
    """Refuses values that break a rule, without a wait for the GPU that they may be on.

    Args:
        holds: bool, of each value.
        rule: for the message.
        found: what there is instead, from the values' places.

    Raises:
        ValueError: some do not, on a CPU. On a GPU an assertion of the device fails, which the next wait for it raises.
    """
    if holds.is_cuda:
        torch._assert_async(holds.all(), rule)
    elif not holds.all():
        raise ValueError(f"{rule}, got {found(~holds)}")
