"""Which implementation of an op runs.

``"reference"`` is the definition, plain PyTorch that anyone can check. ``"torch"`` is PyTorch's own fast path
(``grouped_mm``, SDPA; in `ops.experts` on a GPU with Triton with this project's kernels between the products). It does
not synchronize with the host, except that ``grouped_mm`` does in other dtypes than bfloat16 and on other GPUs than
Hopper and Blackwell. ``"triton"`` and ``"cuda"`` are this project's kernels. ``"auto"`` takes what was measured fastest
for the device, dtype and shape (`diffmoe_kernels.measured`); without a measurement PyTorch's own way, or this project's
kernel where that can't run or would synchronize; the reference where nothing else runs. An explicit choice that can't
run raises NotImplementedError and says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffmoe_kernels import cuda_support
from diffmoe_kernels.checks import autocast_is_on, autocast_off, check_choice
from diffmoe_kernels.cuda_support import why_not_cuda
from diffmoe_kernels.triton_support import HAS_TRITON, INTERPRETED, NO_TRITON, why_not_triton

Backend = Literal["auto", "reference", "torch", "triton", "cuda"]
BACKENDS: tuple[str, ...] = get_args(Backend)
# Those of this project's kernels, and what tells why they can't run on a tensor.
KERNEL_BACKENDS: dict[str, Callable[[Tensor], str | None]] = {"triton": why_not_triton, "cuda": why_not_cuda}


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        function: computes it.
        why_not: returns why the function can't run on the arguments, or None.
        automatic: returns whether "auto" may take it for the arguments: see `measured.fastest`.
    """

    function: Callable[..., Any]
    why_not: Callable[..., str | None] = lambda *args, **kwargs: None
    automatic: Callable[..., bool] = lambda *args, **kwargs: True

    def taken_by_auto(self, *args: Any, **kwargs: Any) -> bool:
        return self.automatic(*args, **kwargs) and self.why_not(*args, **kwargs) is None


def pytorch_only(function: Callable[..., Any]) -> dict[str, Implementation]:
    """The implementations of an op whose definition PyTorch runs without a host sync: it is the "torch" backend too."""
    return {name: Implementation(function) for name in ("torch", "reference")}


def check_backend(backend: str) -> str:
    """Returns ``backend``; raises ValueError where it is not a backend's name."""
    check_choice("backend", backend, BACKENDS)
    return backend


def run(op: str, backend: str, implementations: Mapping[str, Implementation], *args: Any, **kwargs: Any) -> Any:
    """Calls the chosen implementation of ``op``.

    Args:
        op: the op's name, for messages.
        backend: one of BACKENDS.
        implementations: backend name -> implementation, the fastest first; the reference, last, takes everything.
        *args, **kwargs: the op's validated arguments, given to ``why_not`` and to the function alike.

    Raises:
        ValueError: an unknown backend.
        NotImplementedError: an explicit backend that has no implementation of this op or can't run on the arguments.
    """
    check_backend(backend)
    if backend == "auto":
        chosen = next(one for one in implementations.values() if one.taken_by_auto(*args, **kwargs))
    elif backend not in implementations:
        raise NotImplementedError(
            f"{op}: there is no {backend!r} backend; this op has {', '.join(map(repr, implementations))}"
        )
    else:
        chosen = implementations[backend]
        reason = chosen.why_not(*args, **kwargs)
        if reason:
            raise NotImplementedError(f"{op}: backend {backend!r} can't run here: {reason}")
    if not autocast_is_on(args[0]):
        return chosen.function(*args, **kwargs)
    with autocast_off(args[0]):  # the public function has cast already
        return chosen.function(*args, **kwargs)


def available_backends() -> dict[str, str]:
    """Backend name -> "available", or the reason why it is not."""
    return {
        "reference": "available",
        "torch": "available",
        "triton": _triton_status(),
        "cuda": cuda_support.status(),
    }


def _triton_status() -> str:
    if not HAS_TRITON:
        return f"not available: {NO_TRITON}"
    if torch.cuda.is_available():
        return "available"
    return "available: interpreted on the CPU" if INTERPRETED else "not available: there is no CUDA device"
