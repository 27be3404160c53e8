"""Small models and inputs that tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
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


def set_thresholds(model: torch.nn.Module, value: float) -> None:
    """Those by which DiffMoE's tokens choose; 0.4 to 0.5 sends about half of them to each expert of a fresh model."""
    for module in model.modules():
        if getattr(module, "expert_threshold", None) is not None:
            module.expert_threshold.fill_(value)


def random_inputs(model: DiT, batch: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, t in [0, 1) and labels that the model takes."""
    x = torch.randn(batch, model.in_channels, model.input_size, model.input_size)
    return x, torch.rand(batch), torch.randint(model.num_classes, (batch,))


def save_vae(path: Path, **options: Any) -> str:
    """A tiny AutoencoderKL with random weights; latents of 3 channels, half as wide as the image."""
    diffusers = pytest.importorskip("diffusers")

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        **{"latent_channels": 3, "scaling_factor": 0.5, "shift_factor": 0.25, **options},
    )
    vae.save_pretrained(path)
    return str(path)
