"""Argument checks that public functions share: shapes, dtypes and devices, never values."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Record = TypeVar("Record")
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def check_integer(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless ``tensor`` is a tensor of integers (bool does not count)."""
    check_tensor(name, tensor)
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected an integer dtype, got {tensor.dtype}")


def check_tensor(name: str, tensor: object) -> None:
    """Raises TypeError for anything else."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")


def check_floating(name: str, tensor: Tensor | None, *, optional: bool = False) -> None:
    """Raises TypeError unless ``tensor`` is a tensor of floating-point numbers, or ``optional`` and None."""
    if optional and tensor is None:
        return
    check_tensor(name, tensor)
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor | None, *shape: int | str) -> None:
    """Raises ValueError unless ``tensor`` has ``shape``; a string is a free size, named for the message."""
    if tensor is None:
        return
    check_tensor(name, tensor)
    found = tensor.shape
    fits = len(found) == len(shape)
    for want, got in zip(shape, found, strict=False):
        if want != got and not isinstance(want, str):
            fits = False
    if not fits:
        expected = ", ".join(str(size) for size in shape) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name}: expected shape ({expected}), got {tuple(tensor.shape)}")


def check_whole(**counts: int) -> None:
    """Raises TypeError for a count that is no integer."""
    for name, count in counts.items():
        if not isinstance(count, int | torch.SymInt | np.integer):
            raise TypeError(f"{name}: expected an integer, got {count!r}")


def check_sizes(least: int, **sizes: int) -> None:
    """Raises TypeError for a size that is no integer, ValueError for one below ``least``."""
    check_whole(**sizes)
    for name, size in sizes.items():
        if size < least:
            raise ValueError(f"{name}: expected at least {least}, got {size}")


def check_finite(**numbers: float) -> None:
    """Raises TypeError for what is no number, ValueError for an infinity or NaN."""
    _check_number(**numbers)
    for name, number in numbers.items():
        if not -math.inf < number < math.inf:
            raise ValueError(f"{name}: expected a finite number, got {number}")


def _check_number(**numbers: object) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int | float | torch.SymInt | torch.SymFloat | np.integer | np.floating):
            raise TypeError(f"{name}: expected a number, got {number!r}")


def check_factor(**factors: float) -> None:
    """Raises TypeError for what is no number, ValueError for what is not finite and above 0."""
    _check_number(**factors)
    for name, factor in factors.items():
        if not 0 < factor < math.inf:
            raise ValueError(f"{name}: expected a finite number above 0, got {factor}")


def check_dropout(dropout: float) -> None:
    """Raises TypeError for what is no number, ValueError unless it is a probability below 1."""
    _check_number(dropout=dropout)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raises ValueError unless all given tensors are on one device."""
    given = [tensor for tensor in tensors.values() if tensor is not None]
    for tensor in given[1:]:
        if tensor.device != given[0].device:
            devices = [f"{name} on {tensor.device}" for name, tensor in tensors.items() if tensor is not None]
            raise ValueError(f"tensors on different devices: {', '.join(devices)}")


def as_records(aux: Record | Sequence[Record], kind: type[Record]) -> Sequence[Record]:
    """What `update_routing_state` takes, as a sequence.

    Raises:
        TypeError: another object than a record of that kind or a sequence of them.
        ValueError: no record at all.
    """
    records = [aux] if isinstance(aux, kind) else aux
    if not isinstance(records, Sequence) or not all(isinstance(record, kind) for record in records):
        kinds = [type(one).__name__ for one in records] if isinstance(records, Sequence) else [type(aux).__name__]
        raise TypeError(f"aux: expected {kind.__name__}, or a sequence of them, got {', '.join(kinds)}")
    if not records:
        raise ValueError("aux: expected at least one record of a forward with return_aux=True, got none")
    return records


def why_no_kernel(tensor: Tensor, *, dtypes: Collection[torch.dtype], on_cpu: bool) -> str | None:
    """Why this project's kernels, which take these dtypes, can't run on a tensor, or None; ``on_cpu``: for tests."""
    if tensor.dtype not in dtypes:
        return f"the kernels take {', '.join(str(one) for one in dtypes)}, not {tensor.dtype}"
    if tensor.is_cuda:
        found = device_capability(tensor.device)
        if found == NO_DEVICE:
            return "there is no CUDA device"
        return None if found >= (8, 0) else "the kernels need a GPU of compute capability 8.0 or more"
    if tensor.device.type != "meta" and not on_cpu:
        return f"the tensors are on {tensor.device.type}, the kernels need a CUDA device"
    return None


NO_DEVICE = (0, 0)


def device_capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU, as in (9, 0); `NO_DEVICE` where there is none and the tensors on it are fake."""
    find = _find_capability if torch.compiler.is_compiling() else _known_capability  # Dynamo warns of a cache
    return find(device)


def _find_capability(device: torch.device) -> tuple[int, int]:
    if not torch.cuda.is_available():
        return NO_DEVICE
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


_known_capability = functools.cache(_find_capability)


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it is that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def autocast_is_on(tensor: Tensor) -> bool:
    """Whether an autocast region covers ops on the tensor's device."""
    kind = tensor.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)  # 2.11 traces no is_autocast_available


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which an op multiplies: autocast's where it is on (float64 stays), else the tensor's own."""
    if autocast_is_on(tensor) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


def autocast_off(tensor: Tensor) -> AbstractContextManager[object]:
    """A region without autocast on the tensor's device, for arithmetic that must stay in the dtype it is in."""
    return torch.autocast(tensor.device.type, enabled=False) if autocast_is_on(tensor) else nullcontext()
