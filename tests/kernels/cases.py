"""Launches at the published models' sizes, on meta tensors, for `tests.kernels.ahead_of_time`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from diffmoe_kernels.ops.adaln._triton import adaln_bwd, adaln_fwd
from diffmoe_kernels.ops.experts import _grouped_mm
from diffmoe_kernels.ops.experts._triton import up_projection
from diffmoe_kernels.ops.experts._triton_backward import down_backward
from diffmoe_kernels.ops.grouped_gemm._triton import multiply_rows
from diffmoe_kernels.ops.grouped_gemm._triton_sum_rows import sum_rows
from diffmoe_kernels.ops.grouped_gemm._triton_weight_grad import weight_grad
from diffmoe_kernels.ops.permute._triton import permute_fwd, unpermute_bwd, unpermute_fwd
from diffmoe_kernels.ops.rope_attention._prepare import Norm, Settings, Table
from diffmoe_kernels.ops.rope_attention._triton import rope_attention_fwd
from diffmoe_kernels.ops.rope_attention._triton_backward import rope_attention_bwd
from diffmoe_kernels.ops.router_topk import _triton as router
from diffmoe_kernels.ops.router_topk import _triton_backward as router_backward
from diffmoe_kernels.ops.router_topk._from_topk import routing_from_topk_bwd, routing_from_topk_fwd
from diffmoe_kernels.ops.token_drop import _capacity
from diffmoe_kernels.ops.token_drop import _triton as token_drop
from diffmoe_kernels.ops.token_drop._choice import token_choice_drop_fwd
from diffmoe_kernels.routing import Routing

# T, D, I, E, rows a token (K, or 1 in expert choice), activation
SHAPES = {
    "DSMoE-L-E16": (16384, 1024, 2048, 16, 2, "swiglu"),
    "DSMoE-L-E48": (16384, 1024, 448, 48, 5, "swiglu"),
    "DSMoE-S-E16": (65536, 384, 768, 16, 2, "swiglu"),
    "DSMoE-S-E48": (65536, 384, 128, 48, 5, "swiglu"),
    "DSMoE-3B-E16 sampling": (2048, 1152, 2880, 16, 2, "swiglu"),
    "DiffMoE-L-E8": (16384, 1024, 4096, 8, 1, "gelu_tanh"),
    "DSMoE-L-E48 sampling": (512, 1024, 448, 48, 5, "swiglu"),
    "256 experts": (16384, 1024, 448, 256, 8, "swiglu"),
    "one expert": (4096, 1024, 2048, 1, 1, "swiglu"),
    "one token": (1, 1024, 448, 1, 1, "gelu_tanh"),
    "odd": (1000, 72, 40, 5, 2, "silu"),
    "wide": (4096, 4096, 64, 16, 2, "silu"),
}


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_experts(shape: tuple, dtype: torch.dtype, backward: bool, bias: bool) -> None:
    num_tokens, hidden, inner, num_experts, top_k, activation = shape
    rows, width = num_tokens * top_k, inner * (2 if activation == "swiglu" else 1)
    number = partial(meta, dtype=dtype)
    x, tokens, offsets, gates = (
        number(num_tokens, hidden),
        meta(rows),
        meta(num_experts),
        meta(rows, dtype=torch.float32),
    )
    up, down = number(num_experts, width, hidden), number(num_experts, hidden, inner)
    up_bias, down_bias = (number(num_experts, width), number(num_experts, hidden)) if bias else (None, None)
    token_offsets, token_rows = meta(num_tokens + 1), meta(rows)
    pre, act = up_projection(x, tokens, offsets, up, up_bias, activation, keep_pre=backward)
    out = multiply_rows(act, down.mT, offsets, bias=down_bias)
    unpermute_fwd(out, gates, token_offsets, token_rows)
    if not backward:
        return
    master = {"token_indices": tokens, "dtype": torch.float32}
    grad_pre, weighted, _ = down_backward(x, tokens, gates, offsets, down, down_bias, pre, activation)
    unpermute_fwd(multiply_rows(grad_pre, up, offsets), None, token_offsets, token_rows)
    weight_grad(grad_pre, x, offsets, gather="b", **master)
    weight_grad(x, weighted, offsets, gather="a", **master)
    if bias:
        sum_rows(grad_pre, offsets, dtype=torch.float32)
        sum_rows(x, offsets, gates=gates, **master)


def launch_experts_in_tf32(shape: tuple, bias: bool) -> None:
    """As where torch's setting allows float32 products in TF32."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        launch_experts(shape, torch.float32, True, bias)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"


def launch_transposed(num_rows: int) -> None:
    """Products whose operands have the rows side by side in memory, as `grouped_gemm` may be given them."""
    across, offsets = meta(320, num_rows, dtype=torch.bfloat16).mT, meta(4)
    multiply_rows(across, meta(4, 192, 320, dtype=torch.bfloat16).mT, offsets, clears_rest=True)
    weight_grad(across, across, offsets, dtype=torch.bfloat16)


def launch_around_grouped_mm(shape: tuple, dtype: torch.dtype) -> None:
    """What lies between the products of `grouped_mm`, with and without biases."""
    num_tokens, hidden, inner, num_experts, top_k, activation = shape
    rows, width = num_tokens * top_k, inner * (2 if activation == "swiglu" else 1)
    number, gates = partial(meta, dtype=dtype), meta(rows, dtype=torch.float32)
    x, up, down = number(num_tokens, hidden), number(num_experts, width, hidden), number(num_experts, hidden, inner)
    routing = Routing(meta(rows), gates, meta(num_experts), meta(num_tokens + 1), meta(rows))
    for biases in ((None, None), (number(num_experts, width), number(num_experts, hidden))):
        _, pre = _grouped_mm.experts_fwd(x, routing, up, down, *biases, activation, keep_pre=True)
        options = {"needs_x": True, "needs_weights": True, "weight_dtype": torch.float32}
        options["bias_dtype"] = None if biases[0] is None else torch.float32
        _grouped_mm.experts_bwd(x, x, routing, up, down, biases[1], pre, activation, **options)


def launch_movement(shape: tuple, dtype: torch.dtype) -> None:
    num_tokens, hidden, _, num_experts, top_k, _ = shape
    rows = num_tokens * top_k
    x, tokens, offsets, gates = (
        meta(num_tokens, hidden, dtype=dtype),
        meta(rows),
        meta(num_experts),
        meta(rows, dtype=torch.float32),
    )
    unpermute_bwd(x, permute_fwd(x, tokens, offsets), gates, tokens, offsets)
    unpermute_fwd(meta(rows, hidden, dtype=dtype), gates, meta(num_tokens + 1), meta(rows), x)


def launch_router(num_tokens: int, num_experts: int, top_k: int, groups: int, softmax: bool) -> None:
    logits = meta(num_tokens, num_experts, dtype=torch.float32)
    bias = None if softmax else meta(num_experts, dtype=torch.float32)
    weights, scores, gates, ids, *_, token_rows = router.router_topk_fwd(
        logits, bias, top_k, softmax, groups, max(groups // 2, 1), 0.0, True, 2.5
    )
    for grads in ((weights, scores, gates), (None, None, gates)):
        router_backward.router_topk_bwd(*grads, scores, ids, token_rows, softmax, True, 2.5, torch.float32)


def launch_given_choices(num_tokens: int, num_experts: int, top_k: int) -> None:
    for kind in (torch.int32, torch.int64):
        ids, weights = meta(num_tokens, top_k, dtype=kind), meta(num_tokens, top_k, dtype=FLOAT32)
        gates, _, _, token_offsets, token_rows = routing_from_topk_fwd(ids, weights, num_experts)
        routing_from_topk_bwd(gates, ids, token_offsets, token_rows, num_experts, FLOAT32)
        token_choice_drop_fwd(ids, weights, num_experts, num_tokens * top_k // num_experts)


def launch_token_drop(num_tokens: int, num_experts: int) -> None:
    scores, thresholds = meta(num_tokens, num_experts, dtype=torch.float32), meta(num_experts, dtype=torch.float32)
    capacity = num_tokens // num_experts
    gates, _, *maps = token_drop.token_drop_fwd(scores, capacity)
    token_drop.token_drop_bwd(gates, *maps, torch.float32)
    for by_token in (False, True):
        token_drop.token_drop_fwd(scores, capacity, 1, scores, thresholds, by_token)
    _capacity.capacity_loss_fwd(scores, *maps)
    _capacity.capacity_loss_bwd(meta(dtype=torch.float32), scores, *maps)
    _capacity.capacity_quantile_fwd(scores, capacity)


# B, N, H, Hkv, d, prefix tokens, rotation, norm
ATTENTION = {
    "DSMoE-S": (256, 256, 6, 6, 64, 0, "2d", "none"),
    "DSMoE-L": (64, 256, 16, 16, 64, 0, "2d", "none"),
    "DSMoE-3B": (64, 256, 16, 16, 72, 0, "2d", "none"),
    "JiT-L": (64, 288, 16, 16, 64, 32, "2d_interleaved", "rmsnorm"),
    "512 px": (16, 1024, 16, 16, 64, 0, "2d", "none"),
    "layer norm, grouped heads": (64, 256, 16, 4, 64, 0, "1d", "layernorm"),
    "narrow": (64, 64, 6, 6, 16, 0, "none", "none"),
    "32 channels": (64, 256, 8, 8, 32, 0, "1d", "none"),
    "96 channels": (64, 256, 8, 8, 96, 0, "2d", "none"),
    "wide": (64, 256, 8, 8, 128, 0, "1d", "rmsnorm"),
}


def launch_attention(sizes: tuple, dtype: torch.dtype) -> None:
    batch, num_tokens, heads, kv_heads, head_dim, prefix, rope, norm = sizes
    qkv = meta(batch, num_tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    kind = FLOAT16 if dtype == BFLOAT16 else FLOAT32
    tables = (meta(num_tokens - prefix, head_dim // 2, dtype=kind) if rope != "none" else None for _ in range(2))
    scale, shift = (meta(head_dim, dtype=FLOAT32) if norm != "none" else None for _ in range(2))
    vectors = Norm(scale, shift if norm == "layernorm" else None, 1e-6)
    around = Table(*tables), vectors, vectors, Settings(heads, rope, prefix, norm, head_dim**-0.5)
    out, lse = rope_attention_fwd(qkv, *around, keep_lse=True)
    rope_attention_fwd(qkv, *around, keep_lse=False)
    rope_attention_bwd(out, qkv, out, lse, *around)


# B, N, D, norm, dtype of the vectors
ADALN = {
    "DSMoE-L": (64, 256, 1024, "layernorm", torch.bfloat16),
    "DSMoE-S": (256, 256, 384, "layernorm", torch.float32),
    "DSMoE-3B": (64, 256, 1152, "rmsnorm", torch.float32),
    "wide": (8, 256, 4096, "layernorm", torch.bfloat16),
    "DSMoE-L sampling": (2, 256, 1024, "layernorm", torch.bfloat16),
    "one token": (1, 1, 1152, "rmsnorm", torch.bfloat16),
}


def launch_adaln(sizes: tuple, dtype: torch.dtype, branch: torch.dtype | None = None) -> None:
    """The three ops, forward and backward; the norm of one with a weight has one in each.

    branch: of what linear layers give and take, where autocast has that differ from the stream.
    """
    batch, num_tokens, hidden, norm, kind = sizes
    x = meta(batch, num_tokens, hidden, dtype=dtype)
    y = meta(batch, num_tokens, hidden, dtype=branch or dtype)
    gate, shift, scale = meta(batch, 6 * hidden, dtype=kind).chunk(6, dim=1)[:3]
    weight = meta(hidden, dtype=FLOAT32) if norm == "rmsnorm" else None
    for residual in (None, (y, gate)):
        adaln_fwd(x, residual, (shift, scale), weight, norm, 1e-6, y.dtype)
        grad_stream = None if residual is None else x
        adaln_bwd(grad_stream, y, x, residual, scale, weight, norm, 1e-6, kind)
    adaln_fwd(x, (y, gate), None, None, "none", 0.0)
    adaln_bwd(x, None, x, (y, gate), None, None, "none", 0.0)


BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
CASES: dict[str, tuple[Callable[[], object], torch.dtype]] = {}
for name, shape in SHAPES.items():
    backward = "sampling" not in name
    CASES[f"experts {name}"] = partial(launch_experts, shape, BFLOAT16, backward, name.startswith("DiffMoE")), BFLOAT16
for name, plain in (("256 experts", False), ("one token", True)):
    CASES[f"experts {name} float32"] = partial(launch_experts, SHAPES[name], FLOAT32, not plain, not plain), FLOAT32
for name in ("DSMoE-L-E16", "DSMoE-S-E48", "DiffMoE-L-E8"):
    CASES[f"experts {name} TF32"] = partial(launch_experts_in_tf32, SHAPES[name], name.startswith("DiffMoE")), FLOAT32
for num_rows in (3000, 4096):
    CASES[f"transposed, {num_rows} rows"] = partial(launch_transposed, num_rows), BFLOAT16
for dtype in (FLOAT16, FLOAT32):
    CASES[f"experts odd {dtype}"] = partial(launch_experts, SHAPES["odd"], dtype, True, True), dtype
CASES["experts DSMoE-S-E48 float32"] = partial(launch_experts, SHAPES["DSMoE-S-E48"], FLOAT32, True, False), FLOAT32
for name in ("DSMoE-L-E48", "DiffMoE-L-E8"):
    CASES[f"around grouped_mm {name}"] = partial(launch_around_grouped_mm, SHAPES[name], BFLOAT16), BFLOAT16
for name in ("DSMoE-L-E48", "DSMoE-S-E48", "one token", "wide"):
    CASES[f"movement {name}"] = partial(launch_movement, SHAPES[name], BFLOAT16), BFLOAT16
CASES["movement narrow"] = partial(launch_movement, (1, 64, 64, 1, 1, "silu"), BFLOAT16), BFLOAT16
for sizes in (
    *((65536, 48, 5, 1, False), (16384, 16, 2, 2, False), (65536, 16, 1, 1, True), (4096, 256, 8, 8, False)),
    (4096, 256, 129, 1, False),  # more choices than a tile has room for at the usual tokens
):
    CASES[f"router {sizes}"] = partial(launch_router, *sizes), FLOAT32
for sizes in ((65536, 48, 5), (4096, 256, 8)):
    CASES[f"given choices {sizes}"] = partial(launch_given_choices, *sizes), FLOAT32
for sizes in ((16384, 8), (300000, 256), (1, 1)):  # in registers, in several passes, one token
    CASES[f"token_drop {sizes}"] = partial(launch_token_drop, *sizes), FLOAT32
for name in ATTENTION:
    CASES[f"attention {name}"] = partial(launch_attention, ATTENTION[name], BFLOAT16), BFLOAT16
for name in ("DSMoE-L", "JiT-L", "layer norm, grouped heads", "wide"):
    CASES[f"attention {name} float32"] = partial(launch_attention, ATTENTION[name], FLOAT32), FLOAT32
for name in ("DSMoE-L", "JiT-L", "wide"):
    CASES[f"attention {name} float16"] = partial(launch_attention, ATTENTION[name], FLOAT16), FLOAT16
for name in ADALN:
    CASES[f"adaln {name}"] = partial(launch_adaln, ADALN[name], BFLOAT16), BFLOAT16
CASES["adaln DSMoE-L float32"] = partial(launch_adaln, ADALN["DSMoE-L"], FLOAT32), FLOAT32
CASES["adaln DiffMoE-L"] = partial(launch_adaln, ADALN["DSMoE-L"], FLOAT32, BFLOAT16), FLOAT32
