"""The adaLN kernels: widths, strides, dtypes that differ, schemas, compilation, memory, launches, determinism."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffmoe_kernels import ops
from diffmoe_kernels.testing import assert_close, check_accuracy, poisoned_allocations
from diffmoe_kernels.triton_support import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs triton, interpreted")
VECTORS = ("gate", "shift", "scale")


def make(batch: int, tokens: int, hidden: int) -> dict[str, Tensor]:
    inputs = {name: torch.randn(batch, tokens, hidden) for name in ("x", "y")}
    return inputs | {name: torch.randn(batch, hidden) for name in VECTORS} | {"weight": torch.randn(hidden)}


def both(x, y, gate, shift, scale, weight=None, norm="layernorm", backend="triton") -> tuple[Tensor, Tensor]:
    return ops.gated_residual_adaln(x, y, gate, shift, scale, weight=weight, norm=norm, backend=backend)


def grads_of(function, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """The two results and the gradients of a fixed weighting of them."""
    leaves = {name: one.detach().requires_grad_() for name, one in inputs.items()}
    results = function(**leaves, **options)
    generator = torch.Generator().manual_seed(0)
    weighting = [torch.randn(one.shape, generator=generator).to(one) for one in results]
    grads = torch.autograd.grad(results, list(leaves.values()), weighting)
    return {"stream": results[0].detach(), "out": results[1].detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("sizes", [(2, 17, 1), (1, 40, 7), (2, 33, 96), (3, 1, 130), (1, 5, 1152), (1, 2, 4096)])
def test_lengths_and_widths(sizes, norm):
    """Several programs a sample, a last one with few tokens, rows that are no power of 2."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with poisoned_allocations():
            check_accuracy(
                lambda **kw: torch.cat(both(**kw, norm=norm)),
                lambda **kw: torch.cat(both(**kw, norm=norm, backend="reference")),
                dtype,
                make(*sizes),
            )


def test_many_parts_are_summed():
    """More than the second kernel takes at a time."""
    inputs = make(1, 300, 8)
    for name, expected in grads_of(both, inputs, backend="reference").items():
        assert_close(grads_of(both, inputs)[name], expected, name=name)


@pytest.mark.parametrize("sizes", [(1, 100, 7), (2, 49, 96), (1, 97, 1152)])
def test_tiles_of_many_tokens(sizes, monkeypatch):
    """As there are where tokens are many: 32 of a program, 48 in the backward of both ops."""
    monkeypatch.setattr(importlib.import_module("diffmoe_kernels.ops.adaln._triton"), "BUSY", 1)
    for dtype in (torch.float32, torch.bfloat16):
        with poisoned_allocations():
            check_accuracy(
                lambda **kw: torch.cat(both(**kw)), lambda **kw: torch.cat(both(**kw, backend="reference")), dtype,
                make(*sizes),
            )  # fmt: skip


def test_zeros_and_no_epsilon():
    """Rows that are not there have no deviation to divide by: with eps = 0 they must not reach the sums."""
    x, vector = torch.randn(2, 3, 6), torch.randn(2, 6)
    for norm in ("layernorm", "rmsnorm"):
        results = {}
        for backend in ("triton", "reference"):
            leaves = [one.clone().requires_grad_() for one in (x, vector, vector)]
            out = ops.adaln(*leaves, norm=norm, eps=0.0, backend=backend)
            results[backend] = [out, *torch.autograd.grad(out.square().sum(), leaves)]
        for ours, right in zip(*results.values(), strict=True):
            assert_close(ours, right)


def test_any_strides():
    """Vectors are read where `chunk` left them; everything else is copied if need be."""
    inputs = make(3, 18, 20)
    expected = grads_of(both, inputs)
    moved = {name: one.movedim(0, -1).clone().movedim(-1, 0) for name, one in inputs.items() if one.dim() > 1}
    for name, value in grads_of(both, {**inputs, **moved}).items():
        assert torch.equal(value, expected[name]), name
    chunks = torch.cat([inputs[name] for name in VECTORS], 1).chunk(3, dim=1)
    for name, value in grads_of(both, {**inputs, **dict(zip(VECTORS, chunks, strict=True))}).items():
        assert torch.equal(value, expected[name]), name
    expanded = {name: one[:1].expand_as(one) for name, one in inputs.items() if one.dim() > 1}
    dense = {name: one.contiguous() for name, one in expanded.items()}
    ours = grads_of(both, {**inputs, **expanded})
    for name, value in grads_of(both, {**inputs, **dense}).items():
        assert torch.equal(ours[name], value), name


def test_gradients_of_stride_0():
    inputs = {name: one.requires_grad_() for name, one in make(2, 5, 12).items()}
    results = {}
    for backend in ("triton", "reference"):
        stream, out = both(**inputs, backend=backend)
        results[backend] = torch.autograd.grad(stream.sum() + 2 * out.sum(), list(inputs.values()))
    for name, ours, right in zip(inputs, *results.values(), strict=True):
        assert_close(ours, right, tolerance=1e-5, name=name)


def test_dtypes_that_differ():
    """As a model under autocast has them: a float32 stream, a bfloat16 branch and vectors; and the other way."""
    for stream, branch, vector in (
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float64),
    ):
        inputs = make(2, 19, 24)
        kinds = {"x": stream, "y": branch, **dict.fromkeys((*VECTORS, "weight"), vector)}
        inputs = {name: one.to(kinds[name]) for name, one in inputs.items()}
        ours = grads_of(both, inputs)
        assert all(ours[name].dtype == kind for name, kind in kinds.items())
        exact = grads_of(both, {name: one.double() for name, one in inputs.items()}, backend="reference")
        for name, value in ours.items():
            bound = {torch.float32: 5e-3, torch.bfloat16: 1e-2, torch.float16: 1.5e-3, torch.float64: 2e-3}[value.dtype]
            assert_close(value, exact[name], dtype=value.dtype, tolerance=bound, name=name)


@pytest.mark.parametrize("used", ["stream", "out", "neither"])
def test_results_that_nothing_uses(used):
    results = {}
    for backend in ("triton", "reference"):
        inputs = {name: one.requires_grad_() for name, one in make_seeded().items()}
        stream, out = both(**inputs, backend=backend)
        loss = {"stream": stream, "out": out, "neither": inputs["x"]}[used].square().sum()
        grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)
        results[backend] = grads
    for ours, right in zip(*results.values(), strict=True):
        assert_close(ours, right, tolerance=1e-5)


def make_seeded() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return make(2, 5, 12)


@pytest.mark.parametrize("name", ["x", "y", "gate", "shift", "scale", "weight"])
def test_one_gradient_alone(name):
    inputs = make(2, 5, 12)
    expected = grads_of(both, inputs)[name]
    leaf = inputs[name].requires_grad_()
    results = both(**inputs)
    generator = torch.Generator().manual_seed(0)
    weighting = [torch.randn(one.shape, generator=generator) for one in results]
    assert torch.equal(torch.autograd.grad(results, leaf, weighting)[0], expected)


def kept(function, *args, **options) -> set[tuple[int, ...]]:
    """Shapes of what is saved for the backward, inputs and results apart."""
    own, found = {one.data_ptr() for one in args}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: found.append(one) or one, lambda one: one):
        results = function(*args, **options)
    own |= {one.data_ptr() for one in (results if isinstance(results, tuple) else (results,))}
    return {tuple(one.shape) for one in found if one.data_ptr() not in own}


def test_nothing_is_kept_but_inputs_and_results():
    x, y, gate, shift, scale, weight = (one.requires_grad_() for one in make(2, 5, 12).values())
    assert not kept(ops.adaln, x, shift, scale, backend="triton")
    assert not kept(ops.gated_residual, x, y, gate, backend="triton")
    assert not kept(both, x, y, gate, shift, scale, weight)
    with torch.no_grad():
        assert all(one.grad_fn is None for one in both(x, y, gate, shift, scale, weight))


def test_same_bits_twice():
    inputs = {name: one.bfloat16() for name, one in make(2, 70, 96).items()}
    one, other = grads_of(both, inputs), grads_of(both, inputs)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_launches(monkeypatch):
    """One forward, two backward."""
    kernels = pytest.importorskip("diffmoe_kernels.ops.adaln._triton")
    launched = []
    for name in ("_adaln_fwd_kernel", "_adaln_bwd_kernel", "_adaln_sum_chunks_kernel"):

        class Counted:
            def __init__(self, kernel, name):
                self.kernel, self.name = kernel, name

            def __getitem__(self, grid):
                launched.append(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(kernels, name, Counted(getattr(kernels, name), name))
    grads_of(both, make(2, 40, 12))
    assert launched == ["_adaln_fwd_kernel", "_adaln_bwd_kernel", "_adaln_sum_chunks_kernel"]


def test_operators_keep_their_schemas():
    _library = pytest.importorskip("diffmoe_kernels.ops.adaln._library")
    x, y, gate, shift, scale, weight = (one.requires_grad_() for one in make(2, 5, 12).values())
    for with_weight in (weight, None):
        options = with_weight, "layernorm", 1e-6, torch.bfloat16
        torch.library.opcheck(_library._adaln.overload, (x, shift, scale, *options))
        torch.library.opcheck(_library._gated_residual_adaln.overload, (x, y, gate, shift.bfloat16(), scale, *options))
        saved = [None if one is None else one.detach() for one in (x, x, y, gate, scale)]
        backward = *saved, None if with_weight is None else weight.detach(), "layernorm", 1e-6, torch.bfloat16
        torch.library.opcheck(_library._gated_residual_adaln_backward.overload, (x.detach(), *backward))
        torch.library.opcheck(
            _library._adaln_backward.overload, (x.detach(), x.detach(), scale.detach(), *backward[5:])
        )
    torch.library.opcheck(_library._gated_residual.overload, (x, y.bfloat16(), gate))
    torch.library.opcheck(_library._gated_residual_backward.overload, (x.detach(), y.detach().half(), gate.detach()))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(compiler):
    inputs = make(2, 5, 12)
    compiled = torch.compile(both, backend=compiler, fullgraph=True)
    for name, value in grads_of(compiled, inputs).items():
        assert torch.equal(value, grads_of(both, inputs)[name]), name


def test_checkpointing_changes_nothing():
    inputs = make(2, 5, 12)

    def again(**leaves):
        return checkpoint(both, *leaves.values(), use_reentrant=False)

    expected = grads_of(both, inputs)
    for name, value in grads_of(again, inputs).items():
        assert torch.equal(value, expected[name]), name


def test_no_second_derivative():
    x, _, _, shift, scale, _ = (one.requires_grad_() for one in make(1, 3, 4).values())
    (grad,) = torch.autograd.grad(ops.adaln(x, shift, scale, backend="triton").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(grad.sum(), x)


def test_what_the_kernels_refuse():
    x, vector = torch.randn(1, 2, 4100), torch.randn(1, 4100)
    with pytest.raises(NotImplementedError, match="up to 4096 channels, not 4100"):
        ops.adaln(x, vector, vector, backend="triton")
    with pytest.raises(NotImplementedError, match="the kernels give .* not torch.float64"):
        ops.adaln(x[..., :4], vector[:, :4], vector[:, :4], dtype=torch.float64, backend="triton")
    with pytest.raises(NotImplementedError, match="not torch.float64"):
        ops.gated_residual(x[..., :4].double(), x[..., :4], vector[:, :4], backend="triton")


def test_no_samples():
    for sizes in ((0, 5, 6), (2, 0, 6)):
        inputs = make(*sizes)
        for name, value in grads_of(both, inputs).items():
            expected = inputs[name].shape if name in inputs else sizes
            assert value.shape == expected and not value.any(), name
