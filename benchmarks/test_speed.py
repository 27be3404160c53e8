"""Every case by every provider; `pytest benchmarks` prints one table a case.

Figures are reported, never asserted. A provider that can't run is skipped with its reason; one whose result is wrong
has no time. On a CPU shapes are small and say nothing but that it all runs.
"""

from __future__ import annotations

import gc

import pytest
import torch

from benchmarks import measure, timing
from benchmarks.cases import pairs
from benchmarks.registry import CPU, GPU, Case

WHERE = GPU if torch.cuda.is_available() else CPU
PAIRS = [
    pytest.param(
        case, provider, id=f"{case.op}, {case.name}, {case.direction}, {provider}", marks=pytest.mark.part(part)
    )
    for part, case, provider in pairs(WHERE)
]


@pytest.mark.benchmark(timer=timing.CLOCK)
@pytest.mark.parametrize(("case", "provider"), PAIRS)
def test_speed(benchmark, request, spent, ceilings, case: Case, provider: str) -> None:
    how = case.providers[provider]
    facts = {**case.facts(provider, WHERE), "device": torch.cuda.get_device_name() if WHERE is GPU else "cpu"}
    facts["compute_capability"] = ".".join(map(str, torch.cuda.get_device_capability())) if WHERE is GPU else None
    request.node.user_properties.append(("facts", facts))
    reason = how.why_not(WHERE) or spent
    if reason:
        pytest.skip(reason)
    if WHERE is GPU:  # what a case before it left, even one that failed: pytest kept its frames until now
        gc.collect()
        torch.cuda.empty_cache()
    steps, measured = measure.prepare(case, how, WHERE)
    run, words = timing.timed(steps, how.captured, WHERE is GPU, in_a_row=how.in_a_row)
    benchmark.group = f"{case.op} {case.name}, {case.direction}, {facts['device']}"
    benchmark.pedantic(run, rounds=timing.rounds_of(run), warmup_rounds=1)
    timing.keep(benchmark, request.node, facts | measured | {"timing": words})
