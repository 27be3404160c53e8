"""`rope_attention` on the Triton kernels as one torch operator; it keeps the packed projection, the output and lse."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffmoe_kernels.operator import empty_for_none, operator
from diffmoe_kernels.ops.rope_attention._prepare import Norm, Settings, Table
from diffmoe_kernels.ops.rope_attention._triton import rope_attention_fwd
from diffmoe_kernels.ops.rope_attention._triton_backward import rope_attention_bwd
from diffmoe_kernels.triton_support import why_not_products

MAX_HEAD_DIM = 128
MAX_HEADS = MAX_SAMPLES = 65535  # of a grid's second and third dimension


@operator("rope_attention")
def _rope_attention(
    qkv: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    rope: str,
    num_prefix_tokens: int,
    norm: str,
    norm_eps: float,
    scale: float,
    keep_lse: bool,
) -> tuple[Tensor, Tensor]:
    """(B, N, H + 2 Hkv, d) -> (B, N, H, d) and the scores' log-sum-exp (B, H, N), empty unless it is kept."""
    q_norm, k_norm = Norm(q_weight, q_bias, norm_eps), Norm(k_weight, k_bias, norm_eps)
    settings = Settings(num_heads, rope, num_prefix_tokens, norm, scale)
    return rope_attention_fwd(qkv, Table(cos, sin), q_norm, k_norm, settings, keep_lse=keep_lse)


@_rope_attention.register_fake
def _(qkv, q_weight, q_bias, k_weight, k_bias, cos, sin, num_heads, *options):
    batch, num_tokens, _, head_dim = qkv.shape
    lse = qkv.new_empty((batch, num_heads, num_tokens) if options[-1] else (0,), dtype=torch.float32)
    return qkv.new_empty(batch, num_tokens, num_heads, head_dim), lse


@operator("rope_attention_backward")
def _rope_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    rope: str,
    num_prefix_tokens: int,
    norm: str,
    norm_eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to qkv and the norms' scales and shifts, empty where there are none."""
    q_norm, k_norm = Norm(q_weight, q_bias, norm_eps), Norm(k_weight, k_bias, norm_eps)
    settings = Settings(num_heads, rope, num_prefix_tokens, norm, scale)
    by_qkv, by_norms = rope_attention_bwd(grad.contiguous(), qkv, out, lse, Table(cos, sin), q_norm, k_norm, settings)
    return empty_for_none(qkv, by_qkv, *by_norms)


@_rope_attention_backward.register_fake
def _(grad, qkv, q_weight, q_bias, k_weight, k_bias, *_):
    norms = (None if one is None else torch.empty_like(one) for one in (q_weight, q_bias, k_weight, k_bias))
    return empty_for_none(qkv, torch.empty_like(qkv), *norms)


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.options = inputs[7:13]


def _backward(ctx, grad, _):
    return _rope_attention_backward(grad, *ctx.saved_tensors, *ctx.options)


_rope_attention.register_autograd(_backward, setup_context=_save)


def rope_attention_triton(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    num_heads: int,
    rope: str | None,
    num_prefix_tokens: int,
    qk_norm: str | None,
    q_norm: tuple[Tensor | None, Tensor | None],
    k_norm: tuple[Tensor | None, Tensor | None],
    norm_eps: float,
    scale: float,
    float16_tables: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    (q_weight, k_weight), (q_bias, k_bias) = _both(q_norm[0], k_norm[0], 1.0), _both(q_norm[1], k_norm[1], 0.0)
    norms = tuple(None if one is None else one.contiguous() for one in (q_weight, q_bias, k_weight, k_bias))
    tables, kind = (cos, sin), torch.float32
    if qkv.dtype == torch.bfloat16:
        tables, kind = float16_tables or tables, torch.float16
    tables = (None if one is None else one.detach().to(kind).contiguous() for one in tables)
    keeps = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (qkv, *norms))
    options = (num_heads, rope or "none", num_prefix_tokens, qk_norm or "none", norm_eps, scale)
    out, _ = _rope_attention(qkv.contiguous(), *norms, *tables, *options, keeps)
    return out.flatten(2)


def _both(q: Tensor | None, k: Tensor | None, neutral: float) -> tuple[Tensor | None, Tensor | None]:
    """The two with what changes nothing in place of a missing one, if the other is there."""
    if (q is None) == (k is None):
        return q, k
    return torch.full_like(k, neutral) if q is None else q, torch.full_like(q, neutral) if k is None else k


def why_not(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, *, num_heads: int, scale: float, **_: object
) -> str | None:
    if qkv.shape[3] > MAX_HEAD_DIM:
        return f"the kernels take up to {MAX_HEAD_DIM} channels a head, not {qkv.shape[3]}"
    if qkv.shape[0] > MAX_SAMPLES:
        return f"the kernels take up to {MAX_SAMPLES} samples, not {qkv.shape[0]}"
    if num_heads > MAX_HEADS:
        return f"the kernels take up to {MAX_HEADS} heads, not {num_heads}"
    if qkv.shape[3] % 2:
        return f"the kernels take an even number of channels a head, not {qkv.shape[3]}"
    if qkv.dtype == torch.float16 and abs(scale) > math.log(2):  # q is scaled by it before it is rounded
        return f"the kernels take a scale of at most ln 2 in float16, not {scale}"
    if torch.is_grad_enabled() and any(table is not None and table.requires_grad for table in (cos, sin)):
        return "the kernels give no gradient with respect to cos and sin"
    return why_not_products(qkv)
