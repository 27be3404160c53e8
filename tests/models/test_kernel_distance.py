"""The kernel distance: unbiased, with an error, and it tells spoiled samples from real ones."""

import pytest
import torch

from models.metrics import kernel_distance


def test_is_the_formula_over_one_subset_of_everything():
    a, b = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)

    def kernel(x, y):
        return ((x * y).sum() / 3 + 1) ** 3

    within = [sum(kernel(s[i], s[j]) for i in range(6) for j in range(6) if i != j) / 30 for s in (a, b)]
    between = sum(kernel(x, y) for x in a for y in b) / 36
    mean, error = kernel_distance(a, b, subsets=3, subset_size=6)
    assert mean == pytest.approx((within[0] + within[1] - 2 * between).item())
    assert error == pytest.approx(0, abs=1e-12), "three times the same rows"


def test_is_zero_on_average_for_one_distribution_and_positive_for_two():
    torch.manual_seed(0)
    same, error = kernel_distance(torch.randn(2000, 8), torch.randn(2000, 8))
    assert abs(same) < 3 * error / 10, "the mean of 100 subsets has a tenth of their deviation"
    shifted, error = kernel_distance(torch.randn(2000, 8), torch.randn(2000, 8) + 0.5)
    assert shifted > 3 * error


def test_does_not_depend_on_the_callers_generator():
    a, b = torch.randn(200, 4), torch.randn(200, 4)
    first = kernel_distance(a, b)
    torch.randn(3)
    assert kernel_distance(a, b) == first


@pytest.mark.parametrize(
    ("a", "options", "message"),
    [
        (torch.zeros(50, 4), {}, "subset_size must be from 2 to 50, the rows of the smaller set, got 100"),
        (torch.zeros(200, 4), {"subset_size": 1}, "subset_size must be from 2"),
        (torch.zeros(200, 4), {"subsets": 0}, "subsets must be at least 1"),
        (torch.zeros(200, 3), {}, "must have the same width, got 3 and 4"),
        (torch.full((200, 4), torch.nan), {}, "features_a holds NaN"),
    ],
)
def test_refuses(a, options, message):
    with pytest.raises(ValueError, match=message):
        kernel_distance(a, torch.zeros(200, 4), **options)
