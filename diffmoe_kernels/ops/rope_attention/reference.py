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
        q, k = (_rotate_after(num_prefix_tokens, heads, cos, sin, rope) for heads in (q, k))
    return q, k, v


def _rotate_after(num_prefix_tokens: int, x: Tensor, cos: Tensor, sin: Tensor, rope: str) -> Tensor:
    if num_prefix_tokens == 0:
        return rotate(x, cos, sin, rope)
    return torch.cat([x[:, :num_prefix_tokens], rotate(x[:, num_prefix_tokens:], cos, sin, rope)], dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rope: str) -> Tensor:
    """Turns each pair of channels of x (B, N, H, d) by its angle in cos and sin (N, d / 2).

    Pair j is (j, j + d/2) for "1d"; (j, j + d/4) within each half of the channels for "2d"; (2j, 2j + 1) for
    "2d_interleaved".
    """
    pattern, of_table, pair_dim = {
        "1d": ((1, 2, -1), (1, 1, -1), -2),
        "2d": ((2, 2, -1), (2, 1, -1), -2),
        "2d_interleaved": ((1, -1, 2), (1, -1, 1), -1),
    }[rope]
    others = x.unflatten(-1, pattern).roll(1, pair_dim).flatten(-3)  # at each channel the other of its pair
    cos, sin = (table.to(x).unflatten(-1, of_table) for table in (cos, sin))
    cos = torch.cat([cos, cos], pair_dim).flatten(-3).unsqueeze(1)  # (N, 1, d)
    sin = torch.cat([-sin, sin], pair_dim).flatten(-3).unsqueeze(1)
    return x * cos + others * sin
