"""DSMoE's whole layer, router, index arrays and shared expert included, by this project and in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.expert_choice import in_float32
from benchmarks.experts import TRAINING, cost, tokens
from benchmarks.registry import BOTH, Build, Case, Provider, Shape, Where
from diffmoe_kernels import MoE
from diffmoe_kernels.modules import FeedForward

NAMES = ("DSMoE-L-E48", "DSMoE-L-E16", "DSMoE-S-E48")


def layer(shape: Shape, dtype: torch.dtype, backend: str) -> MoE:
    """K experts a token, and one that all tokens share."""
    sizes = shape.hidden, shape.inner, shape.experts, shape.top_k
    return MoE(*sizes, scaling_factor=2.5, shared_intermediate_size=shape.inner, backend=backend, dtype=dtype)


class Parts(nn.Module):
    """The layer's parts under their own names, so that gradients compare."""

    def __init__(self, whole: MoE) -> None:
        super().__init__()
        self.router, self.experts, self.shared_expert = whole.router, whole.experts, whole.shared_expert

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(T, D) -> the experts (T, K) with the best sigmoid scores, and their weights, which sum to the factor."""
        scores = F.linear(x.float(), self.router.weight.float()).sigmoid()  # (T, E)
        ids = (scores + self.router.expert_bias).topk(self.router.top_k).indices
        weights = scores.gather(1, ids)
        return ids, weights / weights.sum(-1, keepdim=True) * self.router.scaling_factor


class Loop(Parts):
    """What the published models run: expert after expert, each finding its tokens, which waits for the device."""

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.choose(x)
        out = torch.zeros_like(x)
        for expert, (up, down) in enumerate(zip(self.experts.gate_up_proj, self.experts.down_proj, strict=True)):
            own, slots = torch.where(ids == expert)
            gate, value = F.linear(x[own], up).chunk(2, dim=-1)
            rows = F.linear(F.silu(gate) * value, down)
            out.index_add_(0, own, (rows * weights[own, slots, None]).to(x.dtype))
        return out + self.shared_expert(x)


class Sorted(Parts):
    """What a skilled user of plain PyTorch writes: sort, gather, `grouped_mm` twice, scatter."""

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.choose(x)
        flat = ids.flatten()  # (R,)
        order = flat.argsort(stable=True)
        source = order // self.router.top_k
        sizes = flat.new_zeros(self.router.num_experts).scatter_add_(0, flat, torch.ones_like(flat))
        offsets = sizes.cumsum(0).int()
        gate, up = F.grouped_mm(x[source], self.experts.gate_up_proj.mT, offs=offsets).chunk(2, dim=-1)
        rows = F.grouped_mm(F.silu(gate) * up, self.experts.down_proj.mT, offs=offsets)
        rows = (rows * weights.flatten()[order, None]).to(x.dtype)
        return torch.zeros_like(x).index_add(0, source, rows) + self.shared_expert(x)


class Exact(Parts):
    """What is right: the layer's choice by the reference, then float32."""

    def forward(self, x: Tensor) -> Tensor:
        return in_float32(self.experts, x, self.router(x).routing) + self.shared_expert(x.float())


def of(kind: type[Parts]) -> Build:
    return lambda shape, where, dtype: kind(layer(shape, dtype, "reference"))


def ours(backend: str) -> Build:
    return lambda shape, where, dtype: layer(shape, dtype, backend)


def dense(shape: Shape, where: Where, dtype: torch.dtype) -> nn.Module:
    """One network for all tokens, as wide as the experts that a token visits and the shared one."""
    return FeedForward(shape.hidden, shape.inner * (shape.top_k + 1), dtype=dtype)


def layer_cost(shape: Shape, direction: str, size: int) -> tuple[int, int]:
    """The experts with the shared one, and the router's product of D by E numbers a token."""
    with_shared = replace(shape, top_k=shape.top_k + 1, experts=shape.experts + 1)
    flops, least_bytes = cost(with_shared, direction, size)
    both = direction == BOTH
    flops += 2 * shape.tokens * shape.hidden * shape.experts * (3 if both else 1)
    return flops, least_bytes + shape.hidden * shape.experts * size * (2 if both else 1)


def cases(where: Where) -> list[Case]:
    compiled = where.compiler is not None
    providers = {
        "dense": Provider(dense, compiled=compiled, ceiling=True),
        "triton": Provider(ours("triton"), "triton"),
        "torch": Provider(ours("torch"), "torch", compiled=compiled),
        "grouped_mm": Provider(of(Sorted), compiled=compiled),
        "loop": Provider(of(Loop), captured=False),
        "loop, compiled": Provider(of(Loop), captured=False, compiled=True, fullgraph=False),
    }
    return [
        Case("token-choice layer", name, BOTH, TRAINING[name], providers, tokens, of(Exact), layer_cost)
        for name in NAMES
    ]
