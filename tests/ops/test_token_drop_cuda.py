"""What only the CUDA kernels of `token_drop` have: any order of threads, keys beyond registers, launches."""

from __future__ import annotations

import math

import pytest
import torch

from diffmoe_kernels import ops
from diffmoe_kernels.cuda_support import ON_CPU, extension
from diffmoe_kernels.ops.token_drop import _library
from diffmoe_kernels.testing import poisoned_allocations
from tests.ops.backends import CUDA
from tests.ops.test_token_drop_triton import KINDS, assert_same, scores_like

pytestmark = [pytest.mark.skipif(not ON_CPU, reason="runs on the extension built for a CPU"), *CUDA.marks]


@pytest.fixture(params=[0, -1, 1], ids=["in order", "backwards", "shuffled"])
def order(request):
    """Of a block's threads and of the blocks, up to where they wait for each other."""
    extension.set_thread_order(request.param)
    yield request.param
    extension.set_thread_order(0)


@pytest.mark.parametrize(
    "pool_size, num_pools, num_experts, capacity",
    [(1, 1, 1, 1), (2, 3, 5, 1), (61, 1, 2, 20), (61, 1, 1, 61), (37, 2, 1, 0), (300, 2, 9, 50)],
)
def test_token_drop_is_the_references_choice(pool_size, num_pools, num_experts, capacity, order):
    dtypes = 2 * (torch.float32, torch.bfloat16, torch.float16)
    for kind, dtype in zip(KINDS, dtypes, strict=True):
        scores = scores_like(kind, pool_size * num_pools, num_experts).to(dtype)
        with poisoned_allocations():
            ours = ops.token_drop(scores, capacity, num_pools=num_pools, backend="cuda")
        assert_same(ours, ops.token_drop(scores, capacity, num_pools=num_pools, backend="reference"))


@pytest.mark.parametrize("rule", ["pool", "token"])
@pytest.mark.parametrize("num_tokens, max_capacity", [(1, 1), (61, 61), (600, 200), (30, 0)])
def test_predicted_is_the_references_choice(num_tokens, max_capacity, rule, order):
    thresholds = torch.tensor([0.0, 1.0, 0.5])
    for kind in KINDS:
        arguments = scores_like(kind, num_tokens, 3), 3 * torch.randn(num_tokens, 3), thresholds
        options = {"rule": rule, "max_capacity": max_capacity}
        with poisoned_allocations():
            ours, dropped = ops.token_drop_predicted(*arguments, **options, backend="cuda")
        expected, count = ops.token_drop_predicted(*arguments, **options, backend="reference")
        assert_same(ours, expected)
        assert torch.equal(dropped, count) and dropped.dtype == torch.int64


@pytest.mark.parametrize("num_tokens", [16384, 16385, 70000])
@pytest.mark.parametrize("kind", ["random", "ties"])
def test_more_tokens_than_registers_hold(num_tokens, kind, order):
    """16 keys a thread at most; and chunks of 512 tokens, beyond 256 of 256."""
    scores = scores_like(kind, num_tokens, 2)
    assert_same(*(ops.token_drop(scores, num_tokens // 3, backend=backend) for backend in ("cuda", "reference")))


def test_256_experts_and_one_more():
    scores = torch.randn(40, 256)
    assert_same(*(ops.token_drop(scores, 7, backend=backend) for backend in ("cuda", "reference")))
    with pytest.raises(NotImplementedError, match="the kernels take up to 256 experts, not 257"):
        ops.token_drop(torch.randn(4, 257), 1, backend="cuda")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
@pytest.mark.parametrize(
    "num_tokens, num_experts, top_k, capacity", [(1, 1, 1, 0), (70, 6, 2, 20), (700, 4, 3, 500), (700, 4, 3, 0)]
)
def test_choices_past_the_capacity(num_tokens, num_experts, top_k, capacity, dtype, order):
    """A token may name an expert twice, and some slots are dropped already."""
    for kind in KINDS:
        ids = torch.randint(-1, num_experts + 2, (num_tokens, top_k), dtype=dtype)
        scores = scores_like(kind, num_tokens, top_k)
        ours, count = ops.token_choice_drop(ids, scores, num_experts, capacity, backend="cuda")
        expected, right = ops.token_choice_drop(ids, scores, num_experts, capacity, backend="reference")
        assert ours.dtype == dtype and torch.equal(ours, expected) and torch.equal(count, right)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("most", [10240, 10241, 12000])
def test_more_choices_of_one_expert_than_a_block_holds(most, dtype):
    others = 11
    ids, scores = torch.zeros(most + others, 1, dtype=dtype), torch.randint(9, (most + others, 1)).bfloat16()
    ids[: 1000 * others : 1000] = 1
    for capacity in (1, 6000, 10230, 10240):
        ours, expected = (
            ops.token_choice_drop(ids, scores, 2, capacity, backend=backend) for backend in ("cuda", "reference")
        )
        assert all(map(torch.equal, ours, expected)), capacity


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_choices_at_any_address(dtype):
    ids, scores = torch.randint(-1, 3, (41, 3), dtype=dtype), torch.rand(41, 3)
    for first in range(3):
        own = ids[first:], scores[first:]
        ours, expected = (ops.token_choice_drop(*own, 3, 7, backend=backend) for backend in ("cuda", "reference"))
        assert all(map(torch.equal, ours, expected)), first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_of_the_scores(dtype):
    scores = torch.rand(61, 3).to(dtype).requires_grad_()
    weights = torch.randn(60)
    grads = []
    for backend in ("cuda", "reference"):
        with poisoned_allocations():
            gates = ops.token_drop(scores, 20, backend=backend).gates
            grads += torch.autograd.grad(gates, scores, weights)
    assert grads[0].dtype == dtype and torch.equal(*grads)


def test_gradient_that_arrives_past_the_count_is_not_read():
    scores = torch.rand(20, 2, requires_grad=True)
    routing, _ = ops.token_drop_predicted(scores, torch.randn(20, 2), torch.full((2,), 0.5), backend="cuda")
    count = int(routing.group_offsets[-1])
    assert 0 < count < 40
    weights = torch.ones(40)
    weights[count:] = math.nan
    routing.gates.backward(weights)
    assert scores.grad.isfinite().all() and scores.grad.sum() == count


def test_launches():
    scores, logits = torch.rand(61, 3, requires_grad=True), torch.randn(61, 3)
    extension.take_launched()
    routing = ops.token_drop(scores, 20, backend="cuda")
    assert extension.take_launched() == ["token_drop_cut", "token_drop_place"]
    routing.gates.sum().backward()
    assert extension.take_launched() == ["token_drop_bwd"]
    ops.token_drop_predicted(scores, logits, torch.rand(3), backend="cuda")
    assert extension.take_launched() == ["token_drop_cut", "token_drop_place"]
    ops.token_choice_drop(torch.randint(3, (61, 2)), torch.rand(61, 2), 3, 10, backend="cuda")
    assert extension.take_launched() == ["token_choice_drop"]


def test_opcheck():
    scores, logits, thresholds = torch.rand(8, 3, requires_grad=True), torch.randn(8, 3), torch.rand(3)
    torch.library.opcheck(_library._token_drop.overload, (scores, 2, 2, "cuda"))
    torch.library.opcheck(_library._token_drop.overload, (scores, 0, 1, "cuda"))
    torch.library.opcheck(_library._token_drop_predicted.overload, (scores, logits, thresholds, 6, True, "cuda"))
    routing = ops.token_drop(scores.detach(), 2)
    maps = routing.group_offsets, routing.token_offsets, routing.token_rows
    torch.library.opcheck(_library._token_drop_backward.overload, (routing.gates, *maps, torch.bfloat16, "cuda"))
    ids = torch.randint(3, (8, 2))
    torch.library.opcheck(_library._token_choice_drop.overload, (ids, torch.rand(8, 2), 3, 4, "cuda"))
