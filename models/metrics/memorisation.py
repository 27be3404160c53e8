"""Whether samples are copies of training images: distances in pixel space, with real unseen images as the measure."""

import torch
from torch import Tensor


def nearest_distances(images: Tensor, references: Tensor) -> Tensor:
    """Euclidean distance over pixels from each image to the nearest reference; exactly 0 for a copy.

    Args:
        images: (N, C, H, W) float.
        references: (M, C, H, W) float, of the same image shape and scale.

    Returns:
        (N,) float64.
    """
    if images.shape[1:] != references.shape[1:] or images.ndim != 4 or 0 in (len(images), len(references)):
        raise ValueError(
            "images and references must be (N, C, H, W) and (M, C, H, W) with N and M at least 1, "
            f"got {tuple(images.shape)} and {tuple(references.shape)}"
        )
    # Not by matrix products, which round the distance of a copy to something above 0.
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(images.flatten(1).double(), references.flatten(1).double(), compute_mode=exact).amin(1)


def share_nearer(distances: Tensor, unseen_distances: Tensor) -> float:
    """Share of samples that lie nearer to a training image than the median real unseen image does.

    0.5 is what fresh real images would score; 1 means that every sample leans on a training image more than real
    images do (copies, but also bland averages); far below 0.5 means samples unlike any training image.

    Args:
        distances: (N,) of the samples to their nearest training images.
        unseen_distances: (M,) of real held-out images to theirs.
    """
    return (distances < unseen_distances.quantile(0.5)).double().mean().item()
