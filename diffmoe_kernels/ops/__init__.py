"""Functional ops, one folder each: a validated public function and the reference that defines it."""

from diffmoe_kernels.ops.adaln import adaln, gated_residual, gated_residual_adaln
from diffmoe_kernels.ops.experts import experts
from diffmoe_kernels.ops.grouped_gemm import grouped_gemm
from diffmoe_kernels.ops.permute import permute, unpermute
from diffmoe_kernels.ops.rope_attention import rope_attention, rope_table
from diffmoe_kernels.ops.router_topk import RouterTopK, router_topk, routing_from_topk
from diffmoe_kernels.ops.token_drop import (
    capacity_loss,
    capacity_quantile,
    token_choice_drop,
    token_drop,
    token_drop_predicted,
)

__all__ = [
    "RouterTopK",
    "adaln",
    "capacity_loss",
    "capacity_quantile",
    "experts",
    "gated_residual",
    "gated_residual_adaln",
    "grouped_gemm",
    "permute",
    "rope_attention",
    "rope_table",
    "router_topk",
    "routing_from_topk",
    "token_choice_drop",
    "token_drop",
    "token_drop_predicted",
    "unpermute",
]
