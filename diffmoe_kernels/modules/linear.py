"""A linear layer whose weights may be float32 masters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe_kernels.checks import autocast_is_on


class Linear(nn.Linear):
    """``nn.Linear`` that computes in its input's dtype, as the ops do; the gradients keep the weights' dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if autocast_is_on(x) and x.dtype != torch.float64:  # which it leaves alone
            return super().forward(x)  # it caches its casts
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
