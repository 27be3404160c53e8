"""adaLN between a block's layers: the modulated norm, and the gated residual fused with the norm that follows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.registry import BOTH, FORWARD, Build, Case, Provider, Where, normal
from diffmoe_kernels import ops


@dataclass(frozen=True)
class AdaLNShape:
    """B samples of N tokens of width D, and the norm."""

    samples: int
    length: int
    hidden: int
    norm: str

    @property
    def of_ceiling(self) -> AdaLNShape:
        return self

    def small(self) -> AdaLNShape:
        """What stands for it on a CPU."""
        return replace(self, samples=2, length=36, hidden=self.hidden // 8)

    def dimensions(self) -> dict[str, Any]:
        sizes = {"B": self.samples, "N": self.length, "T": self.samples * self.length, "D": self.hidden}
        return {**sizes, "norm": self.norm}


SHAPES = {
    "DSMoE-S": AdaLNShape(256, 256, 384, "layernorm"),
    "DSMoE-L": AdaLNShape(64, 256, 1024, "layernorm"),
    "JiT-L": AdaLNShape(64, 288, 1024, "rmsnorm"),
    "DSMoE-L, sampling 512": AdaLNShape(2, 256, 1024, "layernorm"),
}


class AdaLN(nn.Module):
    """`ops.adaln` with a sample's vectors, and for an RMSNorm its weight; with a gate, of a branch's output."""

    vectors: tuple[str, ...] = ("shift", "scale")

    def __init__(self, shape: AdaLNShape, where: Where, dtype: torch.dtype, backend: str) -> None:
        super().__init__()
        self.options = {"norm": shape.norm, "backend": backend}
        for name in self.vectors:
            self.register_parameter(name, nn.Parameter(0.1 * torch.randn(shape.samples, shape.hidden).to(dtype)))
        weight = 1 + 0.1 * torch.randn(shape.hidden) if shape.norm == "rmsnorm" and "shift" in self.vectors else None
        self.weight = None if weight is None else nn.Parameter(weight.to(dtype))
        branch = normal(where, shape.samples, shape.length, shape.hidden).to(dtype) if "gate" in self.vectors else None
        self.branch = None if branch is None else nn.Parameter(branch)

    def forward(self, x: Tensor) -> Tensor:
        return ops.adaln(x, self.shift, self.scale, weight=self.weight, **self.options)


class Residual(AdaLN):
    """`ops.gated_residual`: a branch's output joins the stream."""

    vectors = ("gate",)

    def forward(self, x: Tensor) -> Tensor:
        return ops.gated_residual(x, self.branch, self.gate, backend=self.options["backend"])


class Both(AdaLN):
    """`ops.gated_residual_adaln`: a branch's output joins the stream, whose norm the next layer reads."""

    vectors = ("gate", "shift", "scale")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        vectors = self.gate, self.shift, self.scale
        return ops.gated_residual_adaln(x, self.branch, *vectors, weight=self.weight, **self.options)


OPS = {"adaln": AdaLN, "gated_residual": Residual, "gated_residual_adaln": Both}


def of(op: str, backend: str) -> Build:
    return lambda shape, where, dtype: OPS[op](shape, where, dtype, backend)


def tokens(shape: AdaLNShape, where: Where) -> Tensor:
    """(B, N, D), which takes a gradient."""
    return normal(where, shape.samples, shape.length, shape.hidden).to(where.dtype).requires_grad_()


def cost(op: str, shape: AdaLNShape, direction: str, size: int) -> tuple[int, int]:
    """About ten operations a number, and the least tensors of tokens read and written.

    `adaln` has 2 forward and 3 backward, `gated_residual` 3 and 3, `gated_residual_adaln` 4 and 6.
    """
    numbers = shape.samples * shape.length * shape.hidden
    forward, backward = {"adaln": (2, 3), "gated_residual": (3, 3), "gated_residual_adaln": (4, 6)}[op]
    tensors = forward + backward if direction == BOTH else forward
    return 10 * numbers * (3 if direction == BOTH else 1), tensors * numbers * size


def cases(where: Where) -> list[Case]:
    found = []
    for op in OPS:
        providers = {name: Provider(of(op, name), name) for name in ("triton", "torch")}
        providers["compiled"] = Provider(of(op, "torch"), "torch", compiled=True)
        for name, shape in SHAPES.items():
            for direction in (FORWARD, BOTH):
                found.append(
                    Case(op, name, direction, shape, providers, tokens, of(op, "reference"), partial(cost, op))
                )
    return found
