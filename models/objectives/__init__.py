"""What a model is trained to predict, and how to sample from it. Objectives own no parameters and no state."""

from torch import nn

from models.jitmoe import JiT
from models.objectives.jit import JiTFlow
from models.objectives.rectified_flow import FlowLoss, RectifiedFlow

__all__ = ["FlowLoss", "JiTFlow", "RectifiedFlow", "objective_for"]


def objective_for(model: nn.Module) -> RectifiedFlow:
    """The objective that a model's family is trained with: `JiTFlow` for JiT and JiTMoE, else `RectifiedFlow`."""
    return JiTFlow() if isinstance(model, JiT) else RectifiedFlow()
