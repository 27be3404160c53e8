"""The helpers themselves must be able to fail."""

import pytest
import torch
import torch.nn.functional as F

from diffmoe_kernels import Routing
from diffmoe_kernels.testing import (
    ROUTING_KINDS,
    assert_close,
    assert_error_within,
    check_accuracy,
    poisoned_allocations,
    random_topk,
    relative_error,
    value_and_grads,
)


def test_assert_close_tells_what_differs():
    x = torch.randn(8, 8)
    assert_close(x * (1 + 1e-7), x)
    assert_close(x.bfloat16(), x, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="y: relative error"):
        assert_close(x * (1 + 1e-5), x, name="y")
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(x.nextafter(x + 1), x, tolerance=0)
    with pytest.raises(AssertionError, match=r"shape \(64,\), expected \(8, 8\)"):
        assert_close(x.flatten(), x)
    with pytest.raises(AssertionError, match=r"torch.bfloat16, expected torch.float32"):
        assert_close(x.bfloat16(), x)
    with pytest.raises(AssertionError, match="1 of 64 elements are not finite"):
        assert_close(x.where(x != x[0, 0], torch.nan), x)
    with pytest.raises(AssertionError, match=r"got \[1, 2\], expected \[1, 3\]"):
        assert_close(torch.tensor([1, 2]), torch.tensor([1, 3]))


def test_relative_error_is_a_ratio_of_norms():
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0


def test_assert_error_within_allows_factor_times_the_plain_error():
    exact = torch.randn(1000, dtype=torch.float64)
    plain = (exact * (1 + 1e-4)).float()
    assert_error_within((exact * (1 + 1.9e-4)).float(), plain, exact)
    with pytest.raises(AssertionError, match=r"error 0.00021 against float64, plain torch.float32 has 0.0001"):
        assert_error_within((exact * (1 + 2.1e-4)).float(), plain, exact)
    assert_error_within(exact.bfloat16(), exact.bfloat16(), exact)
    integers = torch.arange(1000, dtype=torch.float64)
    assert_error_within(integers.float() * (1 + 2**-24), integers.float(), integers)  # the floor: plain is exact
    with pytest.raises(AssertionError, match="not finite"):
        assert_error_within(torch.full((1000,), torch.nan), plain, exact)


def test_check_accuracy_sees_a_wrong_gradient():
    inputs = {"x": torch.randn(16, 16), "w": torch.randn(16, 16)}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check_accuracy(lambda x, w: x @ w, lambda x, w: x @ w, dtype, inputs)
        with pytest.raises(AssertionError, match="grad of w"):
            check_accuracy(lambda x, w: x @ w.detach(), lambda x, w: x @ w, dtype, inputs)


def test_value_and_grads_keeps_strides_and_fills_missing_gradients():
    seen = []

    def function(x, unused):
        seen.append(x.stride())
        return 2 * x

    out = value_and_grads(function, x=torch.randn(4, 3).t(), unused=torch.randn(2))
    assert seen == [(1, 3)]
    assert out["grad of unused"].tolist() == [0, 0]
    assert out["grad of x"].shape == (3, 4)


def test_poison_reaches_allocations_inside_operators_and_is_taken_back():
    x = torch.randn(64, 16, dtype=torch.bfloat16)
    w = torch.randn(2, 16, 16, dtype=torch.bfloat16)
    before = torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ZeroDivisionError), poisoned_allocations():
        for allocated in (torch.empty(3), torch.empty_like(x), x.new_empty(3), torch.empty_strided((3,), (1,))):
            assert allocated.isnan().all()
        assert torch.empty(3, dtype=torch.int32).tolist() == [2**31 - 1] * 3
        past = F.grouped_mm(x, w, offs=torch.tensor([3, 10], dtype=torch.int32))[10:]  # allocated inside ATen
        assert past.isnan().all()
        _ = 1 / 0
    assert torch.are_deterministic_algorithms_enabled() == before


@pytest.mark.parametrize("kind", ROUTING_KINDS)
def test_random_topk_gives_distinct_experts_of_its_kind(kind):
    ids, weights = random_topk(200, 6, 2, kind=kind, generator=torch.Generator().manual_seed(1))
    assert ids.shape == weights.shape == (200, 2)
    assert ((ids[:, 0] != ids[:, 1]) | (ids[:, 0] < 0)).all()
    sizes = Routing.from_topk(ids, weights, 6).group_sizes.tolist()
    assert (sum(sizes) < 400) == (kind == "dropped")
    assert (sizes[0] > 2 * sizes[4]) == (kind == "skewed")
    assert (sizes[5] == 200) == (kind == "one_expert")
    assert (sizes[1::2] == [0, 0, 0]) == (kind == "empty_experts")


def test_random_topk_rejects_bad_input():
    with pytest.raises(ValueError, match="kind: expected one of 'balanced'.* got 'even'"):
        random_topk(4, 4, 2, kind="even")
    with pytest.raises(ValueError, match="top_k: expected 0 to 2 for kind 'empty_experts' of 4 experts, got 3"):
        random_topk(4, 4, 3, kind="empty_experts")
