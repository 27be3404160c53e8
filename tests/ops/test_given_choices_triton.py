"""`routing_from_topk` and `token_choice_drop` by the kernels: what the definitions give, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("hypothesis", reason="property tests need hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmoe_kernels import MoE, Routing, ops
from diffmoe_kernels.testing import assert_close, poisoned_allocations
from diffmoe_kernels.triton_support import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
FIELDS = ("token_indices", "gates", "group_offsets", "token_offsets", "token_rows")


def choices(num_tokens: int, num_experts: int, top_k: int, dropped: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts of each token, int64, and weights; a share of the slots has ids of no expert."""
    scores = torch.rand(num_tokens, num_experts)
    weights, ids = scores.topk(top_k) if num_tokens else (torch.zeros(0, top_k), torch.zeros(0, top_k).long())
    outside = torch.tensor([-1, num_experts, -300, 2**40])[torch.randint(4, ids.shape)]
    return ids.where(torch.rand(ids.shape) >= dropped, outside), weights


def same_routing(ids: torch.Tensor, weights: torch.Tensor, num_experts: int) -> None:
    """Every field, and the gradient by the weights."""
    results = []
    for backend in ("triton", "reference"):
        leaf = weights.clone().requires_grad_()
        with poisoned_allocations():
            routing = ops.routing_from_topk(ids, leaf, num_experts, backend=backend)
            generator = torch.Generator().manual_seed(0)
            grad = torch.randn(routing.gates.shape, generator=generator, dtype=routing.gates.dtype)
            (by_weights,) = torch.autograd.grad(routing.gates, leaf, grad)
        results.append({**{name: getattr(routing, name) for name in FIELDS}, "grad": by_weights})
    for name, ours in results[0].items():
        assert ours.dtype == results[1][name].dtype and torch.equal(ours, results[1][name]), name


@pytest.mark.parametrize("dropped", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "sizes", [(0, 3, 2), (1, 1, 1), (1, 5, 3), (33, 1, 1), (70, 48, 5), (300, 6, 2), (37, 256, 8), (40, 20, 16)]
)
def test_routing(sizes, dropped):
    ids, weights = choices(*sizes, dropped)
    same_routing(ids, weights, sizes[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("id_dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_dtypes_of_choices(id_dtype, dtype):
    ids, weights = choices(50, 7, 3, 0.2)
    same_routing(ids.to(id_dtype), weights.to(dtype), 7)


def test_one_hot_expert_and_experts_without_tokens():
    for expert in (0, 4, 8):
        same_routing(torch.full((200, 1), expert), torch.rand(200, 1), 9)


def test_a_token_may_name_an_expert_twice():
    same_routing(torch.tensor([[2, 2, 0], [1, 1, 1], [0, -1, 0]]), torch.rand(3, 3), 3)


def test_strided_choices():
    ids, weights = choices(20, 6, 4)
    same_routing(ids.T.contiguous().T, weights.T.contiguous().T, 6)
    same_routing(ids[::2, :2], weights[::2, :2], 6)


def same_drop(ids: torch.Tensor, scores: torch.Tensor, num_experts: int, capacity: int) -> None:
    with poisoned_allocations():
        ours = ops.token_choice_drop(ids, scores, num_experts, capacity, backend="triton")
    right = ops.token_choice_drop(ids, scores, num_experts, capacity, backend="reference")
    for one, other in zip(ours, right, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("capacity", [0, 1, 3, 12, 1000])
@pytest.mark.parametrize("sizes", [(0, 3, 2), (1, 1, 1), (33, 1, 1), (70, 48, 5), (300, 6, 2), (37, 256, 8)])
def test_drop(sizes, capacity):
    ids, weights = choices(*sizes, 0.1)
    same_drop(ids, weights, sizes[1], capacity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("id_dtype", [torch.int8, torch.int32])
def test_ties_go_to_the_lower_token(id_dtype, dtype):
    ids, weights = choices(120, 4, 2)
    same_drop(ids.to(id_dtype), (weights * 4).round().to(dtype), 4, 17)
    same_drop(ids.to(id_dtype), torch.ones_like(weights, dtype=dtype), 4, 17)


def test_scores_of_every_kind():
    ids, weights = choices(90, 3, 1)
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-42, -3.5, 3e38])
    scores = odd[torch.randint(8, (90, 1))]
    for capacity in (1, 8, 20):
        same_drop(ids, scores, 3, capacity)


def test_an_expert_with_more_choices_than_a_step_of_the_kernel():
    ids = torch.zeros(9000, 1, dtype=torch.int64)
    same_drop(ids, torch.rand(9000, 1), 2, 100)
    same_drop(ids, torch.rand(9000, 1).mul(50).round(), 2, 8500)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_choices(data):
    num_experts, top_k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    rows = st.lists(st.integers(-1, num_experts - 1), min_size=top_k, max_size=top_k)
    ids = torch.tensor(data.draw(st.lists(rows, min_size=1, max_size=40)))
    scores = torch.tensor(
        data.draw(st.lists(st.integers(0, 3), min_size=ids.numel(), max_size=ids.numel())), dtype=torch.float32
    ).view(ids.shape)
    same_routing(ids, scores, num_experts)
    same_drop(ids, scores, num_experts, data.draw(st.integers(0, 12)))


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def test_opcheck():
    ids, weights = choices(21, 4, 2)  # no slot is dropped: nothing is left unwritten
    for_choices = pytest.importorskip("diffmoe_kernels.ops.router_topk._from_topk_library")
    for_drops = pytest.importorskip("diffmoe_kernels.ops.token_drop._library")
    torch.library.opcheck(
        for_choices._routing_from_topk.overload, (weights.requires_grad_(), ids, 4), test_utils=CHECKS
    )
    torch.library.opcheck(
        for_drops._token_choice_drop.overload, (ids, weights.detach(), 4, 5, "triton"), test_utils=CHECKS
    )


def layer_of() -> MoE:
    torch.manual_seed(0)
    return MoE(16, 8, 4, 2, capacity_factor=0.75, backend="triton")


def results(function, layer: MoE) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(3, 7, 16, requires_grad=True)
    y, aux = function(x)
    return [y, aux.num_dropped, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_layer_with_capacity_compiles_to_one_graph(backend):
    layer = layer_of()
    eager = results(lambda x: layer(x, return_aux=True), layer)
    compiled = torch.compile(lambda x: layer(x, return_aux=True), fullgraph=True, backend=backend)
    for one, other in zip(results(compiled, layer), eager, strict=True):
        assert_close(one, other, tolerance=1e-5)
    assert eager[1] > 0


def test_a_layer_with_capacity_is_the_reference_and_recomputes_the_same():
    layer = layer_of()
    plain = results(lambda x: layer(x, return_aux=True), layer)
    again = results(lambda x: checkpoint(lambda x: layer(x, return_aux=True), x, use_reentrant=False), layer)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    reference = MoE(16, 8, 4, 2, capacity_factor=0.75, backend="reference")
    reference.load_state_dict(layer.state_dict())
    for one, other in zip(plain, results(lambda x: reference(x, return_aux=True), reference), strict=True):
        assert_close(one, other, tolerance=1e-5)


def routed(name: str, scores: torch.Tensor) -> torch.Tensor:
    """A number that depends on everything differentiable that an op returns."""
    how = {"backend": "triton"}
    if name == "router_topk":
        choice = ops.router_topk(scores, 2, **how)
        return choice.topk_weights.square().sum() + choice.routing.gates.sum() + choice.router_scores.square().sum()
    if name == "token_drop":
        return ops.token_drop(scores, 5, **how).gates.square().sum()
    if name == "token_drop_predicted":
        routing, dropped = ops.token_drop_predicted(scores, scores, torch.full((4,), 0.6), max_capacity=6, **how)
        return routing.gates.square().sum() + dropped
    return ops.capacity_loss(scores, ops.token_drop(scores, 5, **how), **how)


@pytest.mark.parametrize("name", ["router_topk", "token_drop", "token_drop_predicted", "capacity_loss"])
def test_routing_ops_compile_by_inductor(name):
    scores = torch.randn(20, 4, requires_grad=True)
    outcomes = []
    for function in (routed, torch.compile(routed, fullgraph=True)):
        y = function(name, scores)
        outcomes.append((y, *torch.autograd.grad(y, scores)))
    for one, other in zip(*outcomes, strict=True):
        assert_close(one, other, tolerance=1e-6)


def test_experts_of_one_routing_or_the_other_agree():
    """A record of given choices serves `experts` as the one of `Routing.from_topk` does."""
    ids, weights = choices(30, 5, 2, 0.2)
    x, up, down = torch.randn(30, 8), torch.randn(5, 16, 8), torch.randn(5, 8, 8)
    ours = ops.experts(x, ops.routing_from_topk(ids, weights, 5, backend="triton"), up, down)
    assert torch.equal(ours, ops.experts(x, Routing.from_topk(ids, weights, 5), up, down))
