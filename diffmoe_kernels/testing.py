"""Helpers for tests of ops and of kernels, one's own included: comparison, poisoned memory, routing inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from diffmoe_kernels.checks import check_choice

# Largest relative Frobenius error of a result whose order of summation may differ.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}

ROUTING_KINDS = ("balanced", "skewed", "one_expert", "empty_experts", "dropped")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in float64 (Frobenius norms); |actual| where expected is 0."""
    actual, expected = actual.detach().double(), expected.detach().double()
    error, scale = (actual - expected).norm().item(), expected.norm().item()
    return error / scale if scale else error


def assert_close(
    actual: Tensor,
    expected: Tensor,
    *,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    name: str = "result",
) -> None:
    """Asserts that two tensors agree in shape and dtype, and in value up to rounding.

    Args:
        actual: the tensor under test.
        expected: what it should be.
        dtype: what actual's dtype should be; expected's where None.
        tolerance: bound of `relative_error`; where None that of TOLERANCES for the less precise of both dtypes. 0
            demands equal values.
        name: for the message.

    Raises:
        AssertionError: shapes or dtypes differ, an element is not finite, or the error passes the tolerance.
    """
    _check_like(name, actual, expected.shape, expected.dtype if dtype is None else dtype)
    if not actual.dtype.is_floating_point:
        assert torch.equal(actual, expected), f"{name}: got {actual.tolist()}, expected {expected.tolist()}"
        return
    _check_finite(name, actual)
    if tolerance is None:
        tolerance = max(TOLERANCES[actual.dtype], TOLERANCES[expected.dtype])
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.3g}, tolerance {tolerance:.3g}"


def assert_error_within(
    kernel_out: Tensor, plain_out: Tensor, float64_out: Tensor, factor: float = 2.0, *, name: str = "result"
) -> None:
    """Asserts that a kernel is as accurate as plain PyTorch of the same dtype, measured against float64.

    The relative Frobenius error of kernel_out may be ``factor`` times that of plain_out. Where plain_out is exact by
    luck, the bound is ``factor`` times eps / 4, the root mean square error of rounding once, or 5e-7, that of a short
    sum in float32.

    Raises:
        AssertionError: shapes or dtypes differ, an element is not finite, or the error is larger.
    """
    _check_like(name, plain_out, float64_out.shape, kernel_out.dtype)
    _check_like(name, kernel_out, float64_out.shape, kernel_out.dtype)
    _check_finite(name, kernel_out)
    error, plain = relative_error(kernel_out, float64_out), relative_error(plain_out, float64_out)
    bound = factor * max(plain, torch.finfo(kernel_out.dtype).eps / 4, 5e-7)
    assert error <= bound, f"{name}: error {error:.3g} against float64, plain {kernel_out.dtype} has {plain:.3g}"


def value_and_grads(
    function: Callable[..., Tensor], *, weighting_dtype: torch.dtype | None = None, **inputs: Tensor
) -> dict[str, Tensor]:
    """Calls ``function`` on fresh leaves and returns its output and every gradient of a fixed weighting of it.

    Args:
        function: takes the inputs by name and returns one floating tensor.
        weighting_dtype: what the weighting is rounded to before it is cast to the output's dtype; that one where None.
        **inputs: floating tensors; strides are kept.

    Returns:
        {"output": ..., "grad of <name>": ...}; 0 where an input has no gradient.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    output = function(**leaves)
    generator = torch.Generator().manual_seed(0)
    weighting = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(weighting_dtype or output.dtype)
    weighting = weighting.to(output)
    grads = torch.autograd.grad(output, list(leaves.values()), weighting, allow_unused=True, materialize_grads=True)
    return {"output": output.detach(), **{f"grad of {n}": grad for n, grad in zip(leaves, grads, strict=True)}}


def check_accuracy(
    kernel: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    dtype: torch.dtype,
    inputs: Mapping[str, Tensor],
    factor: float = 2.0,
) -> None:
    """`assert_error_within` for the output and every gradient of ``kernel`` in ``dtype``.

    ``plain`` is run in dtype and, on the same rounded inputs, in float64, where ``kernel`` must equal it too.
    """
    rounded = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    wide = {name: tensor.double() for name, tensor in rounded.items()}
    exact = value_and_grads(plain, weighting_dtype=dtype, **wide)
    ours, theirs = value_and_grads(kernel, **rounded), value_and_grads(plain, **rounded)
    for name, expected in exact.items():
        if dtype == torch.float64:
            assert_close(ours[name], expected, name=name)
        else:
            assert_error_within(ours[name], theirs[name], expected, factor, name=f"{name} in {dtype}")


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fills memory that PyTorch allocates uninitialised, inside its own operators too: NaN, or the largest integer.

    What was never written then shows in the result. Uses torch's deterministic mode, and restores it.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def random_topk(
    num_tokens: int, num_experts: int, top_k: int, *, kind: str = "balanced", generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Random choices of a token-choice router, as `Routing.from_topk` takes them.

    Args:
        num_tokens, num_experts, top_k: T, E, K.
        kind: "balanced"; "skewed", low experts more often; "one_expert", the last one chosen by every token;
            "empty_experts", odd ones chosen by none; "dropped", a third of the slots -1.
        generator: torch's global one where None.

    Returns:
        topk_ids: (T, K) int64, distinct within a token.
        topk_weights: (T, K) float64 in [0, 1).

    Raises:
        ValueError: an unknown kind, or more choices than experts to choose from.
    """
    check_choice("kind", kind, ROUTING_KINDS)
    eligible = (num_experts + 1) // 2 if kind == "empty_experts" else num_experts
    if not 0 <= top_k <= eligible:
        raise ValueError(f"top_k: expected 0 to {eligible} for kind {kind!r} of {num_experts} experts, got {top_k}")
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    if kind == "skewed":
        scores -= torch.linspace(0, 1, num_experts)
    elif kind == "one_expert":
        scores[:, -1:] += 1
    elif kind == "empty_experts":
        scores[:, 1::2] = -1
    topk_ids = scores.topk(top_k).indices
    if kind == "dropped":
        topk_ids = topk_ids.masked_fill(torch.rand(topk_ids.shape, generator=generator) < 1 / 3, -1)
    return topk_ids, torch.rand(topk_ids.shape, generator=generator, dtype=torch.float64)


def _check_like(name: str, tensor: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    assert tensor.shape == shape, f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(shape)}"
    assert tensor.dtype == dtype, f"{name}: got {tensor.dtype}, expected {dtype}"


def _check_finite(name: str, tensor: Tensor) -> None:
    count = int((~tensor.isfinite()).sum())
    assert not count, f"{name}: {count} of {tensor.numel()} elements are not finite"
