"""The attention kernels on a GPU, at the published models' sizes: values, gradients, determinism, graphs, addresses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffmoe_kernels import RoPEAttention, ops
from diffmoe_kernels.testing import assert_error_within
from diffmoe_kernels.triton_support import HAS_TRITON
from tests.sanitizer import sanitized

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_TRITON, reason="needs triton")]

# B, N, H, Hkv, d, prefix tokens, rotation, norm
SHAPES = {
    "DSMoE-S": (16, 256, 6, 6, 64, 0, "2d", None),
    "DSMoE-L": (64, 256, 16, 16, 64, 0, "2d", None),  # a program a head
    "DSMoE-3B": (8, 256, 16, 16, 72, 0, "2d", None),
    "JiT-L": (8, 288, 16, 16, 64, 32, "2d_interleaved", "rmsnorm"),
    "512 px": (2, 1024, 16, 16, 64, 0, "2d", None),
    "grouped heads, layer norm": (4, 255, 16, 4, 32, 0, "1d", "layernorm"),
    "wide": (4, 200, 8, 8, 128, 0, "1d", "rmsnorm"),
    "96 channels": (4, 100, 4, 4, 96, 0, "2d", None),
    "long": (1, 4096, 2, 2, 64, 0, None, None),
    "one token": (3, 1, 2, 2, 64, 0, None, None),
    "17 tokens": (3, 17, 2, 2, 32, 1, "1d", "rmsnorm"),
    "1,000 tokens": (2, 1000, 2, 2, 32, 0, "1d", "layernorm"),
}


def inputs_of(sizes: tuple) -> tuple[dict[str, Tensor], dict]:
    batch, num_tokens, heads, kv_heads, head_dim, prefix, rope, norm = sizes
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator)

    inputs = {"qkv": randn(batch, num_tokens, heads + 2 * kv_heads, head_dim)}
    options = {"rope": rope, "num_kv_heads": kv_heads, "num_prefix_tokens": prefix, "qk_norm": norm}
    if rope:
        angles = 6 * torch.rand(num_tokens - prefix, head_dim // 2, device="cuda", generator=generator)
        options |= {"cos": angles.cos(), "sin": angles.sin()}
    if norm:
        inputs |= {name: 1 + 0.1 * randn(head_dim) for name in ("q_norm_weight", "k_norm_weight")}
    return inputs, options


def run(
    inputs: dict[str, Tensor], options: dict, dtype: torch.dtype, backend: str, rounds_to: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The result, and the gradients of a fixed weighting of it, which is rounded to a narrower dtype if given."""
    leaves = {name: one.to(dtype).requires_grad_() for name, one in inputs.items()}
    y = ops.rope_attention(**leaves, **options, backend=backend)
    weighting = torch.randn(y.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    weighting = weighting.to(rounds_to or dtype).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), weighting)
    return dict(zip(["y", *leaves], [y.detach(), *grads], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_as_accurate_as_pytorch(name, dtype) -> None:
    inputs, options = inputs_of(SHAPES[name])
    rounded = {key: one.to(dtype) for key, one in inputs.items()}
    exact = run({key: one.double() for key, one in rounded.items()}, options, torch.float64, "reference", dtype)
    plain, ours = (run(rounded, options, dtype, backend) for backend in ("torch", "triton"))
    for key, expected in exact.items():
        assert_error_within(ours[key], plain[key], expected, 2.0, name=f"{name}, {key}, {dtype}")


@pytest.mark.parametrize("name", ["DSMoE-S", "JiT-L"])
def test_two_runs_have_the_same_bits(name) -> None:
    inputs, options = inputs_of(SHAPES[name])
    one, other = (run(inputs, options, torch.bfloat16, "triton") for _ in range(2))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_training_step_waits_for_nothing_and_fits_in_a_graph() -> None:
    layer = RoPEAttention(384, 6, qk_norm="rmsnorm", grid_size=16, backend="triton").cuda().bfloat16()
    x = torch.randn(8, 256, 384, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)

    def step() -> list[Tensor]:
        return [y := layer(x), *torch.autograd.grad(y, [x, *layer.parameters()], grad)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = [one.detach().clone() for one in step()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for one in results:
        one.detach().fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


def test_addresses_past_2_to_the_31() -> None:
    """2,800 samples of 256 tokens: the last one's numbers lie past 2^31."""
    qkv = torch.randn(2800, 256, 48, 64, device="cuda", dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    tail = qkv[-1:].clone().requires_grad_()
    qkv.requires_grad_()
    tables = ops.rope_table("2d", 64, 16, device="cuda")
    how = {"rope": "2d", "num_kv_heads": 16, "backend": "triton"}
    y, last = ops.rope_attention(qkv, *tables, **how), ops.rope_attention(tail, *tables, **how)
    assert torch.equal(y[-1:], last)
    y[-1:].sum().backward()
    last.sum().backward()
    assert torch.equal(qkv.grad[-1:], tail.grad)


def test_huge_scores_stay_finite() -> None:
    inputs, options = inputs_of(SHAPES["DSMoE-S"])
    inputs["qkv"][:, 7] *= 1e4
    results = run(inputs, options, torch.bfloat16, "triton")
    assert all(one.isfinite().all() for one in results.values())


SANITIZED = """
import sys, torch
from tests.test_gpu_attention import SHAPES, inputs_of, run
for name in ("DSMoE-S", "DSMoE-3B", "JiT-L", "512 px", "grouped heads, layer norm", "96 channels"):
    inputs, options = inputs_of((1, *SHAPES[name][1:]))
    run(inputs, options, torch.bfloat16, "triton")
if "wrong" in sys.argv:  # tables of one token, and 256 that are turned
    from diffmoe_kernels.ops.rope_attention._library import _rope_attention
    qkv, table = torch.zeros(1, 256, 3, 64, device="cuda"), torch.zeros(1, 32, device="cuda")
    _rope_attention(qkv, None, None, None, None, table, table, 1, "2d", 0, "none", 0.0, 1.0, False)
torch.cuda.synchronize()
print("all ran")
"""


def test_no_bad_address() -> None:
    output, faults = sanitized("memcheck", SANITIZED, kernels="_rope_attention")
    assert not faults and "all ran" in output, output[-3000:]


def test_a_bad_address_is_found() -> None:
    """So that the test above looks at these kernels."""
    output, faults = sanitized("memcheck", SANITIZED, "wrong", kernels="_rope_attention")
    assert faults, output[-3000:]
