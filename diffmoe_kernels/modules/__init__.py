"""Layers that own parameters: router, experts, MoE layer, attention."""

from diffmoe_kernels.modules.attention import RoPEAttention
from diffmoe_kernels.modules.expert_choice import ExpertChoiceAux, ExpertChoiceMoE
from diffmoe_kernels.modules.feed_forward import Experts, FeedForward
from diffmoe_kernels.modules.moe import Balance, MoE, MoEAux
from diffmoe_kernels.modules.router import ExpertChoiceRouter, TopKRouter

__all__ = [
    "Balance",
    "ExpertChoiceAux",
    "ExpertChoiceMoE",
    "ExpertChoiceRouter",
    "Experts",
    "FeedForward",
    "MoE",
    "MoEAux",
    "RoPEAttention",
    "TopKRouter",
]
