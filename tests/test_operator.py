"""Operators that register with the dispatcher themselves do what `torch.library.custom_op` would."""

import warnings

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffmoe_kernels.operator import OVERLOAD, operator, register_autograd
from diffmoe_kernels.version import __version__


@operator("test_scale")
def scale(x: Tensor, factor: float) -> Tensor:
    return x * factor


@torch.library.register_fake(scale)
def _(x, factor):
    return torch.empty_like(x)


@operator("test_scale_backward")
def scale_backward(grad: Tensor, factor: float) -> Tensor:
    return grad * factor


@torch.library.register_fake(scale_backward)
def _(grad, factor):
    return torch.empty_like(grad)


def save(ctx, inputs, output):
    ctx.factor = inputs[1]


register_autograd(scale, lambda ctx, grad: (scale_backward(grad, ctx.factor), None), setup_context=save)


def test_it_is_an_operator_like_any_other():
    x = torch.randn(3, 4, requires_grad=True)
    torch.library.opcheck(scale, (x, 2.0))
    torch.library.opcheck(scale_backward, (x.detach(), 2.0))
    y = torch.compile(lambda x: scale(x, 2.0).sin(), fullgraph=True, backend="aot_eager")(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, 2 * (2 * x).cos())


def test_gradients_where_they_are_asked_for():
    x = torch.randn(3, requires_grad=True)
    assert scale(x, 2.0).requires_grad and not scale(x.detach(), 2.0).requires_grad
    with torch.no_grad():
        assert not scale(x, 2.0).requires_grad
    with torch.inference_mode():
        assert scale(x, 2.0).is_inference()


def test_a_second_gradient_is_refused():
    x = torch.randn(3, requires_grad=True)
    grad = scale_backward(x, 2.0)
    with pytest.raises(RuntimeError, match="test_scale_backward.*no autograd formula was registered"):
        grad.sum().backward()


def test_versions_share_no_compiled_graph():
    """A forward graph names its operators; those of a release are not those of the next one."""
    assert OVERLOAD.removeprefix("v") == __version__.replace(".", "_")
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph

    torch.compile(lambda x: scale(x, 2.0), backend=keep)(torch.ones(3))
    assert f"test_scale.{OVERLOAD}" in graphs[0]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_a_broken_graph_is_not_traced_on_inside_a_launcher(mode):
    @torch._dynamo.disable(recursive=False)
    def broken(x):  # what it calls may still be traced
        return scale(x, 2.0)

    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph

    with mode(), warnings.catch_warnings():
        warnings.filterwarnings("error", "Dynamo (does not know|detected)")  # what it tried to trace
        torch.compile(lambda x: broken(x + 1) - 1, backend=keep)(torch.ones(3, requires_grad=mode is torch.enable_grad))
    assert len(graphs) == 2, "the sum and the difference"


def test_forward_mode_is_refused():
    """The tangent would be lost below autograd."""
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.jvp(lambda x: scale(x, 2.0), (torch.ones(3),), (torch.ones(3),))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward mode AD"):
        scale(forward_ad.make_dual(torch.ones(3), torch.ones(3)), 2.0)


def twice(x: Tensor) -> Tensor:
    return 2 * x


def thrice(x: Tensor) -> Tensor:
    return 3 * x


def test_operators_may_be_defined_again():
    """As by a notebook that reloads modules."""
    for function in (twice, thrice):
        assert torch.equal(operator("test_again")(function)(torch.ones(1)), function(torch.ones(1)))


def with_default(x: Tensor, factor: float = 2.0) -> Tensor:
    return x * factor


def with_list(x: Tensor, others: list[Tensor]) -> Tensor:
    return x + sum(others)


def with_keyword(x: Tensor, *, factor: float) -> Tensor:
    return x * factor


def without_tensor(factor: float, x: Tensor) -> Tensor:
    return x * factor


def with_optional(x: Tensor | None, factor: float) -> Tensor:
    return x * factor


@pytest.mark.parametrize("function", [with_default, with_list, with_keyword, without_tensor, with_optional])
def test_arguments_that_gradients_would_miss_are_refused(function):
    with pytest.raises(TypeError, match="expected a tensor first, no defaults, no lists"):
        operator("test_refused")(function)
