"""Attention with rotary embedding and QK norm, from the packed projection."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe_kernels.backend import Backend, Implementation, run
from diffmoe_kernels.checks import (
    check_choice,
    check_finite,
    check_floating,
    check_same_device,
    check_shape,
    check_whole,
    compute_dtype,
)
from diffmoe_kernels.measured import attention_class, fastest
from diffmoe_kernels.ops.rope_attention._torch import rope_attention_torch
from diffmoe_kernels.ops.rope_attention.reference import rope_attention_reference
from diffmoe_kernels.ops.rope_attention.tables import ROPES, check_rope, rope_table
from diffmoe_kernels.triton_support import HAS_TRITON

QK_NORMS = ("layernorm", "rmsnorm")

__all__ = ["QK_NORMS", "ROPES", "check_rope", "rope_attention", "rope_table"]


def rope_attention(
    qkv: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    rope: str | None = None,
    num_kv_heads: int | None = None,
    num_prefix_tokens: int = 0,
    qk_norm: str | None = None,
    q_norm_weight: Tensor | None = None,
    q_norm_bias: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    k_norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    scale: float | None = None,
    float16_tables: tuple[Tensor, Tensor] | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Bidirectional attention over each sample's N tokens.

    q and k are normalised per head, then rotated, then attend. B samples, H query heads, d = head_dim.

    Args:
        qkv: (B, N, 3, H, d) floating, the packed projection; with grouped-query heads (B, N, H + 2 * num_kv_heads, d):
            queries, then keys, then values. Query head h reads kv head ``h // (H / num_kv_heads)``.
        cos, sin: (N - num_prefix_tokens, d / 2) floating, one angle per pair of channels: `rope_table` or any other.
        rope: which channels form a pair: "1d" (j, j + d/2), "2d" (j, j + d/4) within each half of the channels,
            "2d_interleaved" (2j, 2j + 1); None for no rotation.
        num_kv_heads: required for the four-dimensional form.
        num_prefix_tokens: leading tokens (JiT's in-context class tokens) that are not rotated.
        qk_norm: "layernorm", "rmsnorm" or None.
        q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias: (d,) floating, learnable scale and shift of the norms.
        norm_eps: added to the norms' mean square.
        scale: of the scores; d^-0.5 where None.
        float16_tables: cos and sin in float16, each (N - num_prefix_tokens, d / 2), which the Triton kernels read where
            qkv is bfloat16: half the bytes of float32, eight times the precision of bfloat16. Where None they are cast
            at every call.
        backend: "reference", "torch" (scaled_dot_product_attention), "triton" (all of it in the kernels; up to 128
            channels a head, no gradient with respect to cos and sin) or "auto".

    Returns:
        (B, N, H * d) in qkv's dtype, or autocast's. Norms, rotation and softmax are float32.

    Raises:
        TypeError: tensors that are not floating.
        ValueError: shapes, devices or names that do not fit.
    """
    check_floating("qkv", qkv)
    if qkv.dim() == 5:
        check_shape("qkv", qkv, "B", "N", 3, "H", "d")
        if num_kv_heads not in (None, qkv.shape[3]):
            raise ValueError(f"num_kv_heads: expected {qkv.shape[3]} for qkv {tuple(qkv.shape)}, got {num_kv_heads}")
        num_heads, num_kv_heads = qkv.shape[3], qkv.shape[3]
        qkv = qkv.flatten(2, 3)
    else:
        check_shape("qkv", qkv, "B", "N", "H + 2 * num_kv_heads", "d")
        if num_kv_heads is None:
            raise ValueError("num_kv_heads: expected a number for qkv of 4 dimensions, got None")
        check_whole(num_kv_heads=num_kv_heads)
        num_heads = qkv.shape[2] - 2 * num_kv_heads
        if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of the query heads among {qkv.shape[2]}, got {num_kv_heads}"
            )
    num_tokens, head_dim = qkv.shape[1], qkv.shape[3]
    check_whole(num_prefix_tokens=num_prefix_tokens)
    if not 0 <= num_prefix_tokens <= num_tokens:
        raise ValueError(f"num_prefix_tokens: expected 0 to {num_tokens}, the tokens, got {num_prefix_tokens}")
    if rope is None:
        if cos is not None or sin is not None:
            raise ValueError("rope: expected the name of a pairing beside cos and sin, got None")
    else:
        check_rope(rope, head_dim)
        for name, table in (("cos", cos), ("sin", sin)):
            if table is None:
                raise ValueError(f"{name}: expected a table for rope {rope!r}, got None; see rope_table")
            check_floating(name, table)
            check_shape(name, table, num_tokens - num_prefix_tokens, head_dim // 2)
    halves = {}
    if float16_tables is not None:
        if cos is None:
            raise ValueError("float16_tables: expected cos and sin beside them, got None")
        if not isinstance(float16_tables, tuple) or len(float16_tables) != 2:
            raise TypeError(f"float16_tables: expected a tuple of two tensors, got {type(float16_tables).__name__}")
        halves = dict(zip(("float16_cos", "float16_sin"), float16_tables, strict=True))
        for name, table in halves.items():
            check_floating(name, table)
            check_shape(name, table, *cos.shape)
            if table.dtype != torch.float16:
                raise TypeError(f"{name}: expected torch.float16, got {table.dtype}")
    if qk_norm is not None:
        check_choice("qk_norm", qk_norm, QK_NORMS)
        check_finite(norm_eps=norm_eps)
    norms = {
        "q_norm_weight": q_norm_weight,
        "q_norm_bias": q_norm_bias,
        "k_norm_weight": k_norm_weight,
        "k_norm_bias": k_norm_bias,
    }
    for name, tensor in norms.items():
        if qk_norm is None and tensor is not None:
            raise ValueError(f"qk_norm: expected the norm that {name} belongs to, got None")
        check_floating(name, tensor, optional=True)
        check_shape(name, tensor, head_dim)
    check_same_device(qkv=qkv, cos=cos, sin=sin, **halves, **norms)
    return run(
        "rope_attention",
        backend,
        _IMPLEMENTATIONS,
        qkv.to(compute_dtype(qkv)),
        cos,
        sin,
        num_heads=num_heads,
        rope=rope,
        num_prefix_tokens=num_prefix_tokens,
        qk_norm=qk_norm,
        q_norm=(q_norm_weight, q_norm_bias),
        k_norm=(k_norm_weight, k_norm_bias),
        norm_eps=norm_eps,
        scale=head_dim**-0.5 if scale is None else scale,
        float16_tables=float16_tables,
    )


def _shape_class(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, **options: object) -> str:
    training = torch.is_grad_enabled() and qkv.requires_grad
    prepared = options["rope"] is not None, options["qk_norm"] is not None
    return attention_class(*qkv.shape[1::2], *prepared, qkv.dtype, training)


_IMPLEMENTATIONS = {
    "torch": Implementation(rope_attention_torch),
    "reference": Implementation(rope_attention_reference),
}
if HAS_TRITON:
    from diffmoe_kernels.ops.rope_attention import _library

    _IMPLEMENTATIONS = {
        "triton": Implementation(
            _library.rope_attention_triton,
            _library.why_not,
            automatic=fastest("rope_attention", "triton", _shape_class),
        ),
        **_IMPLEMENTATIONS,
    }
