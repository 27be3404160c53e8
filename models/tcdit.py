"""TC-DiT, the token-choice baseline of DiffMoE (arXiv:2503.14487): each token takes its top-k experts by softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import nn

from diffmoe_kernels import Balance, MoE
from diffmoe_kernels.modules import FeedForward, TopKRouter
from models.dit import DIGITS, DiT, MixtureConfig, check_least


@dataclass(frozen=True, kw_only=True)
class TCDiTConfig(MixtureConfig):
    """A DiT whose MLPs are, in some blocks, token-choice mixtures with a balance loss.

    Attributes, beside those of `MixtureConfig`:
        top_k: of each mixture; its experts are as wide as the dense MLP, and the softmax weights are not
            normalised over a token's experts.
        num_shared_experts: width over D of a SwiGLU that sees every token; 0 for none.
        balance_loss_weight: of each mixture's balance loss.
    """

    top_k: int = 1
    num_shared_experts: int = 0
    balance_loss_weight: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "num_shared_experts")


class TCDiT(DiT):
    """DiT with softmax token choice: ``model(x, t, labels)``."""

    config: TCDiTConfig

    def make_mixture(self) -> nn.Module:
        config = self.config
        mixture = MoE(
            config.hidden_size,
            int(config.hidden_size * config.mlp_ratio),
            config.num_experts,
            config.top_k,
            activation="swiglu" if config.swiglu else "gelu_tanh",
            bias=not config.swiglu,
            score_function="softmax",
            normalize_weights=False,
            balance=Balance(loss_weight=config.balance_loss_weight),
            backend=config.backend,
        )
        if config.num_shared_experts:
            mixture.shared_expert = FeedForward(config.hidden_size, config.hidden_size * config.num_shared_experts)
        return mixture

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for module in self.modules():
            if isinstance(module, TopKRouter):  # drawn as nn.Linear draws its weights, unlike DSMoE's
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))


_SMALL = TCDiTConfig(hidden_size=384, depth=12, num_heads=6)

TCDIT_CONFIGS: dict[str, TCDiTConfig] = {
    "TC-DiT-S-E16": _SMALL,
    "TC-DiT-B-E16": replace(_SMALL, hidden_size=768, num_heads=12),
    "TC-DiT-L-E16": replace(_SMALL, hidden_size=1024, depth=24, num_heads=16),
    "TC-DiT-digits": TCDiTConfig(
        **DIGITS,
        num_experts=8,
    ),
}
