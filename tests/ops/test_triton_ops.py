"""What only the custom operators around the Triton kernels have: schemas, compilation, memory, determinism."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from diffmoe_kernels import ExpertChoiceMoE, MoE, Routing, ops
from diffmoe_kernels.operator import OVERLOAD
from diffmoe_kernels.testing import assert_close, random_topk
from diffmoe_kernels.triton_support import HAS_TRITON
from tests.ops.backends import KERNELS
from tests.ops.on_kernels import ON_KERNELS, experts

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
each_backend = pytest.mark.parametrize("backend", ["triton", ON_KERNELS])
NUM_TOKENS, NUM_EXPERTS, TOP_K, HIDDEN, INNER = 21, 4, 2, 16, 24


def routing_of(kind: str = "dropped", requires_grad: bool = True) -> Routing:
    ids, weights = random_topk(NUM_TOKENS, NUM_EXPERTS, TOP_K, kind=kind)
    return Routing.from_topk(ids, weights.float().requires_grad_(requires_grad), NUM_EXPERTS)


def parameters(dtype: torch.dtype = torch.float32, bias: bool = True) -> dict[str, torch.Tensor]:
    shapes = {"up_proj": (NUM_EXPERTS, 2 * INNER, HIDDEN), "down_proj": (NUM_EXPERTS, HIDDEN, INNER)}
    if bias:
        shapes |= {"up_bias": (NUM_EXPERTS, 2 * INNER), "down_bias": (NUM_EXPERTS, HIDDEN)}
    return {name: (torch.randn(shape, dtype=dtype) / 4).requires_grad_() for name, shape in shapes.items()}


def tokens(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(NUM_TOKENS, HIDDEN, dtype=dtype, requires_grad=True)


def maps(routing: Routing) -> tuple[torch.Tensor, ...]:
    return routing.token_indices, routing.group_offsets, routing.token_offsets, routing.token_rows


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def opcheck(name: str, arguments: tuple) -> None:
    torch.library.opcheck(getattr(getattr(torch.ops.diffmoe_kernels, name), OVERLOAD), arguments, test_utils=CHECKS)


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck_of_movement(backend):
    # All rows are valid: what a kernel leaves unwritten differs from run to run.
    routing = routing_of("balanced", requires_grad=False)
    gates = routing.gates.clone().requires_grad_()
    rows = torch.randn(NUM_TOKENS * TOP_K, HIDDEN, requires_grad=True)
    token_indices, group_offsets, token_offsets, token_rows = maps(routing)
    opcheck("permute", (tokens(), *maps(routing), backend))
    opcheck("permute_backward", (rows.detach(), token_offsets, token_rows, backend))
    opcheck("unpermute", (rows, gates, *maps(routing), backend))
    known = tokens().detach(), rows.detach(), gates.detach(), token_indices, group_offsets
    opcheck("unpermute_backward", (*known, backend))


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("products", ["triton", "grouped_mm"])
def test_opcheck_of_experts(products, bias, master):
    routing = routing_of("balanced", requires_grad=False)
    weights = parameters(master, bias)
    masters = [weights.get(name) for name in ("up_proj", "down_proj", "up_bias", "down_bias")]
    cast = [None if one is None else one.detach().bfloat16() for one in masters]
    residual = torch.randn(NUM_TOKENS, HIDDEN, requires_grad=True)
    gates = routing.gates.clone().requires_grad_()
    arguments = (tokens(torch.bfloat16), gates, *masters, residual, *maps(routing), *cast, "swiglu", True, products)
    opcheck("experts", arguments)


def test_opcheck_of_grouped_gemm():
    offs = torch.tensor([5, 5, 21], dtype=torch.int32)
    w, bias = torch.randn(3, HIDDEN, INNER, requires_grad=True), torch.randn(3, INNER, requires_grad=True)
    opcheck("group_rows", (tokens(), w, offs, bias))
    opcheck("group_rows", (tokens(), w.detach().mT.contiguous().mT.requires_grad_(), offs, None))
    opcheck("group_outer", (tokens(), torch.randn(NUM_TOKENS, INNER, requires_grad=True), offs))


LAYERS = {
    "token choice": lambda: MoE(HIDDEN, INNER, NUM_EXPERTS, TOP_K, backend="triton", shared_intermediate_size=INNER),
    "expert choice": lambda: ExpertChoiceMoE(HIDDEN, INNER, NUM_EXPERTS, backend="triton"),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_layers_compile_to_one_graph(layer):
    layer = layer()
    x = torch.randn(3, 7, HIDDEN, requires_grad=True)
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        layer.zero_grad()
        x.grad = None
        y = function(x)
        y.square().sum().backward()
        results.append({"y": y, "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}})
    for name, expected in results[0].items():
        if expected is not None:
            assert_close(results[1][name], expected, tolerance=1e-5, name=name)


def run(backend: str, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    torch.manual_seed(0)
    routing, x, weights = routing_of(), tokens(dtype), parameters()
    y = experts(x, routing, **weights, backend=backend)
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, *weights.values()])]


@each_backend
def test_two_runs_have_the_same_bits(backend):
    assert all(torch.equal(one, other) for one, other in zip(run(backend), run(backend), strict=True))


@each_backend
@pytest.mark.parametrize("kind", ["bfloat16 weights", "float32 masters"])
def test_what_is_kept_for_the_backward(kind, backend):
    """The input, the pre-activation and the routing; of float32 masters their copies in the input's dtype."""
    dtype = torch.bfloat16 if kind == "bfloat16 weights" else torch.float32
    routing, x, weights = routing_of("balanced"), tokens(torch.bfloat16), parameters(dtype, bias=False)
    kept: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        experts(x, routing, **weights, backend=backend)
    own = {t.data_ptr() for t in (x, routing.gates, *maps(routing), *weights.values())}
    rows = NUM_TOKENS * TOP_K
    shapes = [(tuple(t.shape), t.dtype) for pointer, t in kept.items() if pointer not in own]
    expected = [((rows, 2 * INNER), torch.bfloat16)]
    if kind == "float32 masters":
        expected += [(tuple(weight.shape), torch.bfloat16) for weight in weights.values()]
    assert sorted(shapes, key=str) == sorted(expected, key=str)


@each_backend
def test_nothing_is_kept_where_nothing_needs_a_gradient(monkeypatch, backend):
    library = pytest.importorskip("diffmoe_kernels.ops.experts._library")
    kept = []
    products = {"triton": "triton", ON_KERNELS: "grouped_mm"}[backend]
    forward, backward = library.PRODUCTS[products]

    def spy(*args, **options):
        rows, pre = forward(*args, **options)
        kept.append(pre.shape[0])
        return rows, pre

    monkeypatch.setitem(library.PRODUCTS, products, (spy, backward))
    routing, x, weights = routing_of(), tokens(), parameters()
    experts(x, routing, **weights, backend=backend)
    with torch.no_grad():
        experts(x, routing, **weights, backend=backend)
    frozen = {name: weight.detach() for name, weight in weights.items()}
    experts(x.detach(), routing_of(requires_grad=False), **frozen, backend=backend)
    assert kept == [NUM_TOKENS * TOP_K, 0, 0]


@each_backend
def test_gradients_asked_for_one_by_one(backend):
    routing, x, weights = routing_of(), tokens(), parameters()
    y = experts(x, routing, **weights, backend=backend)
    inputs = {"x": x, **weights}
    together = dict(zip(inputs, torch.autograd.grad(y.sum(), list(inputs.values()), retain_graph=True), strict=True))
    for name in inputs:
        frozen = {key: value if key == name else value.detach() for key, value in inputs.items()}
        y = experts(frozen.pop("x"), routing, **frozen, backend=backend)
        assert torch.equal(torch.autograd.grad(y.sum(), inputs[name])[0], together[name]), name


@each_backend
def test_recomputed_forward_gives_the_same(backend):
    routing, weights = routing_of(), parameters()
    results = []
    for wrap in (lambda function, x: function(x), lambda function, x: checkpoint(function, x, use_reentrant=False)):
        torch.manual_seed(1)
        x = tokens()
        y = wrap(lambda x: experts(x, routing, **weights, backend=backend), x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *weights.values()], retain_graph=True)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@each_backend
def test_a_second_derivative_is_refused(backend):
    routing, x, weights = routing_of(), tokens(), parameters()
    y = experts(x, routing, **weights, backend=backend)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered|does not require grad"):
        torch.autograd.grad(grad.sum(), x)
    (grad,) = torch.autograd.grad(
        experts(x.detach(), routing, **weights, backend=backend).sum(), weights["up_proj"], create_graph=True
    )
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(grad.square().sum() + weights["up_proj"].sum(), weights["up_proj"])


@each_backend
@pytest.mark.parametrize("name", ["up_proj", "down_proj", "up_bias", "down_bias"])
def test_a_second_derivative_by_one_weight_alone_is_refused(backend, name):
    """As where all others are frozen."""
    routing, weights = routing_of(requires_grad=False), parameters()
    trained = {key: value if key == name else value.detach() for key, value in weights.items()}
    y = experts(tokens().detach(), routing, **trained, backend=backend)
    (grad,) = torch.autograd.grad(y.sum(), weights[name], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(grad.square().sum() + weights[name].square().sum(), weights[name])


@each_backend
@pytest.mark.parametrize("create_graph", [False, True])
def test_masters_that_change_before_the_backward_are_those_of_the_forward(backend, create_graph):
    routing, weights = routing_of(requires_grad=False), parameters()
    x = tokens().detach().bfloat16().requires_grad_()
    found = []
    for factor in (1, 3):
        changed = {name: value.detach().clone() for name, value in weights.items()}
        y = experts(x, routing, **changed, backend=backend)
        changed["down_proj"].mul_(factor)
        found.append(torch.autograd.grad(y.float().sum(), x, create_graph=create_graph)[0])
    assert torch.equal(*found)


@each_backend
def test_rows_past_the_last_group_are_never_read(backend):
    """Expert choice at inference has a bound of rows; past the count the record is 0 and the memory poison."""
    tokens_of = torch.tensor([[0, 3, 0], [1, 0, 0], [0, 0, 0]])
    gates = torch.full((3, 3), 0.5)
    routing = Routing.from_expert_choice(tokens_of, gates, 5, torch.tensor([2, 1, 0]))
    assert routing.num_rows == 9 and routing.group_offsets.tolist() == [2, 3, 3]
    x = torch.randn(5, HIDDEN)
    weights = {name: value[:3].detach() for name, value in parameters().items()}
    expected = experts(x, routing, **weights, backend="reference")
    assert_close(experts(x, routing, **weights, backend=backend), expected, tolerance=1e-6)
    assert not expected[[2, 4]].any()


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="asserts are compiled in with TRITON_DEBUG=1 only"
)
@pytest.mark.parametrize(
    ("offsets", "message"),
    [([5, 3, 21], "group_offsets must ascend"), ([5, 9, 22], "must not pass the number of rows")],
)
@pytest.mark.parametrize("form", ["rows", "outer"])
def test_wrong_offsets_are_told_in_debug_mode(form, offsets, message):
    offs = torch.tensor(offsets, dtype=torch.int32)
    x, w = torch.randn(NUM_TOKENS, HIDDEN), torch.randn(3, HIDDEN, INNER)
    with pytest.raises(Exception, match=message):
        if form == "rows":
            ops.grouped_gemm(x, w, offs, backend="triton")
        else:
            ops.grouped_gemm(x.mT, x, offs, backend="triton")


def with_gaps(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, each beside another that does not belong to them."""
    return torch.stack([tensor, tensor.flip(0)], 1)[:, 0]


@pytest.mark.parametrize("field", ["token_indices", "gates", "group_offsets", "token_offsets", "token_rows", "wide"])
def test_records_that_others_made(field):
    """Index arrays and gates with strides, or of the wider dtypes that plain PyTorch yields."""
    torch.manual_seed(0)
    routing, x, weights = routing_of(requires_grad=False), tokens(), parameters()
    if field == "wide":
        other = Routing(*(one.double() if one.is_floating_point() else one.long() for one in leaves_of(routing)))
    else:
        other = dataclasses.replace(routing, **{field: with_gaps(getattr(routing, field))})
    for backend in ("triton", ON_KERNELS):
        outcomes = []
        for record in (other, routing):
            gates = record.gates.detach().requires_grad_()
            y = experts(x, dataclasses.replace(record, gates=gates), **weights, backend=backend)
            outcomes.append([y, *torch.autograd.grad(y.square().sum(), [x, gates, *weights.values()])])
        for one, expected in zip(*outcomes, strict=True):
            assert torch.equal(one.to(expected.dtype), expected)
    rows = ops.permute(x, routing, backend="reference")
    assert torch.equal(ops.unpermute(rows, other, backend="triton"), ops.unpermute(rows, routing, backend="triton"))
    count = routing.group_offsets[-1]
    assert torch.equal(ops.permute(x, other, backend="triton")[:count], rows[:count])


def leaves_of(routing: Routing) -> list[torch.Tensor]:
    return [getattr(routing, field.name) for field in dataclasses.fields(routing)]


def test_a_float64_residual_is_refused():
    residual = torch.randn(NUM_TOKENS, HIDDEN, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="the residual is torch.float64"):
        ops.experts(tokens(), routing_of(), **parameters(), residual=residual, backend="triton")


@pytest.mark.parametrize("backend", ["triton", ON_KERNELS])
def test_masters_of_several_dtypes_get_gradients_of_their_own(backend):
    """A float32 gradient past float16's largest, 65,504, beside a float16 one."""
    x, routing, leaves = tokens(torch.bfloat16), routing_of(), parameters(torch.float32, True)
    kinds = {
        "up_proj": torch.float16,
        "down_proj": torch.float32,
        "up_bias": torch.bfloat16,
        "down_bias": torch.float32,
    }
    leaves = {name: one.detach().to(kinds[name]).requires_grad_() for name, one in leaves.items()}
    grads = {}
    for one in (backend, "reference"):
        y = experts(x, routing, **leaves, backend=one)
        grads[one] = torch.autograd.grad(y, list(leaves.values()), torch.full_like(y, 1e5))
    for name, ours, expected in zip(leaves, grads[backend], grads["reference"], strict=True):
        assert ours.dtype == kinds[name]
        if name.startswith("down"):
            assert expected.abs().max() > 65504
            assert_close(ours, expected, tolerance=0.02, name=name)


@pytest.mark.parametrize("bias", [False, True])
def test_grouped_mm_is_given_weights_that_begin_at_whole_16_bytes(bias, monkeypatch):
    """On CUDA it raises otherwise; a flat parameter may have them anywhere."""
    products = pytest.importorskip("diffmoe_kernels.ops.experts._grouped_mm")
    multiply, given = products.F.grouped_mm, []

    def recorded(x, w, **options):
        given.extend((x.data_ptr() % 16, w.data_ptr() % 16))
        return multiply(x, w, **options)

    monkeypatch.setattr(products.F, "grouped_mm", recorded)
    x, routing, results = tokens(torch.bfloat16), routing_of(), []
    for shift in (0, 1):
        torch.manual_seed(0)
        leaves = {}
        for name, one in parameters(torch.bfloat16, bias).items():
            flat = torch.empty(one.numel() + shift, dtype=one.dtype)[shift:]
            leaves[name] = flat.copy_(one.detach().flatten()).view(one.shape).requires_grad_()
        y = experts(x, routing, **leaves, backend=ON_KERNELS)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))])
    assert given and not any(given)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("products", ["triton", "grouped_mm"])
def test_products_are_given_weights_from_16_bytes_on(products, monkeypatch):
    """Views into one flat parameter may begin elsewhere, where grouped_mm raises and a tile's loads are of 2 bytes."""
    from diffmoe_kernels.ops.experts import _library

    given = []

    def noted(function):
        def call(*args, **options):
            given.extend(one.data_ptr() % 16 for one in args if isinstance(one, torch.Tensor) and one.dim() == 3)
            return function(*args, **options)

        return call

    monkeypatch.setitem(_library.PRODUCTS, products, tuple(map(noted, _library.PRODUCTS[products])))
    backend = "triton" if products == "triton" else ON_KERNELS
    weights = parameters(torch.bfloat16, bias=False)
    flat = {name: torch.empty(one.numel() + 1, dtype=one.dtype)[1:].view(one.shape) for name, one in weights.items()}
    for name, one in weights.items():
        flat[name].copy_(one.detach())
        assert flat[name].data_ptr() % 16
        flat[name].requires_grad_()
    x, routing = tokens(torch.bfloat16), routing_of(requires_grad=False)
    y = experts(x, routing, **flat, backend=backend)
    assert torch.equal(y, experts(x, routing, **weights, backend=backend))
    y.sum().backward()
    assert len(given) == 6 and not any(given)
