"""The model zoo: `list_models`, `create_model`, and every configuration as one table."""

from __future__ import annotations

import difflib
from dataclasses import fields, replace
from typing import Any

from torch import nn

from diffmoe_kernels import ExpertChoiceMoE, MoE
from models.diffmoe import DIFFMOE_CONFIGS, DiffMoE, DiffMoEConfig
from models.dit import DIT_CONFIGS, DiT, DiTConfig, ModelAux
from models.dsmoe import DSMOE_CONFIGS, DSMoE, DSMoEConfig
from models.ecdit import ECDIT_CONFIGS, ECDiT, ECDiTConfig
from models.jitmoe import JIT_CONFIGS, JiT, JiTConfig
from models.tcdit import TCDIT_CONFIGS, TCDiT, TCDiTConfig

__all__ = ["CONFIGS", "DSMoE", "DSMoEConfig", "DiT", "DiTConfig", "DiffMoE", "DiffMoEConfig", "ModelAux"]
__all__ += ["ECDiT", "ECDiTConfig", "JiT", "JiTConfig", "TCDiT", "TCDiTConfig"]
__all__ += ["count_parameters", "create_model", "list_models", "model_class"]

CONFIGS: dict[str, DiTConfig] = {
    **DIT_CONFIGS,
    **DSMOE_CONFIGS,
    **DIFFMOE_CONFIGS,
    **JIT_CONFIGS,
    **TCDIT_CONFIGS,
    **ECDIT_CONFIGS,
}
_MODELS: dict[type[DiTConfig], type[DiT]] = {
    DiTConfig: DiT,
    DSMoEConfig: DSMoE,
    DiffMoEConfig: DiffMoE,
    JiTConfig: JiT,
    TCDiTConfig: TCDiT,
    ECDiTConfig: ECDiT,
}


def list_models() -> list[str]:
    """The names that `create_model` takes."""
    return list(CONFIGS)


def model_class(config: DiTConfig) -> type[DiT]:
    """The model that a configuration describes."""
    return _MODELS[type(config)]


def create_model(name: str, **overrides: Any) -> DiT:
    """Builds a model with fresh weights, on the default device (``with torch.device(...)``).

    Args:
        name: one of `list_models`.
        **overrides: fields of the model's configuration, such as num_classes or input_size.

    Raises:
        ValueError: an unknown name (the nearest are listed), or values that do not fit each other.
        TypeError: an override that is not a field of the configuration.
    """
    if name not in CONFIGS:
        near = difflib.get_close_matches(name, CONFIGS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(CONFIGS)}"
        raise ValueError(f"unknown model {name!r}: {hint}")
    config = CONFIGS[name]
    known = [field.name for field in fields(config)]
    for field in overrides:
        if field not in known:
            raise TypeError(f"{name} has no configuration field {field!r}; it has {', '.join(known)}")
    config = replace(config, **overrides)
    return model_class(config)(config)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(total, activated) parameters, frozen ones included.

    Activated: total - routed + routed * k / num_experts, k being top_k or, in expert choice, the capacity factor: the
    share of a mixture's experts that one token uses, on average.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    inactive = 0.0
    for module in model.modules():
        if isinstance(module, MoE | ExpertChoiceMoE):
            routed = sum(parameter.numel() for parameter in module.experts.parameters())
            num_experts = module.experts.down_proj.shape[0]
            used = module.router.top_k if isinstance(module, MoE) else min(module.capacity_factor, num_experts)
            inactive += routed * (1 - used / num_experts)
    return total, round(total - inactive)
