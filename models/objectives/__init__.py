"""What a model is trained to predict, and how to sample from it. Objectives own no parameters and no state."""

from dataclasses import fields
from typing import Any, Literal

from torch import nn

from models.jitmoe import JiT
from models.objectives.base import Objective, TrainingLoss, unwrapped
from models.objectives.ddpm import DDPM
from models.objectives.jit import JiTFlow
from models.objectives.rectified_flow import RectifiedFlow

__all__ = ["DDPM", "JiTFlow", "Method", "Objective", "ObjectiveName", "RectifiedFlow", "TrainingLoss", "objective_for"]

Method = Literal["euler", "heun", "dopri5", "ancestral", "ddim"]
ObjectiveName = Literal["auto", "flow", "jit", "ddpm"]
_OBJECTIVES = {"flow": RectifiedFlow, "jit": JiTFlow, "ddpm": DDPM}


def objective_for(model: nn.Module, name: ObjectiveName = "auto", **settings: Any) -> Objective:
    """An objective to train or sample a model with.

    Args:
        model: what it is for; it may be in a wrapper, such as AveragedModel.
        name: "flow" (`RectifiedFlow`), "jit" (`JiTFlow`) or "ddpm" (`DDPM`); "auto" is the one that the model's family
            is trained with, "jit" for JiT and JiTMoE, else "flow".
        **settings: the objective's attributes.

    Raises:
        ValueError: an unknown name or setting, a value out of range, or a model that the objective does not fit.
    """
    model = unwrapped(model)
    if name == "auto":
        name = "jit" if isinstance(model, JiT) else "flow"
    if name not in _OBJECTIVES:
        raise ValueError(f"objective must be auto, {', '.join(_OBJECTIVES)}, got {name!r}")
    known = [field.name for field in fields(_OBJECTIVES[name])]
    for setting in settings:
        if setting not in known:
            raise ValueError(f"the objective {name!r} has no setting {setting!r}; it has {', '.join(known)}")
    objective = _OBJECTIVES[name](**settings)
    objective.check_model(model)
    return objective
