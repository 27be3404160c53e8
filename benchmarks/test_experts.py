"""The experts of the published models, forward and forward+backward, against a dense network of the same FLOPs.

On a GPU every provider runs in a CUDA graph, in bfloat16, at the models' training sizes; on a CPU everything is small
and the figures say nothing but that it runs. A provider that can't run is skipped with its reason; one whose result is
wrong has no time. Figures are reported, never asserted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from diffmoe_kernels import Routing, ops
from diffmoe_kernels.modules import FeedForward
from diffmoe_kernels.testing import relative_error
from diffmoe_kernels.triton_support import INTERPRETED

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)


@dataclass(frozen=True)
class Shape:
    """T tokens of width D, experts of width I, E experts, K a token."""

    tokens: int
    hidden: int
    inner: int
    experts: int
    top_k: int
    activation: str = "swiglu"


# Batch 64 to 256 of 256 tokens, the sizes that the models train at; then sampling.
SHAPES = {
    "DSMoE-L-E16": Shape(16384, 1024, 2048, 16, 2),
    "DSMoE-L-E48": Shape(16384, 1024, 448, 48, 5),
    "DSMoE-S-E48": Shape(65536, 384, 128, 48, 5),
    "DiffMoE-L-E8": Shape(16384, 1024, 4096, 8, 1, "gelu_tanh"),
    "DSMoE-L-E16, sampling": Shape(2048, 1024, 2048, 16, 2),
    "DSMoE-L-E48, sampling": Shape(512, 1024, 448, 48, 5),
}


if not ON_GPU:
    SHAPES = {
        name: replace(shape, tokens=64, hidden=shape.hidden // 8, inner=shape.inner // 8)
        for name, shape in SHAPES.items()
    }


class Experts(nn.Module):
    """The op with weights of its own and fixed choices."""

    def __init__(self, shape: Shape, backend: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        width = shape.inner * (2 if shape.activation == "swiglu" else 1)
        sizes = {"up": (shape.experts, width, shape.hidden), "down": (shape.experts, shape.hidden, shape.inner)}
        for name, size in sizes.items():
            setattr(self, name, nn.Parameter(torch.randn(size, generator=generator) / size[-1] ** 0.5))
            has_bias = shape.activation != "swiglu"
            setattr(self, f"{name}_bias", nn.Parameter(torch.zeros(size[:2])) if has_bias else None)
        scores = torch.rand(shape.tokens, shape.experts, generator=generator)
        weights, ids = scores.topk(shape.top_k)
        self.routing = Routing.from_topk(ids.to(DEVICE), weights.to(DEVICE), shape.experts)
        self.activation, self.backend = shape.activation, backend

    def forward(self, x: Tensor) -> Tensor:
        biases = {"up_bias": self.up_bias, "down_bias": self.down_bias}
        how = {"activation": self.activation, "backend": self.backend}
        return ops.experts(x, self.routing, self.up, self.down, **biases, **how)


def dense(shape: Shape) -> nn.Module:
    bias = shape.activation != "swiglu"
    return FeedForward(shape.hidden, shape.inner * shape.top_k, activation=shape.activation, bias=bias)


def triton(shape: Shape) -> nn.Module:
    if INTERPRETED or not ON_GPU:
        pytest.skip("the Triton kernels need a CUDA device")
    return Experts(shape, "triton")


def compiled(build: Callable[[Shape], nn.Module]) -> Callable[[Shape], nn.Module]:
    def provider(shape: Shape) -> nn.Module:
        if not ON_GPU:
            pytest.skip("compiled for a GPU only")
        torch._dynamo.reset()  # past eight recompilations torch.compile runs eager without a word
        module = build(shape)
        module.compile()
        return module

    return provider


PROVIDERS: dict[str, Callable[[Shape], nn.Module]] = {
    "dense FFN, same FLOPs": compiled(dense) if ON_GPU else dense,
    "triton": triton,
    "grouped_mm": lambda shape: Experts(shape, "torch"),
    "grouped_mm, compiled": compiled(lambda shape: Experts(shape, "torch")),
    "loop over experts": lambda shape: Experts(shape, "reference"),
}


def check(module: nn.Module, shape: Shape, x: Tensor) -> None:
    if isinstance(module, FeedForward):
        return
    reference = Experts(shape, "reference").to(DEVICE)
    error = relative_error(module(x), reference(x.float()))
    assert error < (1e-2 if ON_GPU else 1e-5), f"wrong by {error:.2e}: no time"


def saved_mebibytes(module: nn.Module, x: Tensor) -> float:
    """What autograd keeps for the backward besides the parameters, each piece of memory once."""
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) and t, lambda t: t
    ):
        module(x)
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    return sum(size for pointer, size in kept.items() if pointer not in own) / 2**20


def repeatable(step: Callable[[], object]) -> Callable[[], None]:
    """The step, warmed up, as one call that ends when the device is done; on a GPU from a CUDA graph."""
    if not ON_GPU:
        return lambda: [step()].clear()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def run() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return run


@pytest.mark.benchmark(warmup=True, min_rounds=5, max_time=1.0 if ON_GPU else 0.1)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("name", SHAPES)
def test_experts(benchmark, name, direction, provider) -> None:
    shape = SHAPES[name]
    if "sampling" in name and direction != "forward":
        pytest.skip("sampling has no backward")
    if provider == "loop over experts" and ON_GPU:
        pytest.skip("it reads group sizes on the host, so that no graph can hold it; benchmarks/test_moe.py has it")
    benchmark.group = f"experts {name}, {direction}, {DEVICE}"
    torch.manual_seed(0)
    module = PROVIDERS[provider](shape).to(DEVICE, DTYPE)
    x = torch.randn(shape.tokens, shape.hidden, device=DEVICE, dtype=DTYPE, requires_grad=True)
    check(module, shape, x)
    grad = torch.randn_like(x)

    def forward() -> Tensor:
        with torch.no_grad():
            return module(x)

    def both() -> Tensor:
        x.grad = None
        module.zero_grad()
        y = module(x)
        y.backward(grad)
        return y

    if direction == "forward+backward":
        benchmark.extra_info["saved for backward (MiB)"] = round(saved_mebibytes(module, x), 1)
    benchmark(repeatable(forward if direction == "forward" else both))
