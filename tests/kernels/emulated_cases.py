"""Launches of the matrix kernels on tensors, compiled for a chip that is not there and run on the CPU, as far from
float64 as they are: python -m tests.kernels.emulated_cases 90 [case ...]

Sizes small enough to run, and large enough for the tiles and all stages of the pipelines that training takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from diffmoe_kernels.ops.experts._triton import up_projection
from diffmoe_kernels.ops.experts._triton_backward import down_backward
from diffmoe_kernels.ops.experts.reference import activate
from diffmoe_kernels.ops.grouped_gemm._triton import multiply_rows
from diffmoe_kernels.ops.grouped_gemm._triton_sum_rows import sum_rows
from diffmoe_kernels.ops.grouped_gemm._triton_weight_grad import weight_grad
from diffmoe_kernels.ops.rope_attention._prepare import Norm, Settings, Table
from diffmoe_kernels.ops.rope_attention._triton import rope_attention_fwd
from diffmoe_kernels.ops.rope_attention._triton_backward import rope_attention_bwd
from diffmoe_kernels.ops.rope_attention.reference import rope_attention_reference
from tests.kernels.ptx.cases import error, main

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
DOUBLE = torch.float64


def attention(
    num_tokens: int, heads: int, kv_heads: int, head_dim: int, prefix: int, rope: str, norm: str, dtype: torch.dtype
) -> dict[str, float]:
    torch.manual_seed(0)
    qkv, grad = (torch.randn(1, num_tokens, n, head_dim).to(dtype) for n in (heads + 2 * kv_heads, heads))
    kind = FLOAT16 if dtype == BFLOAT16 else FLOAT32
    angles = torch.randn(num_tokens - prefix, head_dim // 2)
    tables = [None, None] if rope == "none" else [angles.cos().to(kind), angles.sin().to(kind)]
    q_weight, q_bias, k_weight, k_bias = torch.randn(4, head_dim) * 0.1 + torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    names = {"none": (), "rmsnorm": ("q_weight", "k_weight")}.get(norm, ("q_weight", "q_bias", "k_weight", "k_bias"))
    vectors = {"q_weight": q_weight, "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias}
    norms = tuple(one if name in names else None for name, one in vectors.items())
    around = Table(*tables), Norm(*norms[:2], 1e-6), Norm(*norms[2:], 1e-6)
    settings = Settings(heads, rope, prefix, norm, head_dim**-0.5)

    out, lse = rope_attention_fwd(qkv, *around, settings, keep_lse=True)
    grad_qkv, grad_norms = rope_attention_bwd(grad, qkv, out, lse, *around, settings)

    exact, leaves = qkv.to(DOUBLE).requires_grad_(), [n if n is None else n.to(DOUBLE).requires_grad_() for n in norms]
    wanted = rope_attention_reference(
        exact,
        *(one if one is None else one.to(DOUBLE) for one in tables),
        num_heads=heads,
        scale=head_dim**-0.5,
        rope=None if rope == "none" else rope,
        num_prefix_tokens=prefix,
        qk_norm=None if norm == "none" else norm,
        q_norm=tuple(leaves[:2]),
        k_norm=tuple(leaves[2:]),
        norm_eps=1e-6,
    )
    wanted.backward(grad.flatten(2).to(DOUBLE))
    errors = {"out": error(out.flatten(2), wanted.detach()), "qkv": error(grad_qkv, exact.grad)}
    pairs = zip(vectors, grad_norms, leaves, strict=True)
    return errors | {name: error(found, leaf.grad) for name, found, leaf in pairs if leaf is not None}


def experts(
    num_tokens: int,
    hidden: int,
    inner: int,
    sizes: tuple[int, ...],
    activation: str,
    bias: bool,
    dtype: torch.dtype,
    num_shares: int | None = None,
) -> dict[str, float]:
    """Each kernel against what it should make of what those before it made. num_shares: as `weight_grad` takes it."""
    torch.manual_seed(0)
    num_rows, num_groups = sum(sizes), len(sizes)
    width = 2 * inner if activation == "swiglu" else inner
    tokens, gates = torch.randint(num_tokens, (num_rows,), dtype=torch.int32), torch.rand(num_rows)
    offsets = torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    x, grad = torch.randn(2, num_tokens, hidden).to(dtype)
    up = (torch.randn(num_groups, width, hidden) * hidden**-0.5).to(dtype)
    down = (torch.randn(num_groups, hidden, inner) * inner**-0.5).to(dtype)
    up_bias, down_bias = (torch.randn(num_groups, n).to(dtype) * 0.1 if bias else None for n in (width, hidden))

    pre, hidden_rows = up_projection(x, tokens, offsets, up, up_bias, activation, keep_pre=True)
    rows = multiply_rows(hidden_rows, down.mT, offsets, bias=down_bias)
    grad_pre, weighted, grad_gates = down_backward(grad, tokens, gates, offsets, down, down_bias, pre, activation)
    grad_x_rows = multiply_rows(grad_pre, up, offsets)
    gathers = {"token_indices": tokens, "dtype": FLOAT32}
    shares = {**gathers, "num_shares": num_shares}
    found = {
        **{"pre": pre, "hidden": hidden_rows, "rows": rows, "grad_pre": grad_pre, "weighted": weighted},
        **{"gates": grad_gates, "grad_rows": grad_x_rows},
        "up": weight_grad(grad_pre, x, offsets, gather="b", **shares),
        "down": weight_grad(grad, weighted, offsets, gather="a", **shares),
        "down_bias": sum_rows(grad, offsets, gates=gates, **gathers),
    }

    def multiply(left: Tensor, matrices: Tensor, biases: Tensor | None = None) -> Tensor:
        """(R, K) and (E, K, N) -> (R, N)"""
        parts = zip(left.to(DOUBLE).split(sizes), matrices.to(DOUBLE), strict=True)
        product = torch.cat([rows @ matrix for rows, matrix in parts])
        return product if biases is None else product + of_rows(biases)

    def of_rows(vectors: Tensor) -> Tensor:
        return vectors.to(DOUBLE).repeat_interleave(torch.tensor(sizes), 0)

    def outer(a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(a.to(DOUBLE).split(sizes), b.to(DOUBLE).split(sizes), strict=True)
        return torch.stack([one.T @ other for one, other in pairs])

    kept = pre.to(DOUBLE).requires_grad_()
    active = activate(kept, activation)
    x_rows, grad_rows, gate = x[tokens.long()], grad[tokens.long()].to(DOUBLE), gates.to(DOUBLE)[:, None]
    by_hidden = multiply(grad_rows, down)
    by_gate = by_hidden * active.detach() if down_bias is None else None
    if by_gate is None:
        by_gate = torch.cat([by_hidden * active.detach(), grad_rows * of_rows(down_bias)], 1)
    wanted = {
        "pre": multiply(x_rows, up.mT, up_bias),
        "hidden": active.detach(),
        "rows": multiply(hidden_rows, down.mT, down_bias),
        "grad_pre": torch.autograd.grad(active, kept, by_hidden * gate)[0],
        "weighted": active.detach() * gate,
        "gates": by_gate.sum(1),
        "grad_rows": multiply(grad_pre, up),
        "up": outer(grad_pre, x_rows),
        "down": outer(grad_rows, weighted),
        "down_bias": torch.stack([one.sum(0) for one in (grad_rows * gate).split(sizes)]),
    }
    return {name: error(one, wanted[name]) for name, one in found.items()}


def in_tf32(case: Callable[[], dict[str, float]]) -> dict[str, float]:
    """As where torch's setting allows float32 products in TF32."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        return case()
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"


MANY, FEW = (170, 0, 190, 1, 319), (20, 0, 1, 40, 9)  # rows of the groups, by which the tiles are picked
CASES = {
    # N, H, Hkv, d, prefix tokens, rotation, norm
    "attention": partial(attention, 256, 2, 2, 64, 0, "2d", "none", BFLOAT16),
    "attention, float16, part of a block": partial(attention, 100, 2, 2, 64, 0, "1d", "none", FLOAT16),
    "attention with prefix and norm": partial(attention, 288, 1, 1, 64, 32, "2d_interleaved", "rmsnorm", BFLOAT16),
    "attention of 72 channels": partial(attention, 256, 1, 1, 72, 0, "2d", "none", BFLOAT16),
    "attention of many tokens": partial(attention, 333, 1, 1, 64, 0, "2d", "none", BFLOAT16),
    "attention of grouped heads": partial(attention, 130, 4, 1, 64, 0, "1d", "layernorm", BFLOAT16),
    "attention of 128 channels": partial(attention, 140, 1, 1, 128, 0, "1d", "rmsnorm", BFLOAT16),
    # T, D, I, rows of the groups, activation, biases
    "experts": partial(experts, 300, 320, 192, MANY, "swiglu", False, BFLOAT16),
    "experts of few columns": partial(experts, 300, 136, 128, MANY, "swiglu", False, BFLOAT16, 11),
    "experts with biases": partial(experts, 300, 320, 256, MANY, "gelu_tanh", True, BFLOAT16),
    "experts with many rows": partial(experts, 300, 320, 192, (1030,), "swiglu", True, BFLOAT16),
    "experts with biases, few rows": partial(experts, 50, 264, 72, FEW, "silu", True, FLOAT16),
    "experts, unaligned": partial(experts, 50, 76, 36, FEW, "swiglu", True, BFLOAT16),
    "experts in TF32": partial(in_tf32, partial(experts, 200, 160, 72, (150, 1, 250), "swiglu", True, FLOAT32)),
}

if __name__ == "__main__":
    main(CASES, multiprocessors=2)
