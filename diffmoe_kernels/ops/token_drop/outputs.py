"""What the kernels write, uninitialised or zeros."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def routing_of(make: Callable[..., Tensor], num_rows: int, num_tokens: int, num_experts: int) -> tuple[Tensor, ...]:
    """The fields of a `Routing`, the gates first: opcheck wants an operator's first output to be floating.

    make: a tensor's ``new_empty`` or ``new_zeros``.
    """
    return (
        make(num_rows, dtype=torch.float32),
        make(num_rows, dtype=torch.int32),
        make(num_experts, dtype=torch.int32),
        make(num_tokens + 1, dtype=torch.int32),
        make(num_rows, dtype=torch.int32),
    )
