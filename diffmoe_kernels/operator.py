"""How kernels become torch operators."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef


def operator(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Registers a function as the operator ``diffmoe_kernels::<name>``, which writes to none of its arguments.

    It runs with its first tensor's GPU as the current one, where kernels are launched.
    """

    def register(function: Callable[..., Any]) -> CustomOpDef:
        @functools.wraps(function)
        def on_its_device(*args: Any) -> Any:
            with torch.cuda.device_of(next(one for one in args if isinstance(one, Tensor))):
                return function(*args)

        return torch.library.custom_op(f"diffmoe_kernels::{name}", on_its_device, mutates_args=())

    return register


@functools.cache
def launchers(op: str, backend: str) -> ModuleType:
    """The module of an op's folder whose functions launch that backend's kernels: "triton" or "cuda"."""
    return importlib.import_module(f"diffmoe_kernels.ops.{op}._{backend}")
