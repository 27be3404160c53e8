"""Operators that register with the dispatcher themselves do what `torch.library.custom_op` would."""

import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffmoe_kernels.operator import OVERLOAD, operator
from diffmoe_kernels.version import __version__


@operator("test_scale")
def scale(x: Tensor, factor: float) -> Tensor:
    return x * factor


@scale.register_fake
def _(x, factor):
    return torch.empty_like(x)


@operator("test_scale_backward")
def scale_backward(grad: Tensor, factor: float) -> Tensor:
    return grad * factor


@scale_backward.register_fake
def _(grad, factor):
    return torch.empty_like(grad)


def save(ctx, inputs, output):
    ctx.factor = inputs[1]


scale.register_autograd(lambda ctx, grad: (scale_backward(grad, ctx.factor), None), setup_context=save)


def test_it_is_an_operator_like_any_other():
    x = torch.randn(3, 4, requires_grad=True)
    torch.library.opcheck(scale.overload, (x, 2.0))
    torch.library.opcheck(scale_backward.overload, (x.detach(), 2.0))
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


@operator("test_kept")
def kept(x: Tensor, other: Tensor) -> Tensor:
    RECEIVED.append(other)
    return x.clone()


@kept.register_fake
def _(x, other):
    return torch.empty_like(x)


RECEIVED: list[Tensor] = []


def forbidden(*args):
    raise AssertionError("the dispatcher was asked")


def test_eager_calls_go_past_the_dispatcher(monkeypatch):
    for one in (scale, scale_backward):
        monkeypatch.setattr(one, "overload", forbidden)
    x = torch.nn.Parameter(torch.randn(3))
    y = scale(x, 2.0)
    assert torch.equal(y, 2 * x) and y.grad_fn.name() == "test_scaleBackward"
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.full((3,), 2.0))
    with torch.inference_mode():
        assert torch.equal(scale(x, 2.0), 2 * x)


class SeesOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = func
        return func(*args, **(kwargs or {}))


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen = func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [SeesOperators, SeesFunctions])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_modes_see_it(mode, requires_grad):
    with mode() as seeing:
        scale(torch.ones(3, requires_grad=requires_grad), 2.0)
    assert seeing.seen is scale.overload


def test_subclasses_see_it():
    x = TwoTensor(torch.ones(3), torch.zeros(3))
    y = kept(torch.ones(3), x)
    assert isinstance(y, TwoTensor) and type(RECEIVED.pop()) is Tensor


@pytest.mark.parametrize("requires_grad", [False, True])
def test_profilers_see_it(requires_grad):
    with torch.profiler.profile() as profile:
        scale(torch.ones(3, requires_grad=requires_grad), 2.0)
    assert "diffmoe_kernels::test_scale" in {event.name for event in profile.events()}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_see_it():
    """vmap has no rule for it, and calls it for each."""
    RECEIVED.clear()
    torch.vmap(kept)(torch.ones(3, 2), torch.ones(3, 2))
    assert [tuple(one.shape) for one in RECEIVED] == [(2,)] * 3


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_tracers_see_it():
    assert "diffmoe_kernels::test_scale" in str(torch.jit.trace(lambda x: scale(x, 2.0), torch.ones(3)).graph)


def test_no_kernel_meets_what_is_not_in_memory():
    """Tensors without any, and those whose memory holds the negative."""
    RECEIVED.clear()
    nowhere = torch.empty(3, device="meta")
    assert kept(nowhere, nowhere).is_meta and not RECEIVED
    negative = torch.complex(torch.ones(3), torch.ones(3)).conj().imag
    assert negative.is_neg()
    kept(torch.empty(3), negative)
    kept(torch.empty(3), torch._efficientzerotensor((3,)))
    minus, zero = RECEIVED
    assert not minus.is_neg() and torch.equal(minus, -torch.ones(3))
    assert zero.data_ptr() and torch.equal(zero, torch.zeros(3))


@operator("test_number")
def number(x: Tensor, factor: float, label: str, other: Tensor | None) -> Tensor:
    assert type(factor) is float
    return x * factor


def test_arguments_are_converted_and_checked():
    x = torch.ones(3)
    for factor in (2.0, 2, torch.tensor(2.0)):
        for other in (None, x):
            assert torch.equal(number(x, factor, "a", other), 2 * x)
    assert torch.equal(number(x, 2.0, label="a", other=None), 2 * x)
    for wrong in ((x, 2.0, 3, None), (x, 2.0, "a"), (x, "b", "a", None)):
        with pytest.raises((RuntimeError, TypeError), match="test_number"):
            number(*wrong)
    with pytest.raises((RuntimeError, TypeError), match="test_number"):
        number(x, 2.0, "a", None, more=1)


class OnAGPU:
    is_cuda = True

    def get_device(self) -> int:
        return 1


def test_the_gpu_of_the_first_tensor_is_the_current_one(monkeypatch):
    """Triton launches on the current one, which need not be it."""
    current, found = [0], []

    @contextmanager
    def device_of(tensor):
        current.append(tensor.get_device())
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[-1], raising=False)
    monkeypatch.setattr(scale, "_function", lambda x, factor: found.append(current[-1]))
    scale._on_its_device(OnAGPU(), 2.0)
    assert found == [1] and current == [0]


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

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph

    with mode(), warnings.catch_warnings():
        warnings.filterwarnings("error", "Dynamo (does not know|detected)")  # what it tried to trace
        torch.compile(lambda x: broken(x + 1) - 1, backend=keep)(torch.ones(3, requires_grad=mode is torch.enable_grad))
    assert len(graphs) == 2, "the sum and the difference"


def test_a_compiler_that_looks_on_is_seen():
    """Also where it does not trace the call itself."""
    seen = []

    @torch._dynamo.disable(recursive=False)
    def broken(x):
        seen.append(scale._unobserved((x, 2.0)))
        return x

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Dynamo does not know")
        torch.compile(lambda x: broken(x + 1) - 1, backend="eager")(torch.ones(3))
    assert seen == [False] and scale._unobserved((torch.ones(3), 2.0))


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
