"""Attention of the published models, from the packed projection to what the output projection reads."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.registry import BOTH, CPU, FORWARD, AttentionShape, Build, Case, Provider, Where, normal
from diffmoe_kernels import ops

SHAPES = {
    "DSMoE-S": AttentionShape(256, 256, 6, 64),
    "DSMoE-L": AttentionShape(64, 256, 16, 64),
    "DSMoE-3B": AttentionShape(64, 256, 16, 72),
    "JiT-L": AttentionShape(64, 288, 16, 64, prefix=32, rope="2d_interleaved", norm="rmsnorm"),
    "512 px": AttentionShape(16, 1024, 16, 64),
    "DiT-L": AttentionShape(64, 256, 16, 64, rope=None),  # DiffMoE's too: positions are added to the tokens
}
KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


def pinned(kernel: str | None, x: Tensor) -> AbstractContextManager[None]:
    """SDPA by that kernel alone, on a GPU."""
    return sdpa_kernel(KERNELS[kernel]) if kernel and x.is_cuda else nullcontext()


class Attention(nn.Module):
    """`ops.rope_attention` with its tables and norms; ``kernel`` names SDPA's."""

    def __init__(self, shape: AttentionShape, backend: str, kernel: str | None = None) -> None:
        super().__init__()
        self.backend, self.kernel, self.options = backend, kernel, {}
        if shape.rope:
            side = int((shape.length - shape.prefix) ** 0.5)
            for name, table in zip(("cos", "sin"), ops.rope_table(shape.rope, shape.head_dim, side), strict=True):
                self.register_buffer(name, table)
            halves = self.cos.half(), self.sin.half()  # as a layer keeps them
            self.options |= {"rope": shape.rope, "num_prefix_tokens": shape.prefix, "float16_tables": halves}
        if shape.norm:
            for name in ("q_norm_weight", "k_norm_weight"):
                self.register_parameter(name, nn.Parameter(1 + 0.1 * torch.randn(shape.head_dim)))
            self.options["qk_norm"] = shape.norm

    def forward(self, qkv: Tensor) -> Tensor:
        with pinned(self.kernel, qkv):
            tensors = {**dict(self.named_buffers()), **dict(self.named_parameters())}
            return ops.rope_attention(qkv, **tensors, **self.options, backend=self.backend)


class Bare(nn.Module):
    """SDPA of the projection's views: what is left where the projection before it has rotated and normalised."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, qkv: Tensor) -> Tensor:
        with pinned(self.kernel, qkv):
            q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, H, N, d) each
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def of(backend: str, kernel: str | None = None) -> Build:
    return lambda shape, where, dtype: Attention(shape, backend, kernel)


def bare(kernel: str) -> Build:
    return lambda shape, where, dtype: Bare(kernel)


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


def gpu(where: Where) -> str | None:
    return "names one of a GPU's kernels" if where is CPU else None


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
    ours = {name: Provider(of(name), name) for name in ("triton", "torch")}
    compiled = {"compiled": Provider(of("torch"), "torch", compiled=True)}  # with the kernel that PyTorch picks
    rotating = {f"compiled, {name}": Provider(of("torch", name), compiled=True) for name in KERNELS}
    found = []
    for name, shape in SHAPES.items():
        # Where nothing is rotated they compute the same.
        rest = {
            f"{kernel}, no rotation": Provider(bare(kernel), ceiling=shape.rope is not None, needs=gpu)
            for kernel in KERNELS
        }
        providers = ours | compiled | (rotating if shape.rope else {}) | rest
        for direction in (FORWARD, BOTH):
            found.append(Case("rope_attention", name, direction, shape, providers, packed, exact, cost))
    return found
