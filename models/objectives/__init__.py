"""What a model is trained to predict, and how to sample from it. Objectives own no parameters and no state."""

from models.objectives.rectified_flow import FlowLoss, RectifiedFlow

__all__ = ["FlowLoss", "RectifiedFlow"]
