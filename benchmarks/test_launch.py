"""What an op costs the host: microseconds of Python and launches, on so few tokens that the GPU is never waited for."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import timing
from diffmoe_kernels import Routing, ops
from diffmoe_kernels.backend import KERNEL_BACKENDS

CALLS = 200  # of a round
TOKENS, WIDTH, EXPERTS, TOP_K = 64, 64, 8, 2


def calls(op: str, provider: str) -> Callable[[], object]:
    """The op by a backend, or as a user of PyTorch writes it."""
    weights, ids = torch.rand(TOKENS, EXPERTS, device="cuda").topk(TOP_K)
    routing = Routing.from_topk(ids, weights, EXPERTS)
    x, logits = torch.randn(TOKENS, WIDTH, device="cuda"), torch.randn(TOKENS, EXPERTS, device="cuda")
    rows = x[routing.token_indices]

    def sorted_choices() -> tuple[Tensor, ...]:
        weights, ids = logits.sigmoid().topk(TOP_K)
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        sizes = torch.zeros(EXPERTS, device="cuda", dtype=torch.int64).scatter_add_(0, flat, torch.ones_like(flat))
        return order // TOP_K, weights.flatten()[order] / weights.sum(), sizes.cumsum(0).int()

    plain = {
        "permute": lambda: x.index_select(0, routing.token_indices),
        "unpermute": lambda: torch.zeros_like(x).index_add_(0, routing.token_indices, rows * routing.gates[:, None]),
        "router_topk": sorted_choices,
    }
    by_backend = {
        "permute": lambda: ops.permute(x, routing, backend=provider),
        "unpermute": lambda: ops.unpermute(rows, routing, backend=provider),
        "router_topk": lambda: ops.router_topk(logits, TOP_K, backend=provider),
    }
    return (plain if provider == "PyTorch" else by_backend)[op]


@pytest.mark.part("extras")
@pytest.mark.benchmark(timer=timing.CLOCK)
@pytest.mark.parametrize("provider", [*KERNEL_BACKENDS, "PyTorch"])
@pytest.mark.parametrize("op", ["permute", "unpermute", "router_topk"])
def test_launch(benchmark, request, spent, op: str, provider: str) -> None:
    facts = {"op": "on the host", "name": op, "direction": "forward", "provider": provider, "backend": None}
    facts |= {"ceiling": False, "published_size": False, "weights_dtype": "float32", "flops": 0, "least_bytes": 0}
    request.node.user_properties.append(("facts", facts))
    if not torch.cuda.is_available():
        pytest.skip("launches are a GPU's")
    if reason := spent or KERNEL_BACKENDS.get(provider, lambda _: None)(torch.empty(0, device="cuda")):
        pytest.skip(reason)
    call = calls(op, provider)

    def run() -> None:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        timing.CLOCK.seconds += (time.perf_counter() - start) / CALLS

    benchmark.pedantic(run, rounds=20, warmup_rounds=2)
    timing.keep(benchmark, request.node, facts | {"timing": f"wall time of {CALLS} calls, without waiting"})
