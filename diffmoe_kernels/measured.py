"""What "auto" takes on a GPU: for each op and shape class the backend that was measured fastest.

The table is ``measured.json``: rows of an op, a compute capability, a shape class, whether under torch.compile, the
fastest backend, and the figures that say so with the file of results they are from. ``python -m benchmarks.prefer
results.json`` writes it. Where PyTorch's way was timed compiled, that is what a kernel has to beat under torch.compile.
What is not in it was not measured, and "auto" passes over a kernel there, unless PyTorch's own way would synchronize
with the host. (The "torch" backend of `experts` has our kernels between its products whatever the table says.)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diffmoe_kernels.checks import NO_DEVICE, device_capability

FILE = Path(__file__).with_name("measured.json")
FEW_ROWS, SOME_ROWS = 32, 128  # of an average expert
NARROW = 512  # intermediate size of fine-grained experts
MANY_TOKENS = 4096
SHORT = 512  # tokens of a sample

Key = tuple[str, str, str, bool]  # op, compute capability as in "9.0", shape class, whether under torch.compile
KEYS = "op", "capability", "shape_class", "compiled"


def load(file: Path = FILE) -> dict[Key, str]:
    """The fastest backend by key.

    Raises:
        ValueError: a file that is not such a table.
    """
    try:
        rows = json.loads(file.read_text())
        if not isinstance(rows, list):
            raise TypeError(f"not {type(rows).__name__}")
        return {tuple(row[key] for key in KEYS): row["fastest"] for row in rows}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: expected a list of measured rows, got {error!r}") from error


TABLE = load()


def fastest(
    op: str, backend: str, shape_class: Callable[..., str], *, torch_is_unsuitable: Callable[..., bool] | None = None
) -> Callable[..., bool]:
    """A predicate for `Implementation.automatic`: was ``backend`` measured fastest for an op's arguments?

    Args:
        op: its name in the table.
        backend: the implementation's.
        shape_class: of the op's arguments.
        torch_is_unsuitable: of the op's arguments, whether PyTorch's way can't run or synchronizes with the host,
            and so loses unmeasured.
    """

    def automatic(first: Tensor, *args: object, **options: object) -> bool:
        capability = capability_of(first.device)
        if capability is None:
            return False
        if torch_is_unsuitable is not None and torch_is_unsuitable(first, *args, **options):
            return True
        found = shape_class(first, *args, **options)
        return TABLE.get((op, capability, found, torch.compiler.is_compiling())) == backend

    return automatic


def capability_of(device: torch.device) -> str | None:
    """A GPU's compute capability as in "9.0"; None where there is none."""
    if device.type != "cuda" or (found := device_capability(device)) == NO_DEVICE:
        return None
    return "{}.{}".format(*found)


def tokens_class(num_tokens: int) -> str:
    """Of ops whose work is to route tokens."""
    return "many tokens" if num_tokens > MANY_TOKENS else "few tokens"


def movement_class(num_tokens: int, dtype: torch.dtype) -> str:
    """Of ops whose work is to move tokens."""
    return f"{_name(dtype)}, {tokens_class(num_tokens)}"


def experts_class(num_rows: int, num_experts: int, intermediate_size: int, dtype: torch.dtype, training: bool) -> str:
    """Of the experts' products: rows of an average expert, how wide it is, and whether there is a backward."""
    average = num_rows / num_experts
    rows = "few" if average <= FEW_ROWS else "some" if average <= SOME_ROWS else "many"
    width = "narrow" if intermediate_size <= NARROW else "wide"
    return f"{_name(dtype)}, {rows} rows, {width}, {'training' if training else 'inference'}"


def attention_class(
    num_tokens: int, head_dim: int, rotated: bool, qk_norm: bool, dtype: torch.dtype, training: bool
) -> str:
    """Of attention: how long, how wide a head, what is done to q and k, and whether there is a backward."""
    length = "short" if num_tokens <= SHORT else "long"
    prepared = ("rotated" if rotated else "no rotation") + (", QK norm" if qk_norm else "")
    return f"{_name(dtype)}, {length}, heads of {head_dim}, {prepared}, {'training' if training else 'inference'}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
