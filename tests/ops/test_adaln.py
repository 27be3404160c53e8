"""The `adaln` ops against a loop over samples and tokens."""

import pytest
import torch

from diffmoe_kernels import ops
from diffmoe_kernels.testing import assert_close, check_accuracy, poisoned_allocations, value_and_grads
from diffmoe_kernels.triton_support import INTERPRETED

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["reference", *(["triton"] if INTERPRETED else [])]
WAYS = [(backend, dtype) for backend in BACKENDS for dtype in DTYPES if (backend, dtype) != ("triton", torch.float64)]


def adaln_loop(x, shift, scale, weight=None, norm="layernorm", eps=1e-6):
    """norm(x) * weight * (1 + scale) + shift, token by token."""
    return torch.stack(
        [
            torch.stack([modulate(token, shift[b], scale[b], weight, norm, eps) for token in sample])
            for b, sample in enumerate(x)
        ]
    )


def modulate(token, shift, scale, weight, norm, eps):
    centred = token - token.sum() / len(token) if norm == "layernorm" else token
    normed = centred / ((centred**2).sum() / len(token) + eps).sqrt()
    normed = normed if weight is None else normed * weight
    return normed * (1 + scale) + shift


def residual_loop(x, y, gate):
    return torch.stack([torch.stack([x[b, n] + gate[b] * y[b, n] for n in range(x.shape[1])]) for b in range(len(x))])


def make(batch, tokens, hidden, *names):
    per_token = {name: torch.randn(batch, tokens, hidden) for name in names if name in ("x", "y")}
    per_sample = {name: torch.randn(batch, hidden) for name in names if name in ("shift", "scale", "gate")}
    return per_token | per_sample | ({"weight": torch.randn(hidden)} if "weight" in names else {})


def both_loop(x, y, gate, shift, scale, weight=None, norm="layernorm", eps=1e-6):
    x = residual_loop(x, y, gate)
    return x, adaln_loop(x, shift, scale, weight, norm, eps)


@pytest.mark.parametrize(("backend", "dtype"), WAYS)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("sizes", [(2, 5, 6), (1, 1, 8), (3, 1, 64), (2, 7, 72)])
def test_adaln(sizes, norm, backend, dtype):
    for names in (("x", "shift", "scale"), ("x", "shift", "scale", "weight")):
        inputs = make(*sizes, *names)
        with poisoned_allocations():
            check_accuracy(
                lambda **kw: ops.adaln(**kw, norm=norm, backend=backend),
                lambda **kw: adaln_loop(**kw, norm=norm),
                dtype,
                inputs,
            )


@pytest.mark.parametrize(("backend", "dtype"), WAYS)
@pytest.mark.parametrize("sizes", [(2, 5, 6), (1, 1, 1), (3, 2, 64)])
def test_gated_residual(sizes, backend, dtype):
    with poisoned_allocations():
        check_accuracy(
            lambda **kw: ops.gated_residual(**kw, backend=backend),
            residual_loop,
            dtype,
            make(*sizes, "x", "y", "gate"),
        )


@pytest.mark.parametrize(("backend", "dtype"), WAYS)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_the_fused_form_is_both_in_a_row(norm, backend, dtype):
    names = ("x", "y", "gate", "shift", "scale")
    for inputs in (make(2, 5, 6, *names), make(3, 35, 40, *names, "weight")):
        with poisoned_allocations():
            check_accuracy(
                lambda **kw: torch.cat(ops.gated_residual_adaln(**kw, norm=norm, eps=1e-3, backend=backend)),
                lambda **kw: torch.cat(both_loop(**kw, norm=norm, eps=1e-3)),
                dtype,
                inputs,
            )


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_gradcheck(norm):
    leaves = [t.double().requires_grad_() for t in make(2, 3, 4, "x", "y", "gate", "shift", "scale", "weight").values()]

    def function(x, y, gate, shift, scale, weight):
        return ops.gated_residual_adaln(x, y, gate, shift, scale, weight=weight, norm=norm)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_eps_keeps_zeros_finite(norm):
    x = torch.zeros(1, 2, 4, requires_grad=True)
    out = ops.adaln(x, torch.ones(1, 4), torch.zeros(1, 4), norm=norm)
    out.sum().backward()
    assert torch.equal(out, torch.ones(1, 2, 4)) and x.grad.isfinite().all()
    assert_close(
        ops.adaln(torch.ones(1, 1, 4), torch.zeros(1, 4), torch.zeros(1, 4), norm="rmsnorm", eps=3.0),
        torch.full((1, 1, 4), 0.5),
    )


def test_modulation_may_be_wider_than_x():
    """float32 modulation of bfloat16 tokens is rounded once, at the end."""
    inputs = make(2, 5, 64, "x", "shift", "scale")
    x = inputs["x"].bfloat16()
    out = ops.adaln(x, inputs["shift"], inputs["scale"])
    exact = adaln_loop(x.double(), inputs["shift"].double(), inputs["scale"].double())
    assert out.dtype == torch.bfloat16
    assert_close(out, exact, dtype=torch.bfloat16, tolerance=2.5e-3)
    y, gate = torch.randn(2, 5, 64), torch.randn(2, 64)
    out = ops.gated_residual(x, y, gate)
    assert out.dtype == torch.bfloat16
    assert_close(out, residual_loop(x.double(), y.double(), gate.double()), dtype=torch.bfloat16, tolerance=2.5e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.adaln(**inputs).dtype == torch.float32  # the residual stream keeps its dtype
        assert torch.equal(ops.adaln(**inputs), ops.adaln(**{n: t.clone() for n, t in inputs.items()}))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_norm_in_another_dtype(backend, kind, dtype):
    """It is rounded once, at the end, and its gradient is read as it comes: the same bits as of a cast that follows."""
    inputs = make(2, 5, 24, "x", "y", "gate", "shift", "scale", "weight")
    x, y, gate, shift, scale, weight = leaves = [one.to(kind).requires_grad_() for one in inputs.values()]
    for op, arguments in ((ops.adaln, (x, shift, scale)), (ops.gated_residual_adaln, (x, y, gate, shift, scale))):
        found = []
        for of_result in (dtype, torch.float32):
            result = op(*arguments, weight=weight, dtype=of_result, backend=backend)
            *stream, out = result if isinstance(result, tuple) else (result,)
            assert out.dtype == of_result and all(one.dtype == kind for one in stream)
            weighting = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(dtype)
            grads = torch.autograd.grad(out, leaves, weighting.to(of_result), materialize_grads=True, allow_unused=True)
            found.append([out.to(dtype), *grads])
        assert all(torch.equal(one, cast) for one, cast in zip(*found, strict=True))
    exact = adaln_loop(*(one.double() for one in (x, shift, scale, weight)))
    out = ops.adaln(x, shift, scale, weight=weight, dtype=dtype, backend=backend)
    assert_close(out, exact, dtype=dtype, tolerance=1e-5 if dtype == torch.float32 else 4e-3)


def test_any_strides_and_no_samples():
    inputs = make(3, 5, 6, "x", "shift", "scale")
    expected = value_and_grads(ops.adaln, **inputs)
    for name, tensor in inputs.items():
        moved = tensor.movedim(0, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 0)
        for key, value in value_and_grads(ops.adaln, **{**inputs, name: moved}).items():
            assert_close(value, expected[key], name=f"{key}, {name} moved")
    expanded = {name: tensor[:1].expand_as(tensor) for name, tensor in inputs.items()}
    leaves = [tensor.detach().requires_grad_() for tensor in expanded.values()]
    dense = [tensor.detach().contiguous().requires_grad_() for tensor in expanded.values()]
    for leaf, other in zip(
        torch.autograd.grad(ops.adaln(*leaves).sum(), leaves),
        torch.autograd.grad(adaln_loop(*dense).sum(), dense),
        strict=True,
    ):
        assert_close(leaf, other, tolerance=1e-4)  # sums to 0 in exact arithmetic
    assert ops.adaln(*make(0, 5, 6, "x", "shift", "scale").values()).shape == (0, 5, 6)
    assert ops.gated_residual(*make(2, 0, 6, "x", "y", "gate").values()).shape == (2, 0, 6)


X, V = torch.zeros(2, 5, 4), torch.zeros(2, 4)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (TypeError, "x: expected a floating dtype, got torch.int64", lambda: ops.adaln(X.long(), V, V)),
        (ValueError, r"x: expected shape \(B, N, D\), got \(2, 4\)", lambda: ops.adaln(V, V, V)),
        (ValueError, r"shift: expected shape \(2, 4\), got \(1, 4\)", lambda: ops.adaln(X, V[:1], V)),
        (ValueError, r"scale: expected shape \(2, 4\), got \(2, 1\)", lambda: ops.adaln(X, V, V[:, :1])),
        (ValueError, r"weight: expected shape \(4,\), got \(2, 4\)", lambda: ops.adaln(X, V, V, weight=V)),
        (
            ValueError,
            "norm: expected one of 'layernorm', 'rmsnorm', got 'batchnorm'",
            lambda: ops.adaln(X, V, V, norm="batchnorm"),
        ),
        (ValueError, "different devices: x on cpu, shift on meta", lambda: ops.adaln(X, V.to("meta"), V)),
        (ValueError, "different devices: x on cpu, weight on meta", lambda: ops.adaln(X, V, V, weight=V[0].to("meta"))),
        (TypeError, "dtype: expected a floating dtype, got float32", lambda: ops.adaln(X, V, V, dtype="float32")),
        (TypeError, "dtype: expected a floating dtype, got torch.int8", lambda: ops.adaln(X, V, V, dtype=torch.int8)),
        (NotImplementedError, "adaln: there is no 'cuda' backend", lambda: ops.adaln(X, V, V, backend="cuda")),
        (
            ValueError,
            r"y: expected shape \(2, 5, 4\), got \(2, 4\)",
            lambda: ops.gated_residual_adaln(X, V, V, V, V),
        ),
        (TypeError, "x: expected a floating dtype", lambda: ops.gated_residual(X.long(), X, V)),
        (ValueError, r"y: expected shape \(2, 5, 4\), got \(2, 1, 4\)", lambda: ops.gated_residual(X, X[:, :1], V)),
        (ValueError, r"gate: expected shape \(2, 4\), got \(4,\)", lambda: ops.gated_residual(X, X, V[0])),
        (ValueError, "different devices: x on cpu, y on meta", lambda: ops.gated_residual(X, X.to("meta"), V)),
        (
            NotImplementedError,
            "gated_residual: there is no 'cuda'",
            lambda: ops.gated_residual(X, X, V, backend="cuda"),
        ),
    ],
)
def test_rejects_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_none_for_what_is_required():
    x, vector = torch.rand(1, 2, 8), torch.rand(1, 8)
    with pytest.raises(TypeError, match="y: expected a tensor, got NoneType"):
        ops.gated_residual(x, None, vector)
    with pytest.raises(TypeError, match="shift: expected a tensor, got NoneType"):
        ops.adaln(x, None, vector)
    with pytest.raises(TypeError, match="x: expected a tensor, got NoneType"):
        ops.grouped_gemm(None, vector)
