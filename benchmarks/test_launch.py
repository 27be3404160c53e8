"""What an op costs the host: microseconds of Python and launches."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import timing
from benchmarks.launches import ON_HOST, OPS, calls
from diffmoe_kernels.backend import KERNEL_BACKENDS

CALLS = 40  # of a round, of up to 18 launches: about 1,000 wait in a stream's queue, then the host waits too


@pytest.mark.part("extras")
@pytest.mark.benchmark(timer=timing.CLOCK)
@pytest.mark.parametrize("provider", [*KERNEL_BACKENDS, "PyTorch"])
@pytest.mark.parametrize("op", OPS)
def test_launch(benchmark, request, spent, op: str, provider: str) -> None:
    facts = {"op": ON_HOST, "name": op, "direction": "forward", "provider": provider, "backend": None}
    facts |= {"ceiling": False, "published_size": True, "weights_dtype": "float32", "flops": 0, "least_bytes": 0}
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
