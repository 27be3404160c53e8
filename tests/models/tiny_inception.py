"""A stand-in for FID's Inception."""

import torch
from torch import Tensor, nn

from models.metrics.inception import InceptionOutput


class TinyInception(nn.Module):
    """In the place of Inception: 16 features, 12 spatial features and 5 logits of 8x8 images, in no time."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8 * 8 * 3, 33, generator=generator) / 8, requires_grad=False)

    def forward(self, images: Tensor) -> InceptionOutput:
        """Images (N, 8, 8, 3) uint8."""
        return InceptionOutput(*(images.flatten(1).float() / 128 @ self.weight).split([16, 12, 5], 1))
