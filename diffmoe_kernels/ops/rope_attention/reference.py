"""The definition of `rope_attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffmoe_kernels.checks import at_least_float32
from diffmoe_kernels.ops.adaln.reference import normalize


def rope_attention_reference(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, *, num_heads: int, scale: float, **preparation: Any
) -> Tensor:
    """(B, N, H + 2 Hkv, d) -> (B, N, H * d), in float32 until the end; ``preparation`` as of `prepare_qkv`."""
    q, k, v = map(at_least_float32, prepare_qkv(qkv, cos, sin, num_heads, **preparation))
    k, v = (heads.repeat_interleave(num_heads // heads.shape[2], dim=2) for heads in (k, v))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    out = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)
    return out.flatten(2).to(qkv.dtype)


def prepare_qkv(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    *,
    rope: str | None,
    num_prefix_tokens: int,
    qk_norm: str | None,
    q_norm: tuple[Tensor | None, Tensor | None],
    k_norm: tuple[Tensor | None, Tensor | None],
    norm_eps: float,
    float16_tables: object = None,  # which only the kernels read
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits, normalises per head and rotates: q (B, N, H, d), k and v (B, N, Hkv, d).

    What is normalised or rotated is in float32 at least; the rest is a view of qkv.
    """
    num_kv_heads = (qkv.shape[2] - num_heads) // 2
    q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=2)
    if qk_norm is not None or rope is not None:
        q, k = at_least_float32(q), at_least_float32(k)
    if qk_norm is not None:
        q = normalize(q, qk_norm, *q_norm, norm_eps)
        k = normalize(k, qk_norm, *k_norm, norm_eps)
    if rope is not None:
        q = torch.cat([q[:, :num_prefix_tokens], rotate(q[:, num_prefix_tokens:], cos, sin, rope)], dim=1)
        k = torch.cat([k[:, :num_prefix_tokens], rotate(k[:, num_prefix_tokens:], cos, sin, rope)], dim=1)
    return q, k, v


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rope: str) -> Tensor:
    """Turns each pair of channels of x (B, N, H, d) by its angle in cos and sin (N, d / 2).

    Pair j is (j, j + d/2) for "1d"; (j, j + d/4) within each half of the channels for "2d"; (2j, 2j + 1) for
    "2d_interleaved".
    """
    pattern = {"1d": (1, 2, -1), "2d": (2, 2, -1), "2d_interleaved": (1, -1, 2)}[rope]
    pairs = x.unflatten(-1, pattern)
    pair_dim = -1 if rope == "2d_interleaved" else -2
    first, second = pairs.unbind(pair_dim)  # each (B, N, H, halves, d / 2 / halves)
    cos, sin = (table.to(x).view(table.shape[0], 1, *first.shape[-2:]) for table in (cos, sin))
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=pair_dim).flatten(-3)
