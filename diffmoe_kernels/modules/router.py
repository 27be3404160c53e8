"""The routers: token choice and expert choice."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffmoe_kernels import ops
from diffmoe_kernels.backend import Backend, check_backend
from diffmoe_kernels.checks import check_finite
from diffmoe_kernels.modules.buffers import Float32Buffers
from diffmoe_kernels.modules.linear import float32_linear
from diffmoe_kernels.ops.router_topk import check_router


class TopKRouter(Float32Buffers):
    """Scores every token against every expert and takes its top-k (`ops.router_topk`).

    Parameters and buffers: ``weight`` (E, D); ``expert_bias`` (E,) float32, the selection bias, which only
    `MoE.update_routing_state` changes.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score_function: str = "sigmoid",
        normalize_weights: bool = True,
        scaling_factor: float = 1.0,
        num_groups: int = 1,
        top_groups: int = 1,
        masked_group_fill: float = -math.inf,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_router(num_experts, top_k, score_function, num_groups, top_groups, masked_group_fill)
        check_finite(scaling_factor=scaling_factor)
        self.num_experts = num_experts
        self.top_k = top_k
        self.score_function = score_function
        self.normalize_weights = normalize_weights
        self.scaling_factor = scaling_factor
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.masked_group_fill = masked_group_fill
        self.backend = check_backend(backend)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.register_buffer("expert_bias", torch.empty(num_experts, device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-normal weights, as the official DSMoE router draws them; no bias."""
        nn.init.kaiming_normal_(self.weight)
        nn.init.zeros_(self.expert_bias)

    def forward(self, x: Tensor) -> ops.RouterTopK:
        """(T, D) -> `RouterTopK`, in float32 under autocast too."""
        return ops.router_topk(
            float32_linear(x, self.weight),  # (T, E)
            self.top_k,
            expert_bias=self.expert_bias,
            score_function=self.score_function,
            num_groups=self.num_groups,
            top_groups=self.top_groups,
            masked_group_fill=self.masked_group_fill,
            normalize_weights=self.normalize_weights,
            scaling_factor=self.scaling_factor,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        num_experts, hidden_size = self.weight.shape
        groups = f", groups={self.top_groups}/{self.num_groups}" if self.num_groups > 1 else ""
        return f"{hidden_size}, num_experts={num_experts}, top_k={self.top_k}, {self.score_function}{groups}"


class ExpertChoiceRouter(nn.Module):
    """Softmax over the experts of every token, for `ops.token_drop`. Parameter: ``weight`` (E, D)."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of standard deviation 0.006, as the official DiffMoE and EC-DiT draw them."""
        nn.init.normal_(self.weight, std=0.006)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, E) scores, in float32 under autocast too."""
        return float32_linear(x, self.weight).softmax(-1)  # autocast leaves float32's softmax alone
