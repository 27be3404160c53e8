"""Timings of one MoE layer and of whole training steps on this machine; figures are reported, never asserted.

``pytest benchmarks`` prints one table per group. Shapes are the digits models', small enough for a CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe_kernels import MoE
from diffmoe_kernels.modules import FeedForward
from diffmoe_kernels.testing import assert_close
from models import create_model

TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 4096, 96, 88, 8, 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class LoopMoE(nn.Module):
    """What the published models train with: a Python loop over the experts, each with its own matrices."""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.router = layer.router
        self.ups = nn.ParameterList(layer.experts.gate_up_proj.detach().unbind())
        self.downs = nn.ParameterList(layer.experts.down_proj.detach().unbind())

    def forward(self, x: Tensor) -> Tensor:
        choice = self.router(x)
        out = torch.zeros_like(x)
        for expert, (up, down) in enumerate(zip(self.ups, self.downs, strict=True)):
            tokens, slots = torch.where(choice.topk_ids == expert)
            gate, value = (x[tokens] @ up.T).chunk(2, dim=-1)
            y = (F.silu(gate) * value) @ down.T
            out = out.index_add(0, tokens, y * choice.topk_weights[tokens, slots, None])
        return out


def with_backend(layer: MoE, backend: str) -> MoE:
    other = MoE(HIDDEN, WIDTH, EXPERTS, TOP_K, backend=backend)
    other.load_state_dict(layer.state_dict())
    return other


# Each computes what the layer does, but for the dense network of the same floating-point operations.
LAYERS: dict[str, Callable[[MoE], nn.Module]] = {
    "dense FFN, same FLOPs": lambda layer: FeedForward(HIDDEN, WIDTH * TOP_K),
    "MoE, backend torch": lambda layer: with_backend(layer, "torch"),
    "MoE, backend reference": lambda layer: with_backend(layer, "reference"),
    "loop over experts": LoopMoE,
}


def synchronised(step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.mark.benchmark(group=f"layer forward+backward, {TOKENS} tokens, {DEVICE}", warmup=True, min_rounds=10)
@pytest.mark.parametrize("name", LAYERS)
def test_layer(benchmark, name) -> None:
    torch.manual_seed(0)
    definition = MoE(HIDDEN, WIDTH, EXPERTS, TOP_K, backend="reference")
    layer = LAYERS[name](definition).to(DEVICE)
    x = torch.randn(TOKENS, HIDDEN, device=DEVICE, requires_grad=True)
    grad = torch.randn_like(x)
    if not isinstance(layer, FeedForward):  # a wrong result has no time
        assert_close(layer(x), definition.to(DEVICE)(x))

    def step() -> None:
        layer(x).backward(grad)

    benchmark(synchronised(step))


@pytest.mark.benchmark(group=f"training step, batch 256, {DEVICE}", warmup=True, min_rounds=5)
@pytest.mark.parametrize("name", ["DiT-digits", "DSMoE-digits"])
def test_training_step(benchmark, name) -> None:
    torch.manual_seed(0)
    model = create_model(name).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, t = torch.randn(256, 1, 8, 8, device=DEVICE), torch.rand(256, device=DEVICE)
    labels = torch.randint(10, (256,), device=DEVICE)

    def step() -> None:
        optimizer.zero_grad()
        model(x, t, labels).square().mean().backward()
        optimizer.step()

    benchmark(synchronised(step))
    benchmark.extra_info["images per second"] = 256 / benchmark.stats["median"]
