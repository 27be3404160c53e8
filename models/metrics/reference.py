"""Statistics of real images that samples are compared with: ADM's reference batches, or any images."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.data import array_names, iterate_images, read_arrays
from models.metrics.frechet import check_statistics
from models.metrics.inception import FEATURES, SPATIAL_FEATURES, InceptionFeatures, inception_outputs
from models.metrics.statistics import RunningGaussian

BATCH_SIZE = 64


@dataclass(frozen=True)
class ReferenceStatistics:
    """What real images look like to Inception. Tensors on the CPU.

    mean: (2048,) float64, of the pool features.
    covariance: (2048, 2048) float64, unbiased.
    spatial_mean: (2023,) float64, of the spatial features, for sFID; None where the file has none.
    spatial_covariance: (2023, 2023) float64, or None.
    features: (N, 2048) float32, pool features of single images, which KID needs; None where only statistics are known.
    """

    mean: Tensor
    covariance: Tensor
    spatial_mean: Tensor | None = None
    spatial_covariance: Tensor | None = None
    features: Tensor | None = None


def reference_statistics(batches: Iterable[Tensor], inception: InceptionFeatures) -> ReferenceStatistics:
    """Statistics and features of real images, uint8 (n, H, W, 3) each, all of one size.

    Raises:
        TypeError, ValueError: as `inception_outputs` does; fewer than 2 images.
    """
    pool, spatial, features = RunningGaussian(), RunningGaussian(), []
    for output in inception_outputs(batches, inception):
        pool.update(output.features)
        spatial.update(output.spatial)
        features.append(output.features.cpu())
    statistics = (pool.mean, pool.covariance, spatial.mean, spatial.covariance)
    return ReferenceStatistics(*(tensor.cpu() for tensor in statistics), features=torch.cat(features))


def load_reference(path: str | Path, inception: InceptionFeatures | None = None) -> ReferenceStatistics:
    """Read a reference batch as ADM ships it, such as VIRTUAL_imagenet256_labeled.npz. Executes nothing.

    Args:
        path: `.npz` with `mu` (2048,) and `sigma` (2048, 2048) of the whole dataset, as a rule with `mu_s` (2023,) and
            `sigma_s` (2023, 2023) beside them, and with `arr_0`, uint8 (N, H, W, 3): some images of the dataset.
        inception: from `load_inception`; with it the features of `arr_0` are computed, where the file has images: KID
            needs them, and a file of images alone has no other statistics.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file; statistics missing, of a wrong shape, not finite or not symmetric.

    Source: openai/guided-diffusion, evaluations/evaluator.py.
    """
    names = array_names(path)
    measured = None
    if inception is not None and "arr_0" in names:
        measured = reference_statistics(iterate_images([path], BATCH_SIZE), inception)
    pool = _read_pair(path, "mu", "sigma", FEATURES)
    spatial = _read_pair(path, "mu_s", "sigma_s", SPATIAL_FEATURES)
    if pool is not None:
        return ReferenceStatistics(*pool, *(spatial or (None, None)), measured and measured.features)
    if measured is None:
        raise ValueError(
            f"{path}: expected the keys 'mu' and 'sigma', got {names}; pass a reference batch of ADM, or the network "
            "and a file of real images as save_npz writes it"
        )
    return measured


def _read_pair(path: str | Path, mean: str, covariance: str, width: int) -> tuple[Tensor, Tensor] | None:
    """Mean and covariance of those names, float64 and checked; None where the file has neither."""
    arrays = read_arrays(path, (mean, covariance))
    if not arrays:
        return None
    for name, shape in ((mean, (width,)), (covariance, (width, width))):
        array = arrays.get(name)
        if array is None or array.dtype.kind != "f" or array.shape != shape:
            found = "nothing" if array is None else f"{array.dtype} {array.shape}"
            raise ValueError(f"{path}: {name} must be floats {shape}, statistics of Inception's features, got {found}")
    pair = tuple(torch.from_numpy(arrays[name].astype(np.float64)) for name in (mean, covariance))
    try:
        check_statistics("reference", *pair)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return pair
