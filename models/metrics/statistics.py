"""Mean and covariance of features that come in batches."""

import torch
from torch import Tensor


class RunningGaussian:
    """Mean and unbiased covariance of all rows seen so far, in float64, without keeping them.

    Each batch is centred by its own mean before its squares are summed, so that features far from zero lose no digits;
    the same rows in other batches agree to rounding.

    Source: T. Chan, G. Golub and R. LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances" (1979).
    """

    def __init__(self):
        self.count = 0
        self.mean: Tensor | None = None  # (D,), None before the first row
        self._scatter: Tensor | None = None  # (D, D), sum of the centred rows' outer products

    def update(self, features: Tensor) -> None:
        """Take in features (n, D), float, n at least 1, D and the device as in the first call.

        Raises:
            ValueError: another shape, or values that are not finite.
        """
        width = "D" if self.mean is None else len(self.mean)
        if features.ndim != 2 or 0 in features.shape or width not in ("D", features.shape[1]):
            raise ValueError(f"features must be (n, {width}) with at least one row, got shape {tuple(features.shape)}")
        if not features.isfinite().all():
            raise ValueError("features hold NaN or infinity: look for them in the extractor's weights")
        features = features.detach().double()
        mean = features.mean(0)
        centred = features - mean
        scatter = centred.mT @ centred
        if not self.count:
            self.count, self.mean, self._scatter = len(features), mean, scatter
            return
        total, shift = self.count + len(features), mean - self.mean
        self._scatter = self._scatter + scatter + torch.outer(shift, shift) * (self.count * len(features) / total)
        self.mean = self.mean + shift * (len(features) / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, unbiased.

        Raises:
            ValueError: fewer than 2 rows so far.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, got {self.count}")
        return self._scatter / (self.count - 1)
