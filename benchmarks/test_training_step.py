"""Training steps of the digits' models on this machine, launches from Python included."""

from __future__ import annotations

import pytest
import torch

from benchmarks import timing
from models import create_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 256


@pytest.mark.part("extras")
@pytest.mark.benchmark(group=f"training step, batch {BATCH}, {DEVICE}", timer=timing.CLOCK)
@pytest.mark.parametrize("name", ["DiT-digits", "DSMoE-digits"])
def test_training_step(benchmark, spent, name) -> None:
    if spent:
        pytest.skip(spent)
    torch.manual_seed(0)
    model = create_model(name).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, t = torch.randn(BATCH, 1, 8, 8, device=DEVICE), torch.rand(BATCH, device=DEVICE)
    labels = torch.randint(10, (BATCH,), device=DEVICE)

    def step() -> None:
        optimizer.zero_grad()
        model(x, t, labels).square().mean().backward()
        optimizer.step()

    run, words = timing.timed([step], captured=False, on_gpu=DEVICE == "cuda")
    benchmark.extra_info |= {"model": name, "batch": BATCH, "timing": words}
    benchmark.pedantic(run, rounds=timing.rounds_of(run), warmup_rounds=1)
