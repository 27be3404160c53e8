"""Routing of given choices and their capacity on a GPU, at real sizes: the definitions' bits, gradients, graphs."""

from __future__ import annotations

import pytest
import torch

from diffmoe_kernels import ops
from diffmoe_kernels.triton_support import HAS_TRITON

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_TRITON, reason="needs triton")]
SIZES = [(65536, 48, 5), (16384, 16, 2), (4096, 256, 8), (262144, 8, 1), (1001, 5, 3), (1, 1, 1)]
FIELDS = ("token_indices", "gates", "group_offsets", "token_offsets", "token_rows")


def choices(num_tokens: int, num_experts: int, top_k: int, dropped: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    scores = torch.rand(num_tokens, num_experts, device="cuda", generator=generator)
    weights, ids = scores.topk(top_k)
    is_dropped = torch.rand(ids.shape, device="cuda", generator=generator) < dropped
    return ids.int().masked_fill(is_dropped, -1), weights


@pytest.mark.parametrize("dropped", [0.0, 0.3])
@pytest.mark.parametrize("sizes", SIZES)
def test_routing(sizes, dropped) -> None:
    ids, weights = choices(*sizes, dropped)
    results = []
    for backend in ("triton", "reference"):
        leaf = weights.clone().requires_grad_()
        routing = ops.routing_from_topk(ids, leaf, sizes[1], backend=backend)
        (grad,) = torch.autograd.grad(routing.gates.square().sum(), leaf)
        results.append([*(getattr(routing, field) for field in FIELDS), grad])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("factor", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_drop(sizes, ties, factor) -> None:
    ids, weights = choices(*sizes, 0.1)
    scores = weights.mul(8).round() if ties else weights
    capacity = int(sizes[0] * sizes[2] / sizes[1] * factor)
    ours = ops.token_choice_drop(ids, scores, sizes[1], capacity, backend="triton")
    right = ops.token_choice_drop(ids, scores, sizes[1], capacity, backend="reference")
    assert all(torch.equal(one, other) for one, other in zip(ours, right, strict=True))


def test_they_wait_for_nothing_and_fit_in_a_graph() -> None:
    ids, weights = choices(65536, 48, 5, 0.0)

    def step() -> tuple[torch.Tensor, ...]:
        kept, count = ops.token_choice_drop(ids, weights, 48, 5000, backend="triton")
        routing = ops.routing_from_topk(kept, weights, 48, backend="triton")
        return kept, count, *(getattr(routing, field) for field in FIELDS)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = [one.clone() for one in step()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for one in results:
        one.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))
