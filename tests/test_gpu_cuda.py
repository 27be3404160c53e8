"""The CUDA extension on a GPU: real sizes, streams, graphs, no bad address, no race, and what a launch costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from diffmoe_kernels import Routing, ops
from diffmoe_kernels.cuda_support import HAS_CUDA, extension, not_loaded
from diffmoe_kernels.testing import assert_close, poisoned_allocations
from tests.sanitizer import sanitized

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason=f"the extension is {not_loaded}")]
SHAPES = {  # T, D, E, K
    "DSMoE-L-E48": (16384, 1024, 48, 5),
    "DSMoE-S-E48": (65536, 384, 48, 5),
    "DSMoE-3B-E16": (16384, 1152, 16, 2),
    "odd": (10007, 333, 7, 3),
    "many": (262144, 64, 256, 2),
}


def fields(routing: Routing) -> list[Tensor]:
    return [getattr(routing, field.name) for field in dataclasses.fields(routing)]


def routing_of(num_tokens: int, num_experts: int, top_k: int) -> Routing:
    weights, ids = torch.rand(num_tokens, num_experts, device="cuda").topk(top_k)
    return Routing.from_topk(ids, weights, num_experts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
def test_movement(name: str, dtype: torch.dtype) -> None:
    num_tokens, width, num_experts, top_k = SHAPES[name]
    routing = routing_of(num_tokens, num_experts, top_k)
    x = torch.randn(num_tokens, width, device="cuda", dtype=dtype)
    results = {}
    for backend in ("cuda", "reference"):
        leaf, gates = x.clone().requires_grad_(), routing.gates.detach().requires_grad_()
        with poisoned_allocations():
            rows = ops.permute(leaf, routing, backend=backend)
            y = ops.unpermute(rows, dataclasses.replace(routing, gates=gates), backend=backend)
            results[backend] = rows, y, *torch.autograd.grad(y, (leaf, gates), x)
    ours, right = results.values()
    assert torch.equal(ours[0], right[0])
    for one, other in zip(ours[1:], right[1:], strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("num_pools", [1, 64])
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(16384, 8), (65536, 16), (262144, 16), (262144, 256)])
def test_choice(num_tokens: int, num_experts: int, num_pools: int) -> None:
    scores = torch.randn(num_tokens, num_experts, device="cuda").bfloat16()  # with many ties
    capacity = num_tokens // num_pools // num_experts
    ours, right = (
        ops.token_drop(scores, capacity, num_pools=num_pools, backend=backend) for backend in ("cuda", "reference")
    )
    for one, other in zip(fields(ours), fields(right), strict=True):
        assert torch.equal(one, other)
    logits, thresholds = torch.randn_like(scores), torch.full((num_experts,), 0.9, device="cuda")
    for rule in ("pool", "token"):
        found = [
            ops.token_drop_predicted(
                scores, logits, thresholds, rule=rule, max_capacity=num_tokens // 4, backend=backend
            )
            for backend in ("cuda", "reference")
        ]
        assert torch.equal(found[0][1], found[1][1])
        for one, other in zip(fields(found[0][0]), fields(found[1][0]), strict=True):
            assert torch.equal(one, other)


def test_choices_past_the_capacity() -> None:
    weights, ids = torch.rand(65536, 48, device="cuda").bfloat16().topk(5)
    ours, right = (ops.token_choice_drop(ids, weights, 48, 5000, backend=name) for name in ("cuda", "reference"))
    assert torch.equal(ours[0], right[0]) and torch.equal(ours[1], right[1])


STEPS = ("movement", "odd movement", "router", "grouped router", "choice", "long choice", "predicted", "dropped")


def steps(seed: int) -> dict[str, Callable[[], list[Tensor]]]:
    """Each op forward and backward on inputs of its own."""
    torch.manual_seed(seed)
    routing = routing_of(4096, 48, 5)
    x = torch.randn(4096, 256, device="cuda", requires_grad=True)
    odd = torch.randn(4096 * 333 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(4096, 333).requires_grad_()
    logits = torch.randn(4096, 48, device="cuda", requires_grad=True)
    scores = torch.rand(4096, 8, device="cuda", requires_grad=True)
    long = torch.rand(40960, 8, device="cuda", requires_grad=True)
    bias, thresholds = torch.randn(48, device="cuda"), torch.full((8,), 0.8, device="cuda")
    predictions, ids = torch.randn(4096, 8, device="cuda"), torch.randint(-1, 48, (4096, 5), device="cuda")
    weights = torch.rand(4096, 5, device="cuda")

    def movement(x: Tensor) -> list[Tensor]:
        y = ops.unpermute(ops.permute(x, routing, backend="cuda"), routing, backend="cuda")
        return [y, *torch.autograd.grad(y, x, x.detach())]

    def router(**options: object) -> list[Tensor]:
        out = ops.router_topk(logits, 5, **options, backend="cuda")
        return [*fields(out.routing), *torch.autograd.grad(out.routing.gates.square().sum(), logits)]

    def choice(scores: Tensor, num_pools: int) -> list[Tensor]:
        capacity = len(scores) // num_pools // 8
        routing = ops.token_drop(scores, capacity, num_pools=num_pools, backend="cuda")
        return [*fields(routing), *torch.autograd.grad(routing.gates.square().sum(), scores)]

    def predicted(rule: str) -> list[Tensor]:
        arguments = scores, predictions, thresholds
        routing, dropped = ops.token_drop_predicted(*arguments, rule=rule, max_capacity=700, backend="cuda")
        return [*fields(routing), dropped, *torch.autograd.grad(routing.gates.square().sum(), scores)]

    def dropped() -> list[Tensor]:
        found = [ops.token_choice_drop(ids, weights, 48, capacity, backend="cuda") for capacity in (0, 300)]
        return [one for pair in found for one in pair]

    grouped = {"expert_bias": bias, "num_groups": 4, "top_groups": 2, "score_function": "softmax"}
    made = (
        partial(movement, x),
        partial(movement, odd),
        router,
        partial(router, **grouped),
        partial(choice, scores, 16),
        partial(choice, long, 1),
        lambda: [*predicted("pool"), *predicted("token")],
        dropped,
    )
    return dict(zip(STEPS, made, strict=True))


@pytest.mark.parametrize("num_experts", [16, 100, 256])
@pytest.mark.parametrize("options", [{}, {"score_function": "softmax", "num_groups": 4, "top_groups": 2}])
def test_gradients_of_the_router(num_experts: int, options: dict) -> None:
    logits, bias = torch.randn(30000, num_experts, device="cuda"), torch.randn(num_experts, device="cuda")
    results = []
    for backend in ("cuda", "reference"):
        leaf = logits.clone().requires_grad_()
        out = ops.router_topk(leaf, 4, expert_bias=bias, **options, backend=backend)
        loss = out.routing.gates.square().sum() + out.topk_weights.sin().sum() + out.router_scores.square().sum()
        results.append((out.topk_ids, *fields(out.routing)[2:], *torch.autograd.grad(loss, leaf)))
    same = (results[0][0] == results[1][0]).all(1)  # where rounding swapped no two experts
    assert same.float().mean() > 0.999
    assert_close(results[0][-1][same], results[1][-1][same], tolerance=1e-5)


def test_addresses_past_2_to_the_31() -> None:
    """A million rows of 4,096 channels, 8 GiB."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of a GPU's memory")
    routing = routing_of(2**18, 256, 4)
    x = torch.randn(2**18, 4096, device="cuda", dtype=torch.bfloat16)
    rows = ops.permute(x, routing, backend="cuda")
    for part in range(0, 2**20, 2**17):
        own = slice(part, part + 2**17)
        assert torch.equal(rows[own], x[routing.token_indices[own]])
    y = ops.unpermute(rows, routing, backend="cuda")
    expected = x * routing.gates[routing.token_rows.long()].view(-1, 4).sum(1, keepdim=True)
    assert_close(y, expected, dtype=torch.bfloat16)


def test_scores_past_2_to_the_31() -> None:
    """Eight million tokens of 256 experts, and what the last of them choose and get back."""
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of a GPU's memory")
    logits = torch.randn(2**23 + 5, 256, device="cuda", dtype=torch.bfloat16)
    logits[-5:] = torch.rand(5, 256, device="cuda").argsort() / 64  # no two alike
    few = logits[-5:].float().requires_grad_()
    expected = ops.router_topk(few, 2, backend="reference")
    (grad,) = torch.autograd.grad(expected.topk_weights.square().sum(), few)
    ours = ops.router_topk(logits.requires_grad_(), 2, backend="cuda")
    weights = ours.topk_weights[-5:]
    assert torch.equal(ours.topk_ids[-5:], expected.topk_ids)
    assert_close(weights, expected.topk_weights)
    (ours_grad,) = torch.autograd.grad(weights.square().sum(), logits)
    assert_close(ours_grad[-5:], grad.bfloat16(), dtype=torch.bfloat16)
    assert not ours_grad[:1000].any()


@pytest.mark.parametrize("name", STEPS)
def test_in_a_cuda_graph_and_without_a_sync(name: str) -> None:
    step = steps(0)[name]
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        right = [one.detach().clone() for one in step()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for one in results:
        one.detach().zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(results, right, strict=True))


@pytest.mark.parametrize("name", STEPS)
def test_two_streams_at_once(name: str) -> None:
    """On streams that are not the default one, again and again, beside each other."""
    both = [steps(seed)[name] for seed in (0, 1)]
    right = [[one.detach().clone() for one in step()] for step in both]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in both]
    results: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for number, (step, stream) in enumerate(zip(both, streams, strict=True)):
            with torch.cuda.stream(stream):
                results[number] = step()
    torch.cuda.synchronize()
    for ours, expected in zip(results, right, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))


def test_a_launch_waits_for_the_stream_that_it_is_on() -> None:
    """What a slow kernel on that stream writes is what it reads."""
    routing = routing_of(4096, 16, 2)
    x, stream = torch.zeros(4096, 512, device="cuda"), torch.cuda.Stream()
    ops.permute(x, routing, backend="cuda")  # loads its code, which takes longer than the sleep
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(1.0)
        rows = ops.permute(x, routing, backend="cuda")
    stream.synchronize()
    assert rows.eq(1).all()


SANITIZED = """
import sys, torch
from tests.test_gpu_cuda import steps
for step in steps(0).values():
    step()
if "wrong" in sys.argv:  # reads a row far past the last
    from diffmoe_kernels import _C
    x, index = torch.zeros(4, 64, device="cuda"), torch.tensor([10**6], device="cuda", dtype=torch.int32)
    one = torch.ones(1, device="cuda", dtype=torch.int32)
    _C.permute_fwd(x.data_ptr(), index.data_ptr(), one.data_ptr(), x.data_ptr(), 1, 1, 64, 0, 0)
torch.cuda.synchronize()
print("all ran")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_bad_address_and_no_race(tool: str) -> None:
    output, faults = sanitized(tool, SANITIZED, kernels="diffmoe")
    assert not faults and "all ran" in output, output[-3000:]


def test_a_bad_address_is_found() -> None:
    """So that the test above looks at this project's kernels."""
    output, faults = sanitized("memcheck", SANITIZED, "wrong", kernels="diffmoe")
    assert faults, output[-3000:]


def test_a_failed_launch_names_the_kernel(capfd) -> None:
    """More rows than a grid has blocks."""
    with pytest.raises(
        RuntimeError, match=r"kernel permute_fwd\(.*\) on a grid of \d+ blocks of 256 threads: the grid"
    ):
        extension.permute_fwd(16, 16, 16, 16, 1, 2**40, 2**10, 0, 0)
