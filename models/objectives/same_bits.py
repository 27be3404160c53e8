"""Matrix products on a CPU whose rows do not depend on how many there are."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

FEWEST_ROWS = 16


def same_bits(device: torch.device) -> AbstractContextManager:
    """`SameBits` on a CPU, nothing elsewhere."""
    return SameBits() if device.type == "cpu" else nullcontext()


class SameBits(TorchFunctionMode):
    """Within it, a linear layer of fewer than 16 rows is computed with rows of zeros added.

    A CPU multiplies few rows by another routine than many, with another rounding: without this a sample would differ in
    its last bits between a batch of 4 and one of 8, where the layers that see one row per sample have 4 and 8 rows.
    Established by trial (`tests/models/test_same_bits.py`), for float32 on x86; no library promises it.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., K), (N, K), (N,) -> (..., N)."""
    rows = x.shape[:-1].numel()
    if rows >= FEWEST_ROWS:
        return F.linear(x, weight, bias)
    padded = F.pad(x.reshape(rows, x.shape[-1]), (0, 0, 0, FEWEST_ROWS - rows))
    return F.linear(padded, weight, bias)[:rows].view(*x.shape[:-1], -1)
