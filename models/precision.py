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


def cast_weights_(model: nn.Module, dtype: torch.dtype) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Casts what autocast rounds at every call, the weights of experts and linear layers; those of routers, tables and
    norms stay.

    Returns:
        Layer, name and parameter of each that was there.
    """
    layers = (part for part in model.modules() if isinstance(part, Experts | nn.Linear))
    masters = [(layer, *named) for layer in layers for named in layer.named_parameters(recurse=False)]
    cast = {master: nn.Parameter(master.detach().to(dtype), master.requires_grad) for _, _, master in masters}
    for layer, name, master in masters:  # new ones: compiled code of torch 2.11 would not see another dtype in the old
        setattr(layer, name, cast[master])
    return masters


@contextmanager
def weights_cast_once(model: nn.Module, precision: Precision) -> Iterator[None]:
    """Within it `cast_weights_` are in bfloat16 if that is it, to the same bits as float32 masters cast at each call.

    Autocast keeps what it casts, but for experts, and in compiled code. The weights come back as they were, and no
    gradient may be taken meanwhile.
    """
    masters = cast_weights_(model, torch.bfloat16) if precision == "bfloat16" else []
    try:
        yield
    finally:
        for layer, name, master in masters:
            setattr(layer, name, master)
