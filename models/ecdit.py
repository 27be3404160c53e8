"""EC-DiT (arXiv:2410.02098), the baseline of DiffMoE: each expert chooses among the tokens of one sample."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from diffmoe_kernels import ExpertChoiceMoE
from diffmoe_kernels.modules import FeedForward
from models.dit import DIGITS, DiT, MixtureConfig, check_least


@dataclass(frozen=True, kw_only=True)
class ECDiTConfig(MixtureConfig):
    """A DiT whose MLPs are, in some blocks, mixtures in which each expert chooses among a sample's tokens.

    Attributes, beside those of `MixtureConfig`:
        capacity_factor: of each mixture; its experts are as wide as the dense MLP.
        num_shared_experts: width over D of a SwiGLU that sees every token; 0 for none.
    """

    capacity_factor: float = 1.0
    num_shared_experts: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "num_shared_experts")


class ECDiT(DiT):
    """DiT with per-sample expert choice: ``model(x, t, labels)``."""

    config: ECDiTConfig

    def make_mixture(self) -> nn.Module:
        config = self.config
        mixture = ExpertChoiceMoE(
            config.hidden_size,
            int(config.hidden_size * config.mlp_ratio),
            config.num_experts,
            capacity_factor=config.capacity_factor,
            pool="sample",
            predictor=False,
            activation="swiglu" if config.swiglu else "gelu_tanh",
            bias=not config.swiglu,
            backend=config.backend,
        )
        if config.num_shared_experts:
            mixture.shared_expert = FeedForward(config.hidden_size, config.hidden_size * config.num_shared_experts)
        return mixture


_SMALL = ECDiTConfig(hidden_size=384, depth=12, num_heads=6)

ECDIT_CONFIGS: dict[str, ECDiTConfig] = {
    "EC-DiT-S-E16": _SMALL,
    "EC-DiT-B-E16": replace(_SMALL, hidden_size=768, num_heads=12),
    "EC-DiT-L-E16": replace(_SMALL, hidden_size=1024, depth=24, num_heads=16),
    "EC-DiT-digits": ECDiTConfig(
        **DIGITS,
        num_experts=8,
    ),
}
