"""What a few seeds can say about the difference of two models."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

CONFIDENCE = 0.95

Verdict = Literal["better", "level", "worse"]


@dataclass(frozen=True)
class Comparison:
    """How a model's distances, of which lower is better, differ from its baseline's, seed by seed.

    difference: mean over the seeds, negative where the model is the better one.
    standard_error: of that mean, from the spread of the differences.
    low, high: ends of its 95 % interval, Student's t of paired samples.
    seeds: how many pairs there are.
    """

    difference: float
    standard_error: float
    low: float
    high: float
    seeds: int

    @property
    def verdict(self) -> Verdict:
        """ "level" where the interval contains 0: no difference was shown."""
        if self.low <= 0 <= self.high:
            return "level"
        return "better" if self.high < 0 else "worse"

    @property
    def resolution(self) -> float:
        """Half the interval's width: what a difference must exceed to be shown."""
        return (self.high - self.low) / 2


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over seeds, unbiased variance; None of fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


def compare(values: Mapping[int, float], baseline: Mapping[int, float]) -> Comparison | None:
    """A model's distances by seed against its baseline's; None where they have fewer than two seeds in common.

    Runs of one seed see the same batches in the same order and sample from the same noise, which moves both alike: so
    they are compared in pairs (Student, "The probable error of a mean", 1908).
    """
    pairs = [(values[seed], baseline[seed]) for seed in sorted(values.keys() & baseline.keys())]
    if len(pairs) < 2:
        return None
    from scipy.stats import t  # comes with scikit-learn

    differences = [value - base for value, base in pairs]
    difference, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(pairs))
    reach = error * float(t.ppf((1 + CONFIDENCE) / 2, len(pairs) - 1))
    return Comparison(difference, error, difference - reach, difference + reach, len(pairs))
