"""Ops on a GPU as they may be called: any layout, another GPU than the current one, addresses past 2^31."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

from diffmoe_kernels import Routing, ops
from diffmoe_kernels.cuda_support import HAS_CUDA, not_loaded
from diffmoe_kernels.testing import assert_close, random_topk, value_and_grads
from diffmoe_kernels.triton_support import HAS_TRITON

pytestmark = pytest.mark.gpu
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]


def randn(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(size, device="cuda", dtype=dtype)


def needs_memory(gib: float) -> None:
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib:g} GiB of a GPU's memory")


def laid_out(matrix: Tensor, layout: str) -> Tensor:
    """The same numbers by rows or by columns."""
    return matrix.contiguous() if layout == "rows" else matrix.mT.contiguous().mT


# The operands' sizes are multiples of 8, as grouped_mm wants; the ends of groups need not be.
ROWS, DEPTH, WIDTH, ENDS = 1032, 264, 392, (5, 5, 400, 401, 1024)
FORMS = {
    "rows": ((ROWS, DEPTH), (len(ENDS), DEPTH, WIDTH)),
    "columns": ((len(ENDS), DEPTH, WIDTH), (WIDTH, ROWS)),
    "sums": ((DEPTH, ROWS), (ROWS, WIDTH)),
}


@pytest.mark.parametrize("w_layout", ["rows", "columns"])
@pytest.mark.parametrize("x_layout", ["rows", "columns"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_gemm_in_every_form_and_layout(backend, form, x_layout, w_layout) -> None:
    """Groups of 5 rows, none, and one among them; the last rows are in no group."""
    offs = torch.tensor(ENDS, device="cuda", dtype=torch.int32)
    x, w = FORMS[form]
    inputs = {"x": laid_out(randn(*x), x_layout), "w": laid_out(randn(*w), w_layout)}
    ours, expected = (
        value_and_grads(lambda x, w, backend=one: ops.grouped_gemm(x, w, offs, backend=backend), **inputs)
        for one in (backend, "reference")
    )
    for name in expected:
        assert_close(ours[name], expected[name], name=name)


@needs_triton
def test_sums_over_rows_with_addresses_past_2_to_the_31() -> None:
    """(M, R) x (R, N): the kernel reads x transposed, its stride times its index passes 2^31."""
    needs_memory(8)
    x, w = randn(4200, 524288), randn(524288, 16)
    assert x.numel() > 2**31
    out = ops.grouped_gemm(x, w, torch.tensor([1000, 524288], device="cuda", dtype=torch.int32), backend="triton")
    for group, rows in enumerate((slice(0, 1000), slice(1000, 524288))):
        assert_close(out[group, -8:], x[-8:, rows].float() @ w[rows].float(), dtype=torch.bfloat16)


@needs_triton
def test_rows_laid_out_by_columns_with_addresses_past_2_to_the_31() -> None:
    needs_memory(8)
    x, w = randn(4200, 524288).mT, randn(2, 4200, 16)
    out = ops.grouped_gemm(x, w, torch.tensor([1000, 524288], device="cuda", dtype=torch.int32), backend="triton")
    for part, matrix in ((slice(8), w[0]), (slice(-8, None), w[1])):
        assert_close(out[part], x[part].float() @ matrix.float(), dtype=torch.bfloat16)


def routing_of(num_tokens: int, num_experts: int, top_k: int) -> Routing:
    ids, weights = random_topk(num_tokens, num_experts, top_k, kind="skewed")
    return Routing.from_topk(ids.cuda(), weights.float().cuda(), num_experts)


def every_other(tensor: Tensor) -> Tensor:
    """The same numbers, a stride of 2 between them."""
    return torch.stack((tensor, tensor.new_zeros(tensor.shape)), dim=-1)[..., 0]


def moved_and_computed(routing: Routing, backend: str) -> dict[str, dict[str, Tensor]]:
    """What each op that takes a routing makes of it, with gradients; gates in the routing's dtype."""
    torch.manual_seed(0)
    x, rows = randn(routing.num_tokens, 64), randn(routing.num_rows, 64)
    up, down = randn(routing.num_experts, 96, 64), randn(routing.num_experts, 64, 48)

    def with_gates(gates: Tensor) -> Routing:
        return replace(routing, gates=gates)

    return {
        "permute": value_and_grads(lambda x: ops.permute(x, routing, backend=backend), x=x),
        "unpermute": value_and_grads(
            lambda rows, gates: ops.unpermute(rows, with_gates(gates), backend=backend),
            **{"rows": rows, "gates": routing.gates},
        ),
        "experts": value_and_grads(
            lambda x, up, down, gates: ops.experts(x, with_gates(gates), up, down, backend=backend),
            **{"x": x, "up": up, "down": down, "gates": routing.gates},
        ),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_index_arrays_may_have_gaps(backend) -> None:
    routing = routing_of(500, 6, 2)
    strided = Routing(**{name: every_other(value) for name, value in vars(routing).items()})
    assert not any(value.is_contiguous() for value in vars(strided).values())
    expected, actual = (moved_and_computed(one, backend) for one in (routing, strided))
    for op, tensors in expected.items():
        for name, value in tensors.items():
            assert torch.equal(actual[op][name], value), f"{op}, {name}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_in_float64_count_as_in_float32(backend) -> None:
    routing = routing_of(500, 6, 2)
    wide = replace(routing, gates=routing.gates.double())
    expected, actual = (moved_and_computed(one, backend) for one in (routing, wide))
    for op, tensors in expected.items():
        for name, value in tensors.items():
            is_gates = name == "grad of gates"
            assert_close(actual[op][name], value, dtype=torch.float64 if is_gates else None, name=f"{op}, {name}")


def on(device: str, backend: str) -> dict[str, Callable[[], object]]:
    """Each op on tensors of that device, the same numbers on every one, and gradients where it has some."""
    torch.manual_seed(0)
    ids, weights = random_topk(300, 8, 2)
    routing = Routing.from_topk(ids, weights.float(), 8)
    floats = {name: torch.randn(size).bfloat16() for name, size in SIZES.items()}
    tensors = {**floats, "logits": torch.randn(300, 8), "ids": ids, "weights": weights.float()}
    t = {name: tensor.to(device) for name, tensor in tensors.items()}
    routing = Routing(**{name: value.to(device) for name, value in vars(routing).items()})
    cos, sin = ops.rope_table("2d", 32, 4, device=device)
    scores, how = t["logits"].sigmoid(), {"backend": backend}
    branch = t["sample"], t["sample"].flip(0)
    calls = {
        "experts": (lambda x, up, down: ops.experts(x, routing, up, down, **how), ("x", "up", "down")),
        "grouped_gemm": (lambda rows, up: ops.grouped_gemm(rows, up.mT, routing.group_offsets, **how), ("rows", "up")),
        "permute": (lambda x: ops.permute(x, routing, **how), ("x",)),
        "unpermute": (lambda rows: ops.unpermute(rows, routing, **how), ("rows",)),
        "rope_attention": (lambda qkv: ops.rope_attention(qkv, cos, sin, rope="2d", **how), ("qkv",)),
        "adaln": (lambda sample, shift: ops.adaln(sample, shift, shift, **how), ("sample", "shift")),
        "capacity_loss": (lambda logits: ops.capacity_loss(logits, routing, **how), ("logits",)),
    }
    found = {
        name: lambda function=function, names=names: value_and_grads(function, **{one: t[one] for one in names})
        for name, (function, names) in calls.items()
    }
    return found | {
        "gated_residual": lambda: ops.gated_residual(*branch, t["shift"], **how),
        "gated_residual_adaln": lambda: ops.gated_residual_adaln(*branch, *[t["shift"]] * 3, **how),
        "router_topk": lambda: ops.router_topk(t["logits"], 2, **how),
        "routing_from_topk": lambda: ops.routing_from_topk(t["ids"], t["weights"], 8, **how),
        "token_choice_drop": lambda: ops.token_choice_drop(t["ids"], t["weights"], 8, 50, **how),
        "token_drop": lambda: ops.token_drop(scores, 40, **how),
        "token_drop_predicted": lambda: ops.token_drop_predicted(
            scores, t["logits"], torch.full((8,), 0.5, device=device), **how
        ),
        "capacity_quantile": lambda: ops.capacity_quantile(t["logits"], 40, **how),
    }


SIZES = {
    **{"x": (300, 64), "rows": (600, 64), "up": (8, 96, 64), "down": (8, 64, 48)},
    **{"qkv": (3, 16, 3, 2, 32), "sample": (3, 16, 64), "shift": (3, 64)},
}
OPS = tuple(name for name in ops.__all__ if name[0].islower() and name != "rope_table")
ON_CUDA = "router_topk", "token_drop", "token_drop_predicted", "token_choice_drop", "permute", "unpermute"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "backend",
    [
        "auto",
        pytest.param("triton", marks=needs_triton),
        pytest.param("cuda", marks=pytest.mark.skipif(not HAS_CUDA, reason=f"the extension is {not_loaded}")),
    ],
)
def test_tensors_of_a_gpu_that_is_not_current(backend, op) -> None:
    if backend == "cuda" and op not in ON_CUDA:
        pytest.skip("it has no kernels in CUDA C++")
    assert torch.cuda.current_device() == 0
    expected, actual = (_pytree.tree_leaves(on(device, backend)[op]()) for device in ("cuda:0", "cuda:1"))
    for right, ours in zip(expected, actual, strict=True):
        assert ours.device == torch.device("cuda:1") and torch.equal(ours.cpu(), right.cpu())
