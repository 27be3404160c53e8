"""DiffMoE (arXiv:2503.14487): expert choice over the tokens of the whole batch, with a predicted capacity."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from diffmoe_kernels import ExpertChoiceMoE
from diffmoe_kernels.modules import FeedForward
from models.dit import DIGITS, DiT, MixtureConfig


@dataclass(frozen=True, kw_only=True)
class DiffMoEConfig(MixtureConfig):
    """A DiT whose MLPs are, in some blocks, mixtures in which each expert chooses among the batch's tokens.

    Attributes, beside those of `MixtureConfig`:
        capacity_factor: of each mixture; its experts are as wide as the dense MLP.
        shared_expert: add an expert of width 8 D that sees every token.
        inference, max_capacity_factor: see `ExpertChoiceMoE`.
        capacity_loss_weight: of the capacity predictors' losses.
        capacity_schedule: (a, b) training steps: capacity_factor is num_experts until step a, falls linearly to its own
            value until step b, and stays there; None has no schedule.
    """

    capacity_factor: float = 1.0
    shared_expert: bool = False
    inference: str = "pool"
    max_capacity_factor: float | None = None
    capacity_loss_weight: float = 1.0
    capacity_schedule: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.capacity_schedule is not None:
            steps = self.capacity_schedule
            is_pair = isinstance(steps, list | tuple) and len(steps) == 2 and all(isinstance(one, int) for one in steps)
            if not is_pair or not 0 <= steps[0] < steps[1]:
                raise ValueError(f"capacity_schedule: expected two rising steps, got {steps!r}")

    def capacity_factor_at(self, step: int) -> float:
        """The capacity factor of a training step, counted from 0 (official three-stage schedule)."""
        if self.capacity_schedule is None:
            return self.capacity_factor
        start, end = self.capacity_schedule
        remaining = min(max((end - step) / (end - start), 0.0), 1.0)
        return self.capacity_factor + (self.num_experts - self.capacity_factor) * remaining


class DiffMoE(DiT):
    """DiT with expert-choice mixtures: ``model(x, t, labels)``."""

    config: DiffMoEConfig

    @property
    def aux_loss_weight(self) -> float:
        return self.config.capacity_loss_weight

    @property
    def mixes_samples(self) -> bool:
        return self.config.inference == "pool" or self.config.max_capacity_factor is not None

    def make_mixture(self) -> nn.Module:
        config = self.config
        mixture = ExpertChoiceMoE(
            config.hidden_size,
            int(config.hidden_size * config.mlp_ratio),
            config.num_experts,
            capacity_factor=config.capacity_factor,
            activation="swiglu" if config.swiglu else "gelu_tanh",
            bias=not config.swiglu,
            inference=config.inference,
            max_capacity_factor=config.max_capacity_factor,
            backend=config.backend,
        )
        if config.shared_expert:  # GELU with biases whatever the routed experts are
            width = 8 * config.hidden_size
            mixture.shared_expert = FeedForward(config.hidden_size, width, activation="gelu_tanh", bias=True)
        return mixture

    def set_training_step(self, step: int) -> None:
        """Sets the capacity of a training step, counted from 0. The trainer calls it before each step."""
        for module in self.modules():
            if isinstance(module, ExpertChoiceMoE):
                module.capacity_factor = self.config.capacity_factor_at(step)


_SMALL = DiffMoEConfig(hidden_size=384, depth=12, num_heads=6)

DIFFMOE_CONFIGS: dict[str, DiffMoEConfig] = {
    "DiffMoE-S-E16": _SMALL,
    "DiffMoE-B-E16": replace(_SMALL, hidden_size=768, num_heads=12),
    "DiffMoE-L-E8": replace(_SMALL, hidden_size=1024, depth=24, num_heads=16, num_experts=8),
    "DiffMoE-L-E16": replace(_SMALL, hidden_size=1024, depth=24, num_heads=16),
    "DiffMoE-digits": DiffMoEConfig(
        **DIGITS,
        num_experts=8,
    ),
}
