"""The precision in which models train and sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from diffmoe_kernels.modules import Experts

Precision = Literal["float32", "tf32", "bfloat16"]


@contextmanager
def float32_products(precision: Precision) -> Iterator[None]:
    """Within it torch and our kernels multiply float32 matrices in TF32 where `precision` is that and a GPU has it.

    It is torch's setting for the whole process (`torch.set_float32_matmul_precision`), which comes back as it was.
    """
    if precision != "tf32":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def experts_cast_once(model: nn.Module, precision: Precision) -> Iterator[None]:
    """Within it the experts' weights are in bfloat16 if that is it, where each call would cast float32 masters again.

    The weights come back as they were, and no gradient may be taken meanwhile.
    """
    if precision != "bfloat16":
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
