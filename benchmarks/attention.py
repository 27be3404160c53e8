"""Attention of the published models, from the packed projection to what the output projection reads."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.registry import BOTH, FORWARD, AttentionShape, Build, Case, Provider, Where, normal
from diffmoe_kernels import ops

SHAPES = {
    "DSMoE-L": AttentionShape(64, 256, 16, 64),
    "DSMoE-S": AttentionShape(256, 256, 6, 64),
    "DSMoE-3B": AttentionShape(64, 256, 16, 72),
    "JiT-L": AttentionShape(64, 288, 16, 64, prefix=32, norm="rmsnorm"),
    "512 px": AttentionShape(16, 1024, 16, 64),
}
KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


class Attention(nn.Module):
    """`ops.rope_attention` with its tables and norms; ``pinned`` names the kernel of SDPA, on a GPU."""

    def __init__(self, shape: AttentionShape, backend: str, pinned: str | None = None, rotates: bool = True) -> None:
        super().__init__()
        self.shape, self.backend, self.pinned, self.rotates = shape, backend, pinned, rotates
        side = int((shape.length - shape.prefix) ** 0.5)
        for name, table in zip(("cos", "sin"), ops.rope_table(shape.rope, shape.head_dim, side), strict=True):
            self.register_buffer(name, table)
        for name in ("q_norm", "k_norm"):
            weight = nn.Parameter(1 + 0.1 * torch.randn(shape.head_dim)) if shape.norm else None
            self.register_parameter(name, weight)

    def forward(self, qkv: Tensor) -> Tensor:
        shape, options = self.shape, {}
        if self.rotates:
            options = {"cos": self.cos, "sin": self.sin, "rope": shape.rope, "num_prefix_tokens": shape.prefix}
            if shape.norm:
                options |= {"qk_norm": shape.norm, "q_norm_weight": self.q_norm, "k_norm_weight": self.k_norm}
        with sdpa_kernel(KERNELS[self.pinned]) if self.pinned and qkv.is_cuda else nullcontext():
            return ops.rope_attention(qkv, **options, backend=self.backend)


def of(backend: str, **options: object) -> Build:
    return lambda shape, where, dtype: Attention(shape, backend, **options)


class Exact(Attention):
    """The definition, in float32."""

    def forward(self, qkv: Tensor) -> Tensor:
        return super().forward(qkv.float())


def exact(shape: AttentionShape, where: Where, dtype: torch.dtype) -> nn.Module:
    return Exact(shape, "reference")


def packed(shape: AttentionShape, where: Where) -> Tensor:
    """(B, N, 3, H, d), which takes a gradient."""
    sizes = shape.samples, shape.length, 3, shape.heads, shape.head_dim
    return normal(where, *sizes).to(where.dtype).requires_grad_()


def cost(shape: AttentionShape, direction: str, size: int) -> tuple[int, int]:
    """4 B H N^2 d operations forward, two products; five more backward.

    Least bytes: qkv read and the output written; backward qkv, the output and its gradient read, qkv's written.
    """
    product = 2 * shape.samples * shape.heads * shape.length**2 * shape.head_dim
    numbers = shape.samples * shape.length * shape.heads * shape.head_dim
    if direction == BOTH:
        return 7 * product, (4 + 8) * numbers * size
    return 2 * product, 4 * numbers * size


def cases(where: Where) -> list[Case]:
    compiled = where.compiler is not None
    providers = {"triton": Provider(of("triton"), "triton"), "torch": Provider(of("torch"), "torch")}
    for name in KERNELS:
        providers[f"compiled, {name}"] = Provider(of("torch", pinned=name), "torch", compiled=compiled)
    # The rotation and the norm left to the projection before it: what that road would leave to be done here.
    bare = {f"{name}, no rotation": Provider(of("torch", pinned=name, rotates=False), ceiling=True) for name in KERNELS}
    return [
        Case("rope_attention", name, direction, shape, providers | bare, packed, exact, cost)
        for name, shape in SHAPES.items()
        for direction in (FORWARD, BOTH)
    ]
