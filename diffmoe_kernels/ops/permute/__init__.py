"""Movement between token order and expert order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from diffmoe_kernels.backend import KERNEL_BACKENDS, Backend, Implementation, pytorch_only, run
from diffmoe_kernels.checks import check_floating, check_same_device, check_shape
from diffmoe_kernels.measured import fastest, movement_class
from diffmoe_kernels.ops.permute._library import permute_on_kernels, unpermute_on_kernels
from diffmoe_kernels.ops.permute.reference import permute_reference, unpermute_reference
from diffmoe_kernels.routing import Routing, check_routing


def permute(x: Tensor, routing: Routing, *, backend: Backend = "auto") -> Tensor:
    """Gathers each expert's tokens into contiguous rows.

    Args:
        x: (T, D) floating.
        routing: of T tokens and R rows.
        backend: see `diffmoe_kernels.backend`.

    Returns:
        (R, D), dtype of x: row r is ``x[routing.token_indices[r]]``, exactly. Rows past the true count are unspecified
        (0 in the reference) and take no gradient.

    Raises:
        TypeError: x that is not floating.
        ValueError: x that is not (T, D), or on another device than the routing.
    """
    check_routing(routing)
    check_floating("x", x)
    check_shape("x", x, routing.num_tokens, "D")
    check_same_device(x=x, routing=routing.token_indices)
    return run("permute", backend, _PERMUTE, x, routing)


def unpermute(rows: Tensor, routing: Routing, *, backend: Backend = "auto") -> Tensor:
    """Sums each token's rows, weighted with the gates.

    Args:
        rows: (R, D) floating; rows past the true count are not read.
        routing: of T tokens and R rows; its gates get a gradient.
        backend: see `diffmoe_kernels.backend`.

    Returns:
        (T, D), dtype of rows: ``sum(gates[r] * rows[r])`` over the rows r of each token, accumulated in float32
        (float64 for float64); 0 for a token without rows.

    Raises:
        TypeError: rows that are not floating.
        ValueError: rows that are not (R, D), or on another device than the routing.
    """
    check_routing(routing)
    check_floating("rows", rows)
    check_shape("rows", rows, routing.num_rows, "D")
    check_same_device(rows=rows, routing=routing.token_indices)
    return run("unpermute", backend, _UNPERMUTE, rows, routing)


def _shape_class(x: Tensor, routing: Routing) -> str:
    return movement_class(routing.num_tokens, x.dtype)


def _kernels(op: str, function: Callable[..., Tensor]) -> dict[str, Implementation]:
    """``function`` takes the backend's name first."""
    return {
        backend: Implementation(
            partial(function, backend),
            lambda x, routing, why_not=why_not: why_not(x),
            automatic=fastest(op, backend, _shape_class),
        )
        for backend, why_not in KERNEL_BACKENDS.items()
    }


_PERMUTE = {**_kernels("permute", permute_on_kernels), **pytorch_only(permute_reference)}
_UNPERMUTE = {**_kernels("unpermute", unpermute_on_kernels), **pytorch_only(unpermute_reference)}
