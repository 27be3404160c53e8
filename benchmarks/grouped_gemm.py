"""One grouped product by itself: the experts' down-projection, of rows that lie in the experts' order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.experts import TRAINING
from benchmarks.registry import BOTH, FORWARD, Build, Case, Provider, Shape, Where, normal
from diffmoe_kernels import Routing, ops

NAMES = ("DSMoE-L-E16", "DSMoE-L-E48")


class Product(nn.Module):
    """(R, I) by weights (E, D, I), which lie as `nn.Linear`'s do; ``backend`` computes it."""

    def __init__(self, shape: Shape, dtype: torch.dtype, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.weight = nn.Parameter((torch.randn(shape.experts, shape.hidden, shape.inner) / shape.inner**0.5).to(dtype))
        weights, ids = torch.rand(shape.tokens, shape.experts).topk(shape.top_k)
        self.register_buffer("offsets", Routing.from_topk(ids, weights, shape.experts).group_offsets)

    def forward(self, rows: Tensor) -> Tensor:
        return ops.grouped_gemm(rows, self.weight.mT, self.offsets, backend=self.backend)


class Exact(Product):
    """What is right, in float32."""

    def forward(self, rows: Tensor) -> Tensor:
        return ops.grouped_gemm(rows.float(), self.weight.float().mT, self.offsets, backend="reference")


class Dense(nn.Module):
    """One product of as many operations."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.randn(shape.hidden, shape.inner) / shape.inner**0.5).to(dtype))

    def forward(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weight)


def of(backend: str) -> Build:
    return lambda shape, where, dtype: Product(shape, dtype, backend)


def rows(shape: Shape, where: Where) -> Tensor:
    """(R, I), which takes a gradient."""
    return normal(where, shape.rows, shape.inner).to(where.dtype).requires_grad_()


def cost(shape: Shape, direction: str, size: int) -> tuple[int, int]:
    """2 R D I operations, twice that again backward; each tensor and each gradient read or written once."""
    flops = 2 * shape.rows * shape.hidden * shape.inner
    numbers = shape.rows * (shape.hidden + shape.inner) + shape.experts * shape.hidden * shape.inner
    return (3 * flops, 2 * numbers * size) if direction == BOTH else (flops, numbers * size)


def cases(where: Where) -> list[Case]:
    providers = {
        "dense": Provider(lambda shape, where, dtype: Dense(shape, dtype), ceiling=True),
        **{backend: Provider(of(backend), backend) for backend in ("triton", "torch")},
    }

    def exact(shape: Shape, where: Where, dtype: torch.dtype) -> nn.Module:
        return Exact(shape, dtype, "reference")

    return [
        Case("grouped_gemm", name, direction, TRAINING[name], providers, rows, exact, cost)
        for name in NAMES
        for direction in (FORWARD, BOTH)
    ]
