"""`experts` against a loop over tokens and their slots, both backends."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from diffmoe_kernels import Routing, ops
from diffmoe_kernels.testing import (
    ROUTING_KINDS,
    assert_close,
    check_accuracy,
    poisoned_allocations,
    random_topk,
    value_and_grads,
)
from diffmoe_kernels.triton_support import HAS_TRITON
from tests.ops.on_kernels import ON_KERNELS, experts

ACTIVATIONS = ("swiglu", "gelu_tanh", "silu")
BACKENDS = ("reference", "torch", *([ON_KERNELS, "triton"] if HAS_TRITON else []))


def experts_loop(x, weights, up_proj, down_proj, ids, activation, up_bias=None, down_bias=None, residual=None):
    """The formula of the docstring, one token and one slot at a time."""
    outputs = []
    for token, chosen in enumerate(ids.tolist()):
        total = torch.zeros_like(x[0]) if residual is None else residual[token]
        for slot, e in enumerate(chosen):
            if e < 0:
                continue
            hidden = up_proj[e] @ x[token] + (0 if up_bias is None else up_bias[e])
            if activation == "swiglu":
                half = len(hidden) // 2
                hidden = F.silu(hidden[:half]) * hidden[half:]
            else:
                hidden = F.silu(hidden) if activation == "silu" else F.gelu(hidden, approximate="tanh")
            total = total + weights[token, slot] * (down_proj[e] @ hidden + (0 if down_bias is None else down_bias[e]))
        outputs.append(total)
    return torch.stack(outputs)


def make(
    num_tokens, num_experts, top_k, hidden, inner, *, kind="balanced", activation="swiglu", bias=False, residual=False
):
    """(ids, inputs by name); matrices scaled so that results are of order 1."""
    ids, weights = random_topk(num_tokens, num_experts, top_k, kind=kind)
    up = 2 * inner if activation == "swiglu" else inner
    inputs = {
        "x": torch.randn(num_tokens, hidden),
        "weights": weights.float(),
        "up_proj": torch.randn(num_experts, up, hidden) / hidden**0.5,
        "down_proj": torch.randn(num_experts, hidden, inner) / inner**0.5,
    }
    if bias:
        inputs |= {"up_bias": torch.randn(num_experts, up), "down_bias": torch.randn(num_experts, hidden)}
    if residual:
        inputs["residual"] = torch.randn(num_tokens, hidden)
    return ids, inputs


def with_routing(ids, **options):
    """`experts` of x, topk_weights and the weights, on the routing of ``ids``."""

    def function(x, weights, up_proj, down_proj, **rest):
        routing = Routing.from_topk(ids, weights, up_proj.shape[0])
        return experts(x, routing, up_proj, down_proj, **options, **rest)

    return function


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_value_and_gradients(activation, bias, backend):
    ids, inputs = make(13, 6, 2, 16, 24, kind="dropped", activation=activation, bias=bias, residual=bias)
    kernel = with_routing(ids, activation=activation, backend=backend)
    for dtype in [torch.float32, torch.bfloat16, torch.float16] + [torch.float64] * (backend == "reference"):
        with poisoned_allocations():
            check_accuracy(kernel, lambda **kw: experts_loop(ids=ids, activation=activation, **kw), dtype, inputs)


@pytest.mark.parametrize("kind", ROUTING_KINDS)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 8, 8), (1, 4, 2, 8, 16), (25, 4, 2, 32, 8), (7, 3, 1, 8, 8)])
def test_backends_agree(sizes, kind):
    ids, inputs = (
        make(*sizes, kind=kind, bias=True) if kind != "empty_experts" or sizes[1] > 2 else make(*sizes, bias=True)
    )
    for dtype in (torch.float32, torch.bfloat16):
        cast = {name: tensor.to(dtype) for name, tensor in inputs.items()}
        with poisoned_allocations():
            results = {backend: value_and_grads(with_routing(ids, backend=backend), **cast) for backend in BACKENDS}
            auto = value_and_grads(with_routing(ids), **cast)
        for name, expected in results.pop("reference").items():
            for backend, result in results.items():
                # In bfloat16 the kernel's gates see unrounded rows: test_value_and_gradients has the sharp bound.
                tolerance = 4e-2 if backend in BACKENDS[2:] and dtype == torch.bfloat16 else None
                assert_close(result[name], expected, tolerance=tolerance, name=f"{name} by {backend}")
            assert torch.equal(auto[name], results["torch"][name])  # "auto" takes grouped_mm where it can


@pytest.mark.parametrize("kind", ROUTING_KINDS)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 6, 10), (9, 5, 2, 6, 10), (4, 3, 2, 1, 1), (11, 7, 1, 5, 3)])
def test_odd_sizes(sizes, kind):
    ids, inputs = make(*sizes, kind="dropped" if sizes[1] == 1 else kind, bias=True, residual=True)
    for dtype, backend in ((torch.float64, "auto"), (torch.float32, "auto"), (torch.float32, BACKENDS[-1])):
        cast = {name: tensor.to(dtype) for name, tensor in inputs.items()}
        loop = value_and_grads(lambda **kw: experts_loop(ids=ids, activation="swiglu", **kw), **cast)
        with poisoned_allocations():
            ours = value_and_grads(with_routing(ids, backend=backend if backend != "torch" else "auto"), **cast)
        for name, expected in loop.items():
            assert_close(ours[name], expected, name=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    ids, inputs = make(5, 3, 2, 3, 2, kind="dropped", activation=activation, bias=True, residual=True)
    leaves = {name: tensor.double().requires_grad_() for name, tensor in inputs.items()}
    function = with_routing(ids, activation=activation)
    assert torch.autograd.gradcheck(
        lambda *args: function(**dict(zip(leaves, args, strict=True))), tuple(leaves.values())
    )


def test_all_slots_dropped():
    ids, inputs = make(6, 3, 2, 8, 8, bias=True, residual=True)
    for backend in BACKENDS:
        out = value_and_grads(with_routing(torch.full_like(ids, -1), backend=backend), **inputs)
        assert torch.equal(out["output"], inputs["residual"])
        assert not any(out[f"grad of {name}"].any() for name in inputs if name != "residual")


@pytest.mark.parametrize("backend", ["auto", "reference", *BACKENDS[3:]])
def test_no_tokens(backend):
    _, inputs = make(6, 3, 2, 8, 8, bias=True)
    inputs |= {"x": torch.zeros(0, 8), "weights": torch.zeros(0, 2)}
    with poisoned_allocations():
        out = value_and_grads(with_routing(torch.zeros(0, 2, dtype=torch.int64), backend=backend), **inputs)
    assert out["output"].shape == (0, 8)
    assert not any(out[f"grad of {name}"].any() for name in inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_record_of_int64(backend):
    ids, inputs = make(9, 4, 2, 16, 8)
    routing = Routing.from_topk(ids, inputs.pop("weights"), 4)
    maps = ("token_indices", "group_offsets", "token_offsets", "token_rows")
    wide = replace(routing, **{name: getattr(routing, name).long() for name in maps})
    ours, expected = (experts(routing=one, **inputs, backend=backend) for one in (wide, routing))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    ids, inputs = make(9, 4, 2, 16, 8, bias=True, residual=True)
    expected = value_and_grads(with_routing(ids, backend=backend), **inputs)
    for name in inputs:
        moved = inputs[name].movedim(0, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 0)
        assert moved.stride() != inputs[name].stride()
        ours = value_and_grads(with_routing(ids, backend=backend), **{**inputs, name: moved})
        for key in expected:
            assert_close(ours[key], expected[key], name=f"{key}, {name} moved")


@pytest.mark.parametrize("backend", BACKENDS)
def test_stride_0_inputs_and_gradients(backend):
    ids, inputs = make(9, 4, 2, 16, 8, bias=True, residual=True)
    expanded = {name: tensor[:1].expand_as(tensor) for name, tensor in inputs.items()}

    def grads(function):
        leaves = [tensor.detach().requires_grad_() for tensor in expanded.values()]
        return torch.autograd.grad(function(**dict(zip(expanded, leaves, strict=True))).sum(), leaves)

    ours = grads(with_routing(ids, backend=backend))
    loop = grads(lambda **kw: experts_loop(ids=ids, activation="swiglu", **kw))
    for name, grad, expected in zip(inputs, ours, loop, strict=True):
        assert_close(grad, expected, name=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_master_weights_and_autocast(backend):
    ids, inputs = make(9, 4, 2, 16, 8, bias=True)
    masters = {name: tensor for name, tensor in inputs.items() if name not in ("x", "weights")}
    run = with_routing(ids, backend=backend)
    low = value_and_grads(run, **{**inputs, "x": inputs["x"].bfloat16()})

    def under_autocast(**kw):
        with torch.autocast("cpu", torch.bfloat16):
            return run(**kw)

    cast = value_and_grads(under_autocast, **inputs)
    assert low["output"].dtype == cast["output"].dtype == torch.bfloat16
    assert torch.equal(low["output"], cast["output"])
    for name in masters:
        assert low[f"grad of {name}"].dtype == torch.float32
        assert torch.equal(low[f"grad of {name}"], cast[f"grad of {name}"])
    full = value_and_grads(run, **inputs)
    for name, value in cast.items():
        assert_close(value, full[name], dtype=value.dtype, tolerance=2e-2, name=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_stay_float32_under_autocast(backend):
    """A gate that bfloat16 would round: the weighted sum is accumulated in float32."""
    routing = Routing.from_topk(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[1.001]]), 1)
    up, down = torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)
    bias = torch.full((1, 8), 251.0)  # 251 * 1.001 = 251.25, 251 in bfloat16; 1.001 is 1 there
    gates = routing.gates.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = experts(
            torch.zeros(1, 8),
            routing,
            up,
            down,
            up_bias=torch.zeros(1, 8),
            down_bias=bias,
            activation="silu",
            residual=torch.zeros(1, 8),
            backend=backend,
        )
    out.sum().backward()
    assert gates.grad.dtype == torch.float32 and gates.grad.item() == 8 * 251


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wider_residual_keeps_its_dtype(backend):
    ids, inputs = make(9, 4, 2, 16, 8)
    residual = torch.randn(9, 16)
    inputs = {name: tensor.bfloat16() for name, tensor in inputs.items()}
    out = with_routing(ids, residual=residual, backend=backend)(**inputs)
    assert out.dtype == torch.float32
    # The kernel adds before it rounds the sum.
    assert_close(out, with_routing(ids, backend=backend)(**inputs) + residual, tolerance=2e-3)


def test_dropout_zeroes_activations_and_rescales():
    """With an identity down-projection and one expert the output is the activation, or 0."""
    num_tokens, inner = 200, 16
    ids = torch.zeros(num_tokens, 1, dtype=torch.int64)
    inputs = {
        "x": torch.ones(num_tokens, inner),
        "weights": torch.ones(num_tokens, 1),
        "up_proj": torch.eye(inner)[None],
        "down_proj": torch.eye(inner)[None],
    }
    for backend in BACKENDS[:2]:
        out = with_routing(ids, activation="silu", dropout=0.25, backend=backend)(**inputs)
        value = F.silu(torch.ones(())).item() / 0.75
        assert ((out == 0) | (out - value).abs().lt(1e-6)).all()
        assert 0.2 < (out == 0).float().mean() < 0.3


@pytest.mark.parametrize(
    "reason, sizes, dtype",
    [
        ("not torch.float64", (9, 4, 2, 16, 8), torch.float64),
        ("got a size of 6 in torch.float32", (9, 4, 2, 6, 8), torch.float32),
        ("got a size of 10 in torch.float32", (9, 4, 2, 8, 10), torch.float32),
        ("got a size of 4 in torch.bfloat16", (9, 4, 2, 8, 4), torch.bfloat16),
    ],
)
def test_torch_says_why_it_cannot_run(reason, sizes, dtype):
    ids, inputs = make(*sizes)
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    with pytest.raises(NotImplementedError, match=f"experts: backend 'torch' can't run here: .*{reason}"):
        with_routing(ids, backend="torch")(**inputs)
    assert with_routing(ids)(**inputs).shape == (sizes[0], sizes[3])


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize(
    ("reason", "dtype", "options"),
    [
        ("not torch.float64", torch.float64, {}),
        ("the kernels have no dropout", torch.float32, {"dropout": 0.1}),
        ("both biases or none", torch.float32, {"up_bias": torch.zeros(4, 16)}),
    ],
)
def test_triton_says_why_it_cannot_run(reason, dtype, options):
    ids, inputs = make(9, 4, 2, 16, 8)
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    with pytest.raises(NotImplementedError, match=f"experts: backend 'triton' can't run here: .*{reason}"):
        with_routing(ids, backend="triton", **options)(**inputs)


GOOD = {
    "x": torch.zeros(6, 4),
    "routing": Routing.from_topk(torch.zeros(6, 2, dtype=torch.int64), torch.zeros(6, 2), 3),
    "up_proj": torch.zeros(3, 10, 4),
    "down_proj": torch.zeros(3, 4, 5),
}


@pytest.mark.parametrize(
    "error, message, change",
    [
        (TypeError, "x: expected a floating dtype, got torch.int64", {"x": torch.zeros(6, 4, dtype=torch.int64)}),
        (TypeError, "up_proj: expected a floating dtype", {"up_proj": torch.zeros(3, 10, 4, dtype=torch.int64)}),
        (TypeError, "down_proj: expected a floating dtype", {"down_proj": torch.zeros(3, 4, 5, dtype=torch.int64)}),
        (TypeError, "up_bias: expected a floating dtype", {"up_bias": torch.zeros(3, 10, dtype=torch.int64)}),
        (TypeError, "down_bias: expected a floating dtype", {"down_bias": torch.zeros(3, 4, dtype=torch.int64)}),
        (TypeError, "residual: expected a floating dtype", {"residual": torch.zeros(6, 4, dtype=torch.int64)}),
        (ValueError, r"x: expected shape \(6, D\), got \(5, 4\)", {"x": torch.zeros(5, 4)}),
        (ValueError, r"down_proj: expected shape \(3, 4, I\), got \(2, 4, 5\)", {"down_proj": torch.zeros(2, 4, 5)}),
        (ValueError, r"up_proj: expected shape \(3, 10, 4\), got \(3, 5, 4\)", {"up_proj": torch.zeros(3, 5, 4)}),
        (ValueError, r"up_proj: expected shape \(3, 5, 4\), got \(3, 10, 4\)", {"activation": "silu"}),
        (ValueError, r"up_bias: expected shape \(3, 10\), got \(3, 5\)", {"up_bias": torch.zeros(3, 5)}),
        (ValueError, r"down_bias: expected shape \(3, 4\), got \(3, 5\)", {"down_bias": torch.zeros(3, 5)}),
        (ValueError, r"residual: expected shape \(6, 4\), got \(4,\)", {"residual": torch.zeros(4)}),
        (ValueError, "activation: expected one of 'swiglu', 'gelu_tanh', 'silu', got 'relu'", {"activation": "relu"}),
        (ValueError, r"dropout: expected a probability in \[0, 1\), got 1.0", {"dropout": 1.0}),
        (ValueError, r"dropout: expected a probability in \[0, 1\), got -0.1", {"dropout": -0.1}),
        (
            ValueError,
            "different devices: routing on cpu, x on cpu, up_proj on meta",
            {"up_proj": torch.zeros(3, 10, 4, device="meta")},
        ),
        (ValueError, "different devices: .* down_bias on meta", {"down_bias": torch.zeros(3, 4, device="meta")}),
        (
            ValueError,
            "backend: expected one of 'auto', 'reference', 'torch', 'triton', 'cuda', got None",
            {"backend": None},
        ),
        (
            NotImplementedError,
            "experts: there is no 'cuda' backend; this op has .*'torch', 'reference'",
            {"backend": "cuda"},
        ),
    ],
)
def test_rejects_bad_input(error, message, change):
    with pytest.raises(error, match=message):
        ops.experts(**{**GOOD, **change})
