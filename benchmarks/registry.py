"""What is timed: cases (an op or a layer at a published model's sizes, in one direction) and their providers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from diffmoe_kernels.cuda_support import why_not_cuda
from diffmoe_kernels.testing import relative_error
from diffmoe_kernels.triton_support import HAS_TRITON

FORWARD, BOTH = "forward", "forward+backward"


@dataclass(frozen=True)
class Shape:
    """T tokens of width D, experts of width I, E experts, K of them a token (on average, in expert choice)."""

    tokens: int
    hidden: int
    inner: int
    experts: int
    top_k: int
    activation: str = "swiglu"

    @property
    def rows(self) -> int:
        """R = T K."""
        return self.tokens * self.top_k

    @property
    def width(self) -> int:
        """U, the up-projection's columns: 2 I for SwiGLU, else I."""
        return self.inner * (2 if self.activation == "swiglu" else 1)

    @property
    def of_ceiling(self) -> Shape:
        """With the weights of as many experts as a token visits."""
        return replace(self, experts=self.top_k)

    def small(self) -> Shape:
        """What stands for it on a CPU."""
        return replace(self, tokens=min(self.tokens, 128), hidden=self.hidden // 8, inner=self.inner // 8)

    def dimensions(self) -> dict[str, Any]:
        names = {"tokens": "T", "hidden": "D", "inner": "I", "experts": "E", "top_k": "K"}
        return {**{short: getattr(self, name) for name, short in names.items()}, "activation": self.activation}


@dataclass(frozen=True)
class AttentionShape:
    """B samples of N tokens, the first few not rotated, H heads of d channels; rotation and norm of q and k, if any."""

    samples: int
    length: int
    heads: int
    head_dim: int
    prefix: int = 0
    rope: str | None = "2d"
    norm: str | None = None

    @property
    def of_ceiling(self) -> AttentionShape:
        return self

    def small(self) -> AttentionShape:
        """What stands for it on a CPU."""
        return replace(self, samples=1, length=self.prefix + 36, heads=2)

    def dimensions(self) -> dict[str, Any]:
        names = {"samples": "B", "length": "N", "heads": "H", "head_dim": "d"}
        return {**{short: getattr(self, name) for name, short in names.items()}, "rope": self.rope, "norm": self.norm}


@dataclass(frozen=True)
class Where:
    """The machine that cases run on.

    Attributes:
        device, dtype: of activations, and of weights but for float32 masters.
        resize: the shape that stands for a published one here.
        compiler: torch.compile's backend, or None where nothing is compiled.
        triton: whether the Triton kernels run.
    """

    device: str
    dtype: torch.dtype
    resize: Callable[[Shape], Shape]
    compiler: str | None
    triton: bool


GPU = Where("cuda", torch.bfloat16, lambda shape: shape, "inductor", HAS_TRITON)
CPU = Where("cpu", torch.float32, lambda shape: shape.small(), None, False)


Build = Callable[[Shape, Where, torch.dtype], nn.Module]  # the last is of the weights


def normal(where: Where, *size: int) -> Tensor:
    """The same normal float32 numbers for every provider."""
    generator = torch.Generator(where.device).manual_seed(1)
    return torch.randn(size, device=where.device, generator=generator)


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        build: the shape, the machine and the weights' dtype -> a module that takes the case's input. It draws its
            weights after `torch.manual_seed`, so that every provider of a case gets the same.
        backend: this project's backend, or None where the provider is not of this project.
        compiled: by torch.compile.
        fullgraph: compiled without graph breaks, or it fails.
        captured: in a CUDA graph; False where it synchronizes with the host, so that none can hold it.
        in_a_row: not captured, but the host may run ahead of the GPU: timed over a few runs.
        replays: of a training step: forward and backward from a CUDA graph, as `models.train --cuda-graph` runs them.
        masters: float32 weights, cast inside.
        ceiling: another function of the same cost, which no reference checks.
        needs: why it can't run on that machine, such as a package that is missing, or None.
        regions: the parts of the module that torch.compile takes, each by itself.
    """

    build: Build
    backend: str | None = None
    compiled: bool = False
    fullgraph: bool = True
    captured: bool = True
    in_a_row: bool = False
    replays: bool = False
    masters: bool = False
    ceiling: bool = False
    needs: Callable[[Where], str | None] = lambda where: None
    regions: Callable[[nn.Module], Iterable[nn.Module]] = lambda module: (module,)

    def why_not(self, where: Where) -> str | None:
        """Why it can't run there, or None."""
        if self.backend == "triton" and not where.triton:
            return "the Triton kernels need a CUDA device"
        if self.backend == "cuda" and (reason := why_not_cuda(torch.empty(0, device=where.device))):
            return reason
        if self.compiled and where.compiler is None:
            return "compiled for a GPU only"
        if self.replays and where.device != "cuda":
            return "a CUDA graph needs a CUDA device"
        if self.masters and where.dtype == torch.float32:
            return "every weight is float32 here"
        return self.needs(where)

    def module(self, shape: Shape, where: Where) -> nn.Module:
        """It, on the device, ready to run."""
        torch._dynamo.reset()  # past eight recompilations torch.compile runs eager without a word
        torch.manual_seed(0)
        with torch.device(where.device):
            module = self.build(shape, where, torch.float32 if self.masters else where.dtype)
        if self.compiled:
            dynamic = False if self.fullgraph else None  # parts between breaks meet other sizes
            for region in self.regions(module):
                region.compile(backend=where.compiler, fullgraph=self.fullgraph, dynamic=dynamic)
        return module


SLOTS = {"grad of gates", "grad of topk_weights"}  # the same numbers by row and by token; providers take one of them


def close(actual: Mapping[str, Any], expected: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Raises AssertionError where a result or gradient is missing, or off by more than ``dtype`` rounds."""
    missing = expected.keys() - actual.keys() - (SLOTS if actual.keys() & SLOTS else set())
    assert not missing, f"{', '.join(sorted(missing))}: not computed: no time"
    for name in actual.keys() & expected.keys():
        bound = (2e-2 if dtype == torch.bfloat16 else 1e-5) * (2 if name.startswith("grad") else 1)
        for one, other in zip(_pytree.tree_leaves(actual[name]), _pytree.tree_leaves(expected[name]), strict=True):
            error = relative_error(one, other)
            assert error < bound, f"{name} is wrong by {error:.2e}: no time"


@dataclass(frozen=True)
class Case:
    """One thing to compute, and who computes it.

    Attributes:
        op, name, direction: what it is, the published model whose sizes it has, FORWARD or BOTH.
        shape: the published sizes.
        providers: by name.
        inputs: the shape and the machine -> the input.
        reference: builds the module that says what is right.
        cost: the shape, the direction and the bytes of an element -> floating-point operations, least bytes.
        agree: raises AssertionError unless two outcomes are the same.
        prepare: does what `measure.prepare` does, where a step is more than one module's forward and backward.
    """

    op: str
    name: str
    direction: str
    shape: Shape
    providers: Mapping[str, Provider]
    inputs: Callable[[Shape, Where], Tensor]
    reference: Build
    cost: Callable[[Shape, str, int], tuple[int, int]]
    agree: Callable[[Mapping[str, Any], Mapping[str, Any], torch.dtype], None] = close
    prepare: Callable[[Case, Provider, Where], tuple[list[Callable[[], object]], dict[str, Any]]] | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.op, self.name, self.direction

    def facts(self, provider: str, where: Where) -> dict[str, Any]:
        """Plain data that says what was timed: enough to derive TFLOP/s and GB/s from a time."""
        how, shape = self.providers[provider], where.resize(self.shape)
        costly = shape.of_ceiling if how.ceiling else shape
        flops, least_bytes = self.cost(costly, self.direction, where.dtype.itemsize)
        return {
            "op": self.op,
            "name": self.name,
            "direction": self.direction,
            "provider": provider,
            "backend": how.backend,
            "compiled": how.compiled,
            "ceiling": how.ceiling,
            "captured": how.captured and where.device == "cuda",
            "dtype": str(where.dtype).removeprefix("torch."),
            "weights_dtype": str(torch.float32 if how.masters else where.dtype).removeprefix("torch."),
            "published_size": shape == self.shape,
            **shape.dimensions(),
            "flops": flops,
            "least_bytes": least_bytes,
        }
