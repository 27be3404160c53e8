"""The adaLN kernels on a GPU, at the published models' sizes: values, gradients, determinism, graphs, addresses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffmoe_kernels import ops
from diffmoe_kernels.testing import assert_error_within, relative_error
from diffmoe_kernels.triton_support import HAS_TRITON

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_TRITON, reason="needs triton")]

# B, N, D, norm
SHAPES = {
    "DSMoE-L": (16, 256, 1024, "layernorm"),
    "DSMoE-S": (64, 256, 384, "layernorm"),
    "DSMoE-3B": (8, 256, 1152, "rmsnorm"),
    "JiT-L": (8, 288, 1024, "rmsnorm"),
    "odd": (3, 77, 130, "layernorm"),
    "wide": (2, 64, 4096, "rmsnorm"),
    "one token": (5, 1, 72, "layernorm"),
}


def inputs_of(sizes: tuple) -> dict[str, Tensor]:
    batch, num_tokens, hidden, norm = sizes
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator)

    inputs = {name: randn(batch, num_tokens, hidden) for name in ("x", "y")}
    inputs |= dict(zip(("gate", "shift", "scale"), randn(batch, 3 * hidden).chunk(3, 1), strict=True))
    return inputs | ({"weight": randn(hidden)} if norm == "rmsnorm" else {})


def run(
    inputs: dict[str, Tensor], norm: str, backend: str, weightings: list[Tensor], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    leaves = {name: one.detach().requires_grad_() for name, one in inputs.items()}
    results = ops.gated_residual_adaln(**leaves, norm=norm, dtype=dtype, backend=backend)
    weightings = [one.to(result) for one, result in zip(weightings, results, strict=True)]
    grads = torch.autograd.grad(results, list(leaves.values()), weightings)
    return {"stream": results[0].detach(), "out": results[1].detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_as_accurate_as_pytorch(name, dtype) -> None:
    norm = SHAPES[name][-1]
    inputs = {key: one.to(dtype) for key, one in inputs_of(SHAPES[name]).items()}
    weightings = [torch.randn_like(inputs["x"]) for _ in range(2)]
    exact = run({key: one.double() for key, one in inputs.items()}, norm, "reference", weightings)
    plain, ours = (run(inputs, norm, backend, weightings) for backend in ("torch", "triton"))
    for key, expected in exact.items():
        assert_error_within(ours[key], plain[key], expected, name=f"{name}, {key}, {dtype}")


@pytest.mark.parametrize("name", ["DSMoE-L", "JiT-L", "odd"])
def test_a_float32_stream_under_autocast(name) -> None:
    """Branch, vectors and the norm in bfloat16."""
    norm = SHAPES[name][-1]
    inputs = {key: one if key in ("x", "weight") else one.bfloat16() for key, one in inputs_of(SHAPES[name]).items()}
    weightings = [torch.randn_like(inputs["y"]) for _ in range(2)]
    exact = run({key: one.double() for key, one in inputs.items()}, norm, "reference", weightings)
    plain, ours = (run(inputs, norm, backend, weightings, torch.bfloat16) for backend in ("torch", "triton"))
    for key, expected in exact.items():
        assert ours[key].dtype == plain[key].dtype
        assert_error_within(ours[key], plain[key], expected, name=f"{name}, {key}")


def test_two_runs_have_the_same_bits() -> None:
    inputs = {key: one.bfloat16() for key, one in inputs_of(SHAPES["DSMoE-L"]).items()}
    weightings = [torch.randn_like(inputs["x"]) for _ in range(2)]
    one, other = (run(inputs, "layernorm", "triton", weightings) for _ in range(2))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_step_waits_for_nothing_and_fits_in_a_graph() -> None:
    inputs = {key: one.bfloat16() for key, one in inputs_of(SHAPES["JiT-L"]).items()}
    weightings = [torch.randn_like(inputs["x"]) for _ in range(2)]

    def step() -> list[Tensor]:
        return list(run(inputs, "rmsnorm", "triton", weightings).values())

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for one in results:
        one.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


def test_addresses_past_2_to_the_31() -> None:
    """The last sample of 2.2 billion numbers as if it were alone."""
    batch, num_tokens, hidden = 2100, 1024, 1024
    x = torch.randn(batch, num_tokens, hidden, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    vectors = torch.randn(3, batch, hidden, device="cuda", dtype=torch.bfloat16)

    def results(start: int) -> tuple[Tensor, ...]:
        tokens, (gate, shift, scale) = x[start:].detach().requires_grad_(), vectors[:, start:]
        stream, out = ops.gated_residual_adaln(tokens, tokens.detach(), gate, shift, scale, backend="triton")
        return stream.detach(), out.detach(), *torch.autograd.grad(out, tokens, torch.ones_like(out))

    alone = results(batch - 1)
    for one, other in zip(results(0), alone, strict=True):
        assert relative_error(one[-1:], other) == 0
