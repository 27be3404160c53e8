"""The experts of the published models: training, forward and backward, and sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import Adapter, peers
from benchmarks.registry import BOTH, FORWARD, Build, Case, Provider, Shape, Where, normal
from diffmoe_kernels import Routing, ops
from diffmoe_kernels.modules import FeedForward
from diffmoe_kernels.ops.experts.reference import activate

# Batch 64 to 256 of 256 tokens, the sizes that the models train at.
TRAINING = {
    "DSMoE-L-E16": Shape(16384, 1024, 2048, 16, 2),
    "DSMoE-L-E48": Shape(16384, 1024, 448, 48, 5),
    "DSMoE-S-E48": Shape(65536, 384, 128, 48, 5),
    "DiffMoE-L-E8": Shape(16384, 1024, 4096, 8, 1, "gelu_tanh"),
}
OTHERS = {
    "DSMoE-S-E16": Shape(65536, 384, 768, 16, 2),
    "DSMoE-B-E16": Shape(32768, 768, 1536, 16, 2),
    "DSMoE-B-E48": Shape(32768, 768, 256, 48, 5),
    "DSMoE-3B-E16": Shape(16384, 1152, 2880, 16, 2),
}
SAMPLING_TOKENS = (256, 512, 2048)


class Experts(nn.Module):
    """Weights and fixed choices of one layer's experts; ``compute`` says who computes with them.

    The index arrays are given: what making them costs is timed with the routing and with whole layers. The gates are
    parameters, since a router wants their gradient.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, rounded: torch.dtype, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.shape, self.compute = shape, compute
        sizes = {
            "up": (shape.experts, shape.width, shape.hidden),
            "down": (shape.experts, shape.hidden, shape.inner),
        }
        for name, size in sizes.items():
            weight = torch.randn(size) / size[-1] ** 0.5
            bias = torch.randn(size[:2]) if shape.activation == "gelu_tanh" else None
            for key, value in ((name, weight), (f"{name}_bias", bias)):
                # Masters hold what the dtype can, so that one reference fits both.
                self.register_parameter(key, None if value is None else nn.Parameter(value.to(rounded).to(dtype)))
        weights, ids = torch.rand(shape.tokens, shape.experts).topk(shape.top_k)
        routing = Routing.from_topk(ids, weights, shape.experts)
        self.topk_weights, self.gates = nn.Parameter(weights), nn.Parameter(routing.gates)
        self.register_buffer("topk_ids", ids)
        for name in ("token_indices", "group_offsets", "token_offsets", "token_rows"):
            self.register_buffer(name, getattr(routing, name))

    @property
    def routing(self) -> Routing:
        return Routing(self.token_indices, self.gates, self.group_offsets, self.token_offsets, self.token_rows)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def ours(backend: str) -> Callable[[Experts, Tensor], Tensor]:
    def compute(module: Experts, x: Tensor) -> Tensor:
        biases = {"up_bias": module.up_bias, "down_bias": module.down_bias}
        how = {"activation": module.shape.activation, "backend": backend}
        return ops.experts(x, module.routing, module.up, module.down, **biases, **how)

    return compute


def exact(module: Experts, x: Tensor) -> Tensor:
    """The definition, in float32; gates and the weights that they come from both get the gradient."""
    names = {"up": "up_proj", "down": "down_proj", "up_bias": "up_bias", "down_bias": "down_bias"}
    weights = {name: getattr(module, own) for own, name in names.items()}
    weights = {name: weight.float() for name, weight in weights.items() if weight is not None}
    how = {"activation": module.shape.activation, "backend": "reference"}
    slot_weights = module.topk_weights.flatten()[module.token_rows.argsort()]  # (R,), equal to the gates
    routing = replace(module.routing, gates=module.gates + (slot_weights - slot_weights.detach()))
    return ops.experts(x.float(), routing, **weights, **how)


def grouped_mm(module: Experts, x: Tensor) -> Tensor:
    """What a skilled user of plain PyTorch writes: gather, `grouped_mm` twice, gather again and sum.

    Biases are a product with each row's expert as ones and zeros, whose backward sums without atomics.
    """
    own = None
    if module.up_bias is not None:
        own = (module.routing.row_experts[:, None] == torch.arange(module.shape.experts, device=x.device)).to(x.dtype)

    def project(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = F.grouped_mm(rows, weight.mT, offs=module.group_offsets)
        return out if own is None else torch.addmm(out, own, bias)

    rows = project(x.index_select(0, module.token_indices), module.up, module.up_bias)  # (R, U)
    rows = project(activate(rows, module.shape.activation), module.down, module.down_bias)
    return gather_sum(rows, module.gates, module.token_rows, module.shape.top_k)


def gather_sum(rows: Tensor, gates: Tensor, token_rows: Tensor, top_k: int) -> Tensor:
    """(R, D) -> (T, D), each token's K rows weighted with their gates, in plain PyTorch."""
    weighted = rows.index_select(0, token_rows) * gates.index_select(0, token_rows).unsqueeze(1)
    return weighted.unflatten(0, (-1, top_k)).sum(1).to(rows.dtype)


def loop(module: Experts, x: Tensor) -> Tensor:
    """What the published models run: expert after expert, each finding its tokens, which waits for the device."""
    out = torch.zeros_like(x)
    for expert, (up, down) in enumerate(zip(module.up, module.down, strict=True)):
        tokens, slots = torch.where(module.topk_ids == expert)
        up_bias, down_bias = (None if bias is None else bias[expert] for bias in (module.up_bias, module.down_bias))
        rows = F.linear(activate(F.linear(x[tokens], up, up_bias), module.shape.activation), down, down_bias)
        out.index_add_(0, tokens, (rows * module.topk_weights[tokens, slots, None]).to(x.dtype))
    return out


def of(compute: Callable[[Experts, Tensor], Tensor]) -> Build:
    return lambda shape, where, dtype: Experts(shape, dtype, where.dtype, compute)


def prepared(adapter: Adapter) -> Build:
    """Builds what a peer's adapter computes with, once it has taken the weights over."""

    def build(shape: Shape, where: Where, dtype: torch.dtype) -> nn.Module:
        module = Experts(shape, dtype, where.dtype, exact)  # whose weights the adapter may lay out anew
        module.compute = adapter(module)
        return module

    return build


def dense(shape: Shape, where: Where, dtype: torch.dtype) -> nn.Module:
    """One network for all tokens, K times as wide: the same floating-point operations without any routing."""
    bias = shape.activation == "gelu_tanh"
    return FeedForward(shape.hidden, shape.inner * shape.top_k, activation=shape.activation, bias=bias, dtype=dtype)


def tokens(shape: Shape, where: Where) -> Tensor:
    """(T, D), which takes a gradient."""
    return normal(where, shape.tokens, shape.hidden).to(where.dtype).requires_grad_()


def cost(shape: Shape, direction: str, size: int) -> tuple[int, int]:
    """2 R D (U + I) operations forward, twice that again backward.

    Least bytes: tokens and weights read once and the result written, forward; backward as well the result's gradient
    read and the gradients of tokens and weights written. What passes from one product to the next is left out.
    """
    passes = 3 if direction == BOTH else 1
    flops = 2 * shape.rows * shape.hidden * (shape.width + shape.inner) * passes
    elements = 2 * shape.tokens * shape.hidden + shape.experts * shape.hidden * (shape.width + shape.inner)
    return flops, elements * size * (2 if direction == BOTH else 1)


def cases(where: Where) -> list[Case]:
    compiled = where.compiler is not None
    ceiling = Provider(dense, compiled=compiled, ceiling=True)
    masters = {
        "dense, float32 masters": replace(ceiling, masters=True),
        "triton, float32 masters": Provider(of(ours("triton")), "triton", masters=True),
    }
    plain = {"grouped_mm": Provider(of(grouped_mm), compiled=compiled)}
    backends = {name: Provider(of(ours(name)), name) for name in ("triton", "torch")}
    official = {"loop": Provider(of(loop), captured=False)}
    official_compiled = {"loop, compiled": Provider(of(loop), captured=False, compiled=True, fullgraph=False)}
    found = []
    for name, shape in (TRAINING | OTHERS).items():
        users = backends | {"dense": ceiling} | plain | official | peers(shape, prepared)
        more = official_compiled | masters if name in TRAINING else {}
        found.append(Case("experts", name, BOTH, shape, users | more, tokens, of(exact), cost))
        if name in TRAINING:
            found.append(Case("experts", name, FORWARD, shape, users, tokens, of(exact), cost))
    for name in ("DSMoE-L-E16", "DSMoE-L-E48"):
        for count in SAMPLING_TOKENS:
            shape, case = replace(TRAINING[name], tokens=count), f"{name}, sampling {count}"
            found.append(Case("experts", case, FORWARD, shape, backends | plain | official, tokens, of(exact), cost))
    return found
