"""`rope_attention` as norm and rotation in PyTorch around `scaled_dot_product_attention`."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from diffmoe_kernels.ops.rope_attention.reference import prepare_qkv


def rope_attention_torch(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, *, num_heads: int, scale: float, **preparation: Any
) -> Tensor:
    q, k, v = prepare_qkv(qkv, cos, sin, num_heads, **preparation)
    gqa = k.shape[2] != num_heads
    q, k, v = (heads.to(qkv.dtype).transpose(1, 2) for heads in (q, k, v))  # (B, heads, N, d)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2).flatten(2)
