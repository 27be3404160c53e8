"""Layers that own parameters: router, experts, MoE layer, attention."""

from diffmoe_kernels.modules.attention import RoPEAttention
from diffmoe_kernels.modules.feed_forward import Experts, FeedForward
from diffmoe_kernels.modules.moe import Balance, MoE, MoEAux
from diffmoe_kernels.modules.router import TopKRouter

__all__ = ["Balance", "Experts", "FeedForward", "MoE", "MoEAux", "RoPEAttention", "TopKRouter"]
