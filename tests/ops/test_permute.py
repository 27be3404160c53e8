"""`permute` and `unpermute` against loops over rows and tokens."""

import pytest
import torch

from diffmoe_kernels import Routing, ops
from diffmoe_kernels.cuda_support import ON_CPU, extension
from diffmoe_kernels.testing import (
    ROUTING_KINDS,
    assert_close,
    check_accuracy,
    poisoned_allocations,
    random_topk,
    value_and_grads,
)
from tests.ops.backends import KERNELS

BACKENDS = ["reference", *KERNELS]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = [(11, 5, 2, 6), (1, 1, 1, 1), (1, 3, 3, 7), (40, 4, 1, 3), (70, 5, 3, 264)]  # T, E, K, D


def dtypes_of(backend):
    return DTYPES if backend == "reference" else DTYPES[1:]


def permute_loop(x, ids):
    """Rows by expert, then token; zeros for dropped slots."""
    order = sorted((e, t) for t, row in enumerate(ids.tolist()) for e in row if e >= 0)
    return torch.stack([x[t] for _, t in order] + [torch.zeros_like(x[0])] * (ids.numel() - len(order)))


def unpermute_loop(rows, weights, ids):
    """Each token's weighted sum, added slot by slot."""
    order = sorted((e, t, k) for t, row in enumerate(ids.tolist()) for k, e in enumerate(row) if e >= 0)
    tokens = [[torch.zeros_like(rows[0])] for _ in ids]
    for row, (_, token, slot) in enumerate(order):
        tokens[token].append(weights[token, slot] * rows[row])
    return torch.stack([torch.stack(parts).sum(0) for parts in tokens])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ROUTING_KINDS)
@pytest.mark.parametrize("num_tokens, num_experts, top_k, hidden_size", SIZES)
def test_permute_moves_exactly(num_tokens, num_experts, top_k, hidden_size, kind, backend):
    if kind == "empty_experts" and top_k > (num_experts + 1) // 2:
        top_k = 1
    ids, weights = random_topk(num_tokens, num_experts, top_k, kind=kind)
    routing = Routing.from_topk(ids, weights, num_experts)
    for dtype in dtypes_of(backend):
        x = torch.randn(num_tokens, hidden_size).to(dtype)
        with poisoned_allocations():
            ours = value_and_grads(lambda x: ops.permute(x, routing, backend=backend), x=x)
        loop = value_and_grads(lambda x: permute_loop(x, ids), x=x)
        valid = int(routing.group_offsets[-1])  # past it the kernel leaves rows unwritten
        assert_close(ours["output"][:valid], loop["output"][:valid], tolerance=0)
        # A token's gradient is a sum over its experts; exact where the order of a sum does not matter.
        assert_close(ours["grad of x"], loop["grad of x"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hidden_size", [6, 40, 264])
@pytest.mark.parametrize("kind", ROUTING_KINDS)
def test_unpermute(kind, hidden_size, backend):
    ids, weights = random_topk(11, 6, 3, kind=kind)
    inputs = {"rows": torch.randn(33, hidden_size), "weights": weights}

    def ours(rows, weights):
        # The comparison's own float64 run is of the reference.
        chosen = "reference" if rows.dtype == torch.float64 else backend
        return ops.unpermute(rows, Routing.from_topk(ids, weights, 6), backend=chosen)

    for dtype in dtypes_of(backend):
        with poisoned_allocations():
            check_accuracy(ours, lambda rows, weights: unpermute_loop(rows, weights, ids), dtype, inputs)


@pytest.mark.parametrize("num_tokens, num_experts, top_k, hidden_size", SIZES[:4])
def test_gradcheck(num_tokens, num_experts, top_k, hidden_size):
    ids, weights = random_topk(num_tokens, num_experts, top_k, kind="dropped")
    x = torch.randn(num_tokens, hidden_size, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(num_tokens * top_k, hidden_size, dtype=torch.float64, requires_grad=True)
    weights.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.permute(x, Routing.from_topk(ids, weights, num_experts)), (x,))
    assert torch.autograd.gradcheck(
        lambda rows, weights: ops.unpermute(rows, Routing.from_topk(ids, weights, num_experts)), (rows, weights)
    )


def test_rows_past_the_count_leak_nowhere():
    ids, weights = random_topk(8, 3, 2, kind="dropped")
    routing = Routing.from_topk(ids, weights.float(), 3)
    count = int(routing.group_offsets[-1])
    assert count < 16
    rows = torch.randn(16, 4)
    clean = value_and_grads(
        lambda rows, gates: ops.unpermute(rows, with_gates(routing, gates)), rows=rows, gates=routing.gates
    )
    rows[count:] = torch.nan
    dirty = value_and_grads(
        lambda rows, gates: ops.unpermute(rows, with_gates(routing, gates)), rows=rows, gates=routing.gates
    )
    for name, expected in clean.items():
        assert_close(dirty[name], expected, tolerance=0, name=name)
    assert not dirty["grad of gates"][count:].any() and not dirty["grad of rows"][count:].any()
    # Nor does a gradient that arrives there.
    x = torch.randn(8, 4, requires_grad=True)
    cotangent = torch.ones(16, 4)
    cotangent[count:] = torch.nan
    ops.permute(x, routing).backward(cotangent)
    assert torch.equal(x.grad, (ids >= 0).sum(1, keepdim=True).expand(8, 4).float())


def with_gates(routing, gates):
    return Routing(routing.token_indices, gates, routing.group_offsets, routing.token_offsets, routing.token_rows)


def test_any_strides():
    ids, weights = random_topk(6, 3, 2)
    routing = Routing.from_topk(ids, weights.float(), 3)
    for x in (torch.randn(4, 6).t(), torch.randn(6, 8)[:, ::2], torch.randn(4).expand(6, 4)):
        assert torch.equal(ops.permute(x, routing), ops.permute(x.contiguous(), routing))
    for rows in (torch.randn(4, 12).t(), torch.randn(12, 8)[:, ::2], torch.randn(4).expand(12, 4)):
        assert torch.equal(ops.unpermute(rows, routing), ops.unpermute(rows.contiguous(), routing))
    x = torch.randn(6, 4, requires_grad=True)
    ops.unpermute(ops.permute(x, routing), routing).sum().backward()  # a gradient of stride 0
    assert_close(x.grad, weights.float().sum(1, keepdim=True).expand(6, 4))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_rows_that_begin_at_no_16_bytes(dtype, backend):
    ids, weights = random_topk(70, 5, 3, kind="dropped")
    routing = Routing.from_topk(ids, weights.float(), 5)
    for offset in (0, 1):
        x = torch.randn(70 * 264 + offset).to(dtype)[offset:].view(70, 264).requires_grad_()
        results = {}
        for which in (backend, "reference"):
            y = ops.unpermute(ops.permute(x, routing, backend=which), routing, backend=which)
            results[which] = y, *torch.autograd.grad(y, x, x.detach())
        for ours, expected in zip(*results.values(), strict=True):
            assert_close(ours, expected)


@pytest.mark.skipif(not ON_CPU, reason="runs on the extension built for a CPU")
@pytest.mark.parametrize("order", [-1, 1])
def test_threads_in_any_order(order):
    try:
        extension.set_thread_order(order)
        test_rows_that_begin_at_no_16_bytes(torch.float32, "cuda")
    finally:
        extension.set_thread_order(0)


def test_no_tokens():
    routing = Routing.from_topk(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), 3)
    rows = ops.permute(torch.zeros(0, 4), routing)
    assert rows.shape == ops.unpermute(rows, routing).shape == (0, 4)


def test_rejects_bad_input():
    ids, weights = random_topk(6, 3, 2)
    routing = Routing.from_topk(ids, weights, 3)
    with pytest.raises(TypeError, match="x: expected a floating dtype, got torch.int64"):
        ops.permute(torch.zeros(6, 4, dtype=torch.int64), routing)
    with pytest.raises(ValueError, match=r"x: expected shape \(6, D\), got \(5, 4\)"):
        ops.permute(torch.zeros(5, 4), routing)
    with pytest.raises(TypeError, match="rows: expected a floating dtype, got torch.bool"):
        ops.unpermute(torch.zeros(12, 4, dtype=torch.bool), routing)
    with pytest.raises(ValueError, match=r"rows: expected shape \(12, D\), got \(6, 4\)"):
        ops.unpermute(torch.zeros(6, 4), routing)
    for function, rows in ((ops.permute, 6), (ops.unpermute, 12)):
        with pytest.raises(ValueError, match="different devices: .* on meta, routing on cpu"):
            function(torch.zeros(rows, 4, device="meta"), routing)
        with pytest.raises(NotImplementedError, match="permute: backend 'cuda' can't run here: the"):
            function(torch.zeros(rows, 4, dtype=torch.float64), routing, backend="cuda")


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("routing: expected a Routing, got Tensor", lambda: ops.permute(torch.zeros(2, 4), torch.zeros(2, 1))),
        ("routing: expected a Routing, got tuple", lambda: ops.unpermute(torch.zeros(2, 4), ())),
        ("routing: expected a Routing", lambda: ops.experts(torch.zeros(2, 4), None, None, None)),
        ("topk_ids: expected a tensor, got list", lambda: Routing.from_topk([[0]], torch.ones(1, 1), 2)),
        ("offs: expected a tensor, got list", lambda: ops.grouped_gemm(torch.ones(2, 4), torch.ones(2, 4, 4), [1, 2])),
        ("expert_bias: expected a tensor", lambda: ops.router_topk(torch.ones(2, 4), 1, expert_bias=[0.0] * 4)),
    ],
)
def test_other_objects_than_tensors_are_named(message, call):
    with pytest.raises(TypeError, match=message):
        call()
