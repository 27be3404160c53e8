"""Small models and inputs that tests share."""

from __future__ import annotations

import torch

from models import DiT


@torch.no_grad()
def randomize(model: DiT) -> DiT:
    """Replaces the zeros of adaLN-Zero, behind which a fresh model computes nothing."""
    for module in (*model.blocks, model.final_layer):
        torch.nn.init.normal_(module.adaLN_modulation[1].weight, std=0.1)
        torch.nn.init.normal_(module.adaLN_modulation[1].bias, std=0.3)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    return model


def random_inputs(model: DiT, batch: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, t in [0, 1) and labels that the model takes."""
    x = torch.randn(batch, model.in_channels, model.input_size, model.input_size)
    return x, torch.rand(batch), torch.randint(model.num_classes, (batch,))
