"""Sampling in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from diffmoe_kernels.modules import Experts

Precision = Literal["float32", "bfloat16"]


@contextmanager
def experts_cast_once(model: nn.Module, precision: Precision) -> Iterator[None]:
    """Within it the experts' weights are in `precision`, where each call would cast float32 masters again.

    The weights come back as they were, and no gradient may be taken meanwhile.
    """
    if precision == "float32":
        yield
        return
    parameters = [one for part in model.modules() if isinstance(part, Experts) for one in part.parameters()]
    masters = [one.data for one in parameters]
    try:
        for parameter in parameters:
            parameter.data = parameter.data.to(torch.bfloat16)
        yield
    finally:
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.data = master
