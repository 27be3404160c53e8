"""The kernel distance between two sets of features, with its standard deviation between random subsets."""

import torch
from torch import Tensor

from models.metrics.frechet import check_features

SUBSETS = 100
SUBSET_SIZE = 100


def kernel_distance(
    features_a: Tensor, features_b: Tensor, *, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE
) -> tuple[float, float]:
    """Squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, unbiased, over random subsets, in float64.

    Unlike a Frechet distance its expectation does not depend on how many rows there are, and it may be negative.

    Args:
        features_a: (N, D) float.
        features_b: (M, D) float, on the same device.
        subsets: how many pairs of subsets are compared, drawn with a fixed seed.
        subset_size: rows in each, at least 2 and at most N and M.

    Returns:
        Mean over the subsets and the standard deviation between them, as KID is reported.

    Raises:
        TypeError: a set is not a floating-point tensor.
        ValueError: sets that are not (N, D), of different widths, not finite, or smaller than a subset.

    Source: M. Binkowski et al., "Demystifying MMD GANs" (2018).
    """
    check_features(features_a, features_b)
    smallest = min(len(features_a), len(features_b))
    if not 2 <= subset_size <= smallest:
        raise ValueError(f"subset_size must be from 2 to {smallest}, the rows of the smaller set, got {subset_size}")
    if subsets < 1:
        raise ValueError(f"subsets must be at least 1, got {subsets}")
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(subsets):
        a, b = (
            features.detach()[torch.randperm(len(features), generator=generator)[:subset_size]].double()
            for features in (features_a, features_b)
        )
        values.append(_mean_off_diagonal(a) + _mean_off_diagonal(b) - 2 * _kernel(a, b).mean())
    distances = torch.stack(values)
    return distances.mean().item(), distances.std(correction=0).item()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.mT / a.shape[1] + 1) ** 3


def _mean_off_diagonal(a: Tensor) -> Tensor:
    """Mean of the kernel over pairs of different rows, which makes the estimate unbiased."""
    kernel = _kernel(a, a)
    return (kernel.sum() - kernel.diagonal().sum()) / (len(a) * (len(a) - 1))
