"""What a few seeds are taken to say about two models."""

import math

import numpy as np
import pytest

from benchmarks.parity.statistics import compare, spread


def by_seed(distances):
    return dict(enumerate(distances))


def test_the_interval_is_of_pairs():
    ttest = pytest.importorskip("scipy.stats").ttest_rel
    for a, b in [([1.0, 1.2, 0.9], [0.5, 0.6, 0.9]), ([3.0, 3.1, 2.7, 2.9], [2.0, 2.4, 2.2, 2.1])]:
        expected = ttest(a, b).confidence_interval(0.95)
        found = compare(by_seed(a), by_seed(b))
        assert found.difference == pytest.approx(np.mean(a) - np.mean(b)) and found.seeds == len(a)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
        assert found.standard_error == pytest.approx(np.std(np.subtract(a, b), ddof=1) / math.sqrt(len(a)))


def test_pairs_are_of_one_seed():
    """In whatever order they come; a seed that one of them lacks says nothing."""
    found = compare({2: 1.3, 0: 1.0, 7: 9.0}, {0: 0.5, 1: 8.0, 2: 0.6})
    assert found.seeds == 2 and found.difference == pytest.approx(0.6)


def test_what_a_seed_does_to_both_is_no_difference_of_the_models():
    """Far apart between seeds, and always worse by about as much."""
    found = compare(by_seed([1.60, 1.87, 1.88]), by_seed([1.39, 1.62, 1.57]))
    assert found.verdict == "worse" and (found.low, found.high) == pytest.approx((0.131, 0.382), abs=2e-2)


@pytest.mark.parametrize(
    ("values", "baseline", "verdict"),
    [
        ([0.70, 0.75, 0.80], [0.72, 0.78, 0.76], "level"),
        ([0.50, 0.52, 0.51], [0.72, 0.73, 0.74], "better"),
        ([0.72, 0.73, 0.74], [0.50, 0.52, 0.51], "worse"),
        ([0.5, 0.5], [0.5, 0.5], "level"),
        ([0.4, 0.4], [0.5, 0.5], "better"),
    ],
)
def test_verdicts(values, baseline, verdict):
    assert compare(by_seed(values), by_seed(baseline)).verdict == verdict


def test_three_seeds_tell_no_small_difference():
    found = compare(by_seed([0.9, 1.0, 1.1]), by_seed([1.0, 1.2, 1.1]))
    assert found.verdict == "level" and found.resolution == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)


def test_one_seed_has_no_spread():
    assert compare({0: 0.5}, {0: 0.6, 1: 0.7}) is None and compare({0: 0.5, 1: 0.6}, {}) is None
    assert spread([0.5]) is None and spread([0.5, 0.7]) == pytest.approx(0.1 * math.sqrt(2))
