"""Edges of the CUDA kernels that a change of one comparison or constant in csrc/ would move unnoticed elsewhere: sizes
about those of a warp, a block and a chunk, memory that must not be read or written, numbers far from 1."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from diffmoe_kernels import Routing, cuda_support, ops
from diffmoe_kernels.testing import assert_close, poisoned_allocations, random_topk, value_and_grads
from diffmoe_kernels.triton_support import HAS_TRITON
from tests.ops.test_permute import permute_loop, unpermute_loop, with_gates
from tests.ops.test_router_topk_kernels import check, run

if not HAS_TRITON:
    pytest.skip("the helpers need triton", allow_module_level=True)
from tests.ops.test_token_drop_triton import assert_same

pytestmark = pytest.mark.skipif(not cuda_support.ON_CPU, reason="the extension is not built for the CPU")
BOTH = ("cuda", "reference")
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
each_rule = pytest.mark.parametrize("rule", ["pool", "token"])


@pytest.mark.parametrize("width", [6, 8])
def test_more_rows_of_a_token_than_are_in_flight(width):
    ids, weights = random_topk(7, 12, 9)
    routing = Routing.from_topk(ids, weights.float(), 12)
    rows, x = torch.randn(63, width), torch.randn(7, width)
    assert_close(ops.unpermute(rows, routing, backend="cuda"), unpermute_loop(rows, weights.float(), ids))
    ours = value_and_grads(lambda x: ops.permute(x, routing, backend="cuda"), x=x)
    assert_close(ours["grad of x"], value_and_grads(lambda x: permute_loop(x, ids), x=x)["grad of x"])


def test_rows_past_the_count_have_no_gradient():
    ids, weights = random_topk(8, 3, 2, kind="dropped")
    routing = Routing.from_topk(ids, weights.float(), 3)
    count = int(routing.group_offsets[-1])
    rows = torch.randn(16, 4)
    rows[count:] = torch.nan
    with poisoned_allocations():
        found = value_and_grads(
            lambda rows, gates: ops.unpermute(rows, with_gates(routing, gates), backend="cuda"),
            rows=rows,
            gates=routing.gates,
        )
    assert found["output"].isfinite().all()
    assert not found["grad of gates"][count:].any() and not found["grad of rows"][count:].any()


@pytest.mark.parametrize("ids", [[[0], [1], [1]], [[-1], [-1], [-1]]])
def test_no_index_past_the_count_or_before_the_first_is_read(ids):
    """What lies there would lead out of x."""
    routing = Routing.from_topk(torch.tensor(ids), torch.ones(3, 1), 2)
    count = int(routing.group_offsets[-1])
    indices = torch.full((5,), 2**30, dtype=torch.int32)
    indices[1 : 1 + count] = routing.token_indices[:count]
    among = Routing(indices[1:4], routing.gates, routing.group_offsets, routing.token_offsets, routing.token_rows)
    x = torch.randn(3, 4)
    assert torch.equal(ops.permute(x, among, backend="cuda")[:count], x[routing.token_indices[:count].long()])


@each_dtype
def test_unpermuted_rows_that_begin_at_no_16_bytes(dtype):
    ids, weights = random_topk(7, 5, 3, kind="dropped")
    routing = Routing.from_topk(ids, weights.float(), 5)
    rows = torch.randn(21 * 8 + 1).to(dtype)[1:].view(21, 8).requires_grad_()
    grad = torch.randn(7, 8).to(dtype)
    results = []
    for backend in BOTH:
        y = ops.unpermute(rows, routing, backend=backend)
        results.append((y, *torch.autograd.grad(y, rows, grad)))
    for ours, expected in zip(*results, strict=True):
        assert_close(ours, expected)


@pytest.mark.parametrize("fill", [0.0, -1.05, -math.inf])
def test_masked_groups_that_win(fill):
    """Filled with 0 they are above all that is not masked; no expert past the last is."""
    options = {"expert_bias": torch.tensor([-1.0, -1.1, -1.2, -1.3, -2.0, -2.0]), "masked_group_fill": fill}
    check("cuda", torch.zeros(3, 6), 4, num_groups=3, top_groups=2, **options)
    check("cuda", torch.zeros(3, 6), 2, num_groups=3, top_groups=1, **options)


def test_softmax_of_logits_far_from_0():
    for offset in (-300.0, 300.0):
        check("cuda", torch.randn(35, 10) + offset, 3, score_function="softmax")
    logits = torch.randn(35, 48)
    logits[:, 40] += 200
    check("cuda", logits, 1, score_function="softmax")


def assert_same_gradients(logits: torch.Tensor, top_k: int) -> None:
    grads = []
    for backend in BOTH:
        leaf = logits.clone().requires_grad_()
        run(backend, leaf, top_k)["topk_weights"].square().sum().backward()
        grads.append(leaf.grad)
    assert_close(*grads)


@pytest.mark.parametrize("offset", [-40.0, -200.0])
def test_normalised_weights_of_tiny_scores(offset):
    logits = torch.randn(35, 10) + offset
    check("cuda", logits, 3)
    assert_same_gradients(logits, 3)


def test_weights_normalised_and_scaled():
    check("cuda", torch.randn(37, 12), 2, scaling_factor=2.5)


@pytest.mark.parametrize("num_experts", [32, 33, 64, 65, 128, 129])
def test_experts_of_a_lane(num_experts):
    logits = torch.randn(5, num_experts)
    logits[:, -1] += 5
    check("cuda", logits, 3)


def test_gradient_of_more_choices_than_a_warp():
    assert_same_gradients(torch.randn(5, 64), 40)


def assert_same_drop(scores: torch.Tensor, capacity: int, **options: object) -> None:
    assert_same(*(ops.token_drop(scores, capacity, **options, backend=backend) for backend in BOTH))


def assert_same_prediction(*args: torch.Tensor, **options: object) -> None:
    (ours, dropped), (expected, count) = (
        ops.token_drop_predicted(*args, **options, backend=backend) for backend in BOTH
    )
    assert_same(ours, expected)
    assert torch.equal(dropped, count)


@each_rule
def test_a_prediction_at_its_threshold_does_not_pass(rule):
    logits = torch.zeros(40, 2)  # whose sigmoid is 0.5
    logits[::3] = 1.0
    logits[:, 1] = 40.0  # 1
    assert_same_prediction(torch.rand(40, 2), logits, torch.tensor([0.5, 1.0]), rule=rule)


@each_rule
def test_predicted_of_more_experts_than_a_warp(rule):
    args = torch.rand(20, 70), torch.randn(20, 70), torch.linspace(0, 1, 70)
    for most in (20, 5):
        assert_same_prediction(*args, rule=rule, max_capacity=most)


def test_gates_past_the_count_are_0():
    with poisoned_allocations():
        assert_same_prediction(torch.rand(61, 3), torch.randn(61, 3), torch.tensor([0.0, 1.0, 0.5]))


@pytest.mark.parametrize("num_tokens", [16384, 16385, 17000])
def test_the_first_and_the_last_token_are_chosen(num_tokens):
    """In each of the ways to hold keys."""
    scores = torch.rand(num_tokens, 2)
    scores[-1] = scores[0] = 2.0
    assert_same_drop(scores, 5)


def test_a_long_pool_ends_before_the_next_ones_best():
    scores = torch.rand(2 * 17408, 1)
    scores[17408] = 9.0
    assert_same_drop(scores, 5, num_pools=2)


def test_chunks_that_are_chosen_or_tie_as_a_whole():
    for scores in (torch.zeros(70000, 1), torch.arange(70000.0, 0, -1)[:, None]):
        assert_same_drop(scores, 30000)


def test_every_warp_of_a_block_is_summed():
    assert_same_prediction(torch.rand(1100, 2), torch.randn(1100, 2), torch.tensor([0.0, 0.5]))
    assert_same_drop(torch.randn(300, 256), 50)


def test_nothing_is_written_past_the_scores_gradient():
    routing = ops.token_drop(torch.rand(61, 3), 20, backend="cuda")
    grad_scores = torch.full((61 * 3 + 1,), 7.0)
    tensors = routing.gates, routing.group_offsets, routing.token_offsets, routing.token_rows, grad_scores
    cuda_support.extension.token_drop_bwd(*(one.data_ptr() for one in tensors), 61, 3, 0, 0)
    assert grad_scores[-1] == 7.0


def test_sizes_that_are_refused():
    most = 65280 * 256
    assert cuda_support.extension.token_drop_chunks(most) == 256
    for size in (0, most + 1):
        with pytest.raises(ValueError, match=f"pool_size: expected 1 to {most}, got {size}"):
            cuda_support.extension.token_drop_chunks(size)
    with pytest.raises(ValueError, match="2147483648"):
        cuda_support.extension.token_choice_drop_fwd(0, 0, 0, 0, 2**31, 1, 1, False, 0, 0)


def test_a_pool_past_what_the_kernels_count():
    """A reason for "auto" to take another way, before anything is allocated; smaller pools of as many tokens fit."""
    token_drop = importlib.import_module("diffmoe_kernels.ops.token_drop")  # not the function
    scores = torch.zeros(1, 1).expand(token_drop.MAX_POOL + 2, 1)
    for call in (
        lambda: ops.token_drop(scores, 1, backend="cuda"),
        lambda: ops.token_drop_predicted(scores, scores, torch.zeros(1), max_capacity=1, backend="cuda"),
    ):
        with pytest.raises(NotImplementedError, match="pools of up to 16711680 tokens, not 16711682"):
            call()
    assert token_drop._why_not_drop("cuda", scores, 1, 2) is None


@pytest.mark.parametrize("capacity", [2**31, 2**32 + 1, 2**40])
def test_a_capacity_beyond_int32(capacity):
    ids, scores = torch.randint(3, (41, 3)), torch.rand(41, 3)
    ours, count = ops.token_choice_drop(ids, scores, 3, capacity, backend="cuda")
    assert torch.equal(ours, ids) and count == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_choices_in_no_run_of_16_bytes_in_one_and_beside_it(dtype):
    for size in (*range(1, 10), 4096 * 4 + 4, 4096 * 2 + 2):
        ids, scores = torch.zeros(size, 1, dtype=dtype), torch.rand(size, 1)
        ours, expected = (ops.token_choice_drop(ids, scores, 1, 1, backend=backend) for backend in BOTH)
        assert all(map(torch.equal, ours, expected)), size
    ours, count = ops.token_choice_drop(ids[:5], torch.full((5, 1), math.nan), 1, 0, backend="cuda")
    assert ours.eq(-1).all() and count == 5
