"""What a few seeds can say about the difference of two models."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

CONFIDENCE = 0.95

Verdict = Literal["better", "level", "worse"]


@dataclass(frozen=True)
class Comparison:
    """The difference of two means of distances, of which lower is better, and what it is worth.

    difference: of the means, negative where the model is the better one.
    standard_error: of the difference, from the spread over the seeds of both.
    low, high: ends of its 95 % interval (Welch's t interval).
    """

    difference: float
    standard_error: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """ "level" where the interval holds 0: the seeds alone make as much of a difference."""
        if self.low <= 0 <= self.high:
            return "level"
        return "better" if self.high < 0 else "worse"

    @property
    def resolution(self) -> float:
        """How large a difference would have to be to be told from none."""
        return (self.high - self.low) / 2


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over seeds, unbiased variance; None of fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


def compare(values: Sequence[float], baseline: Sequence[float]) -> Comparison | None:
    """Distances of a model's seeds against those of its baseline's; None where either has fewer than two.

    Source: B. Welch, "The generalization of Student's problem when several different population variances are
    involved" (1947).
    """
    if min(len(values), len(baseline)) < 2:
        return None
    from scipy.stats import t  # comes with scikit-learn

    parts = [statistics.variance(each) / len(each) for each in (values, baseline)]
    difference, error = statistics.mean(values) - statistics.mean(baseline), math.sqrt(sum(parts))
    if error == 0:
        return Comparison(difference, 0.0, difference, difference)
    shares = [part**2 / (len(each) - 1) for part, each in zip(parts, (values, baseline), strict=True)]
    reach = error * float(t.ppf((1 + CONFIDENCE) / 2, sum(parts) ** 2 / sum(shares)))
    return Comparison(difference, error, difference - reach, difference + reach)
