"""Kernels for Mixture-of-Experts diffusion transformers, as drop-in PyTorch modules."""

from diffmoe_kernels.backend import available_backends
from diffmoe_kernels.modules.attention import RoPEAttention
from diffmoe_kernels.modules.expert_choice import ExpertChoiceAux, ExpertChoiceMoE
from diffmoe_kernels.modules.moe import Balance, MoE, MoEAux
from diffmoe_kernels.routing import Routing
from diffmoe_kernels.version import __version__

__all__ = [
    "Balance",
    "ExpertChoiceAux",
    "ExpertChoiceMoE",
    "MoE",
    "MoEAux",
    "RoPEAttention",
    "Routing",
    "__version__",
    "available_backends",
]
