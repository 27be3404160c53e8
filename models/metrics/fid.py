"""FID, sFID, Inception Score and KID of samples by the protocol of ADM and DiT."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.metrics.frechet import frechet_distance_of_statistics
from models.metrics.inception import InceptionFeatures, inception_outputs
from models.metrics.kernel_distance import kernel_distance
from models.metrics.reference import ReferenceStatistics
from models.metrics.statistics import RunningGaussian

SPLIT = 5000  # images that one Inception Score is computed of
KID_SUBSET_SIZE = 1000


@dataclass(frozen=True)
class FidScores:
    """What `fid_scores` found.

    fid: Frechet distance of the pool features to the reference; lower is better. It falls as samples are added: those
        of papers are of 50,000.
    sfid: the same of the spatial features; None where the reference has none.
    inception_score: of the logits, mean over splits of 5,000 samples in their order; higher is better.
    kid: kernel distance of the pool features, over 100 subsets of 1,000; None where the reference has only statistics,
        since it is computed between single images.
    kid_error: its standard deviation between the subsets, or None.
    num_samples: how many samples were scored.
    """

    fid: float
    sfid: float | None
    inception_score: float
    kid: float | None
    kid_error: float | None
    num_samples: int


def fid_scores(batches: Iterable[Tensor], inception: InceptionFeatures, reference: ReferenceStatistics) -> FidScores:
    """Score samples, batch by batch, so that any number fits into memory (with a KID, 8 KB a sample).

    How the samples are divided into batches changes the scores by rounding alone, their order only the Inception Score.

    Args:
        batches: uint8 (n, H, W, 3), all of one H and W.
        inception: from `load_inception`, on the device to use.
        reference: from `load_reference` or `reference_statistics`.

    Warns:
        UserWarning: fewer samples than make a covariance of full rank, 2,049.

    Raises:
        TypeError, ValueError: as `inception_outputs` does; fewer than 2 samples.

    Source: openai/guided-diffusion, evaluations/evaluator.py; T. Salimans et al., "Improved Techniques for Training
    GANs" (2016) for the Inception Score; M. Binkowski et al., "Demystifying MMD GANs" (2018) for KID.
    """
    pool, spatial, score, features = RunningGaussian(), RunningGaussian(), _SplitScore(), []
    for output in inception_outputs(batches, inception):
        pool.update(output.features)
        if reference.spatial_mean is not None:
            spatial.update(output.spatial)
        score.update(output.logits)
        if reference.features is not None:
            features.append(output.features.cpu())
    if pool.count <= len(pool.mean):
        warnings.warn(
            f"FID of {pool.count} samples is far too high, a singular covariance from fewer than {len(pool.mean) + 1}: "
            "compare it only with FID of as many samples; that of papers is of 50,000",
            stacklevel=2,
        )
    sfid = kid = kid_error = None
    fid = _distance(pool, reference.mean, reference.covariance)
    if reference.spatial_mean is not None:
        sfid = _distance(spatial, reference.spatial_mean, reference.spatial_covariance)
    if reference.features is not None:
        size = min(KID_SUBSET_SIZE, pool.count, len(reference.features))
        kid, kid_error = kernel_distance(torch.cat(features), reference.features, subset_size=size)
    return FidScores(fid, sfid, score.mean(), kid, kid_error, pool.count)


def _distance(samples: RunningGaussian, mean: Tensor, covariance: Tensor) -> float:
    return frechet_distance_of_statistics(samples.mean.cpu(), samples.covariance.cpu(), mean, covariance)


class _SplitScore:
    """Inception Score: exp of the mean divergence of each image's classes from the classes of its split."""

    def __init__(self):
        self.scores: list[float] = []
        self.count, self.probabilities, self.negative_entropies = 0, 0.0, 0.0  # sums over the split so far

    def update(self, logits: Tensor) -> None:
        """Take in logits (n, classes)."""
        log_probabilities = logits.double().log_softmax(1)
        while len(log_probabilities):
            part = log_probabilities[: SPLIT - self.count]
            log_probabilities = log_probabilities[len(part) :]
            self.count += len(part)
            self.probabilities = self.probabilities + part.exp().sum(0)
            self.negative_entropies = self.negative_entropies + (part.exp() * part).sum()
            if self.count == SPLIT:
                self._close()

    def mean(self) -> float:
        """Over all splits, the last and shorter one too."""
        if self.count:
            self._close()
        return sum(self.scores) / len(self.scores)

    def _close(self) -> None:
        classes = self.probabilities / self.count
        divergence = self.negative_entropies / self.count - torch.special.xlogy(classes, classes).sum()
        self.scores.append(math.exp(divergence.item()))
        self.count, self.probabilities, self.negative_entropies = 0, 0.0, 0.0
