"""`Routing`: examples, gradients, container behaviour and errors. Properties are in test_routing_properties.py."""

import copy
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

from diffmoe_kernels import Routing, ops
from diffmoe_kernels.testing import random_topk
from diffmoe_kernels.triton_support import HAS_TRITON

FIELDS = ("token_indices", "gates", "group_offsets", "token_offsets", "token_rows")


def make(kind="dropped", num_tokens=9, num_experts=4, top_k=2):
    ids, weights = random_topk(num_tokens, num_experts, top_k, kind=kind)
    return Routing.from_topk(ids, weights.float(), num_experts)


def test_from_topk_example():
    """Token 0 at experts 2, 0; token 1 at expert 2 alone; token 2 at experts 0, 1."""
    weights = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    routing = Routing.from_topk(torch.tensor([[2, 0], [2, -1], [0, 1]]), weights, 4)
    assert routing.token_indices.tolist() == [0, 2, 2, 0, 1, 0]
    assert routing.gates.tolist() == weights.flatten()[[1, 4, 5, 0, 2]].tolist() + [0.0]
    assert routing.group_offsets.tolist() == [2, 3, 5, 5]
    assert routing.token_offsets.tolist() == [0, 2, 3, 5]
    assert routing.token_rows.tolist() == [3, 0, 4, 1, 2, 0]
    assert (routing.num_tokens, routing.num_experts, routing.num_rows) == (3, 4, 6)
    assert routing.group_sizes.tolist() == [2, 1, 2, 0]
    assert routing.row_is_valid.tolist() == [True] * 5 + [False]
    assert routing.row_experts.tolist() == [0, 0, 1, 2, 2, 4]


def test_from_expert_choice_example():
    """Expert 0 takes tokens 1, 3; expert 1 takes token 1 of two places; token 0 and 2 go nowhere."""
    gates = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    routing = Routing.from_expert_choice(torch.tensor([[1, 3], [1, 2]]), gates, 4, torch.tensor([2, 1]))
    assert routing.token_indices.tolist() == [1, 3, 1, 0]
    assert routing.gates.tolist() == gates.flatten()[:3].tolist() + [0.0]
    assert routing.group_offsets.tolist() == [2, 3]
    assert routing.token_offsets.tolist() == [0, 0, 2, 2, 3]
    assert routing.token_rows.tolist() == [0, 2, 1, 0]


@pytest.mark.parametrize("integer", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_dtypes(integer):
    ids = torch.tensor([[1, 0], [0, 2]], dtype=integer)
    for routing in (
        Routing.from_topk(ids, torch.ones(2, 2, dtype=torch.bfloat16), 3),
        Routing.from_expert_choice(ids, torch.ones(2, 2, dtype=torch.float16), 3, torch.ones(2, dtype=integer)),
    ):
        dtypes = {name: getattr(routing, name).dtype for name in FIELDS}
        assert dtypes == {name: torch.float32 if name == "gates" else torch.int32 for name in FIELDS}
    assert Routing.from_topk(ids, torch.ones(2, 2, dtype=torch.float64), 3).gates.dtype == torch.float64


def test_gate_gradient_returns_to_its_slot_and_is_zero_for_dropped_slots():
    ids, weights = random_topk(20, 5, 3, kind="dropped")
    weights.requires_grad_()
    routing = Routing.from_topk(ids, weights, 5)
    cotangent = torch.randn(60, dtype=torch.float64)
    (grad,) = torch.autograd.grad(routing.gates, weights, cotangent)
    expected = torch.zeros(20, 3, dtype=torch.float64)
    experts = routing.row_experts.tolist()
    for row in range(int(routing.group_offsets[-1])):
        token = int(routing.token_indices[row])
        slot = ids[token].tolist().index(experts[row])
        expected[token, slot] = cotangent[row]
    assert torch.equal(grad, expected)


def test_gate_gradient_of_expert_choice_is_zero_past_the_count():
    gates = torch.rand(2, 3, requires_grad=True)
    routing = Routing.from_expert_choice(torch.tensor([[0, 2, 3], [1, 3, 0]]), gates, 4, torch.tensor([1, 2]))
    routing.gates.backward(torch.tensor([1.0, 2.0, 3.0, torch.nan, torch.nan, torch.nan]))
    assert gates.grad.tolist() == [[1, 0, 0], [2, 3, 0]]


@pytest.mark.parametrize("num_tokens, top_k", [(0, 2), (3, 0), (0, 0)])
def test_no_rows(num_tokens, top_k):
    routing = Routing.from_topk(torch.zeros(num_tokens, top_k, dtype=torch.int64), torch.zeros(num_tokens, top_k), 2)
    assert routing.group_offsets.tolist() == [0, 0]
    assert routing.token_offsets.tolist() == [0] * (num_tokens + 1)
    assert routing.num_rows == 0


def test_is_a_pytree_of_its_five_fields():
    routing = make()
    assert tuple(field.name for field in fields(Routing)) == FIELDS
    leaves, spec = _pytree.tree_flatten(routing)
    assert all(leaf is getattr(routing, name) for leaf, name in zip(leaves, FIELDS, strict=True))
    moved = _pytree.tree_map(lambda tensor: tensor.to("meta"), routing)
    assert isinstance(moved, Routing) and moved.gates.is_meta
    again = _pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, Routing) and again.token_rows is routing.token_rows


def test_is_frozen_and_copies():
    routing = make()
    with pytest.raises(FrozenInstanceError):
        routing.gates = torch.zeros(3)
    copied = copy.deepcopy(routing)
    for name in FIELDS:
        assert torch.equal(getattr(copied, name), getattr(routing, name))
        assert getattr(copied, name) is not getattr(routing, name)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_passes_through_activation_checkpointing(use_reentrant):
    ids, weights = random_topk(9, 4, 2, kind="dropped")
    x = torch.randn(9, 3, dtype=torch.float64)

    def gradients(run):
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        run(leaves[0], Routing.from_topk(ids, leaves[1], 4)).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    def there_and_back(x, routing):
        return ops.unpermute(ops.permute(x, routing).tanh(), routing)

    plain = gradients(there_and_back)
    again = gradients(lambda *args: checkpoint(there_and_back, *args, use_reentrant=use_reentrant))
    assert all(torch.equal(*pair) for pair in zip(plain, again, strict=True))


def test_constructors_compile_without_graph_breaks():
    ids, weights = random_topk(9, 4, 2, kind="dropped")
    compiled = torch.compile(Routing.from_topk, backend="aot_eager", fullgraph=True)(ids, weights, 4)
    eager = Routing.from_topk(ids, weights, 4)
    assert all(torch.equal(getattr(compiled, name), getattr(eager, name)) for name in FIELDS)


def test_constructors_work_on_the_meta_device():
    ids, weights = (tensor.to("meta") for tensor in random_topk(9, 4, 2))
    assert Routing.from_topk(ids, weights, 4).token_rows.shape == (18,)
    counts = torch.zeros(9, dtype=torch.int32, device="meta")
    assert Routing.from_expert_choice(ids, weights, 20, counts).token_offsets.shape == (21,)


IDS, WEIGHTS = torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2)


def test_ids_that_no_expert_has_are_dropped_slots():
    ids, weights = random_topk(20, 5, 3, kind="dropped")
    outside = torch.tensor([5, 1000, -7])[torch.randint(3, ids.shape)]
    other, expected = (Routing.from_topk(one, weights, 5) for one in (ids.where(ids >= 0, outside), ids))
    assert all(torch.equal(getattr(other, field.name), getattr(expected, field.name)) for field in fields(Routing))


@pytest.mark.parametrize(
    "error, message, build",
    [
        (TypeError, "topk_ids: expected an integer dtype, got torch.float32", (WEIGHTS, WEIGHTS, 3)),
        (TypeError, "topk_ids: expected an integer dtype, got torch.bool", (IDS.bool(), WEIGHTS, 3)),
        (TypeError, "topk_weights: expected a floating dtype, got torch.int64", (IDS, IDS, 3)),
        (ValueError, r"one shape \(T, K\), got \(4, 2\) and \(4, 1\)", (IDS, WEIGHTS[:, :1], 3)),
        (ValueError, r"one shape \(T, K\), got \(8,\) and \(8,\)", (IDS.flatten(), WEIGHTS.flatten(), 3)),
        (ValueError, "num_experts: expected at least 1, got 0", (IDS, WEIGHTS, 0)),
        (TypeError, "num_experts: expected an integer, got 3.0", (IDS, WEIGHTS, 3.0)),
    ],
)
def test_from_topk_rejects(error, message, build):
    with pytest.raises(error, match=message):
        Routing.from_topk(*build)


@pytest.mark.parametrize(
    "error, message, build",
    [
        (TypeError, "token_indices: expected an integer dtype, got torch.float32", (WEIGHTS, WEIGHTS, 3)),
        (TypeError, "gates: expected a floating dtype, got torch.int64", (IDS, IDS, 3)),
        (ValueError, r"one shape \(E, C\), got \(4, 2\) and \(4, 1\)", (IDS, WEIGHTS[:, :1], 3)),
        (ValueError, r"one shape \(E, C\), got \(8,\) and \(8,\)", (IDS.flatten(), WEIGHTS.flatten(), 3)),
        (ValueError, r"expert_counts: expected shape \(4,\), got \(2,\)", (IDS, WEIGHTS, 3, IDS[0])),
        (TypeError, "expert_counts: expected an integer dtype, got torch.float32", (IDS, WEIGHTS, 3, WEIGHTS[:, 0])),
        (TypeError, "expert_counts: expected a tensor, got list", (IDS, WEIGHTS, 3, [1, 2])),
        (TypeError, "num_tokens: expected an integer, got 3.0", (IDS, WEIGHTS, 3.0)),
        (ValueError, "num_tokens: expected at least 0, got -1", (IDS, WEIGHTS, -1)),
    ],
)
def test_from_expert_choice_rejects(error, message, build):
    with pytest.raises(error, match=message):
        Routing.from_expert_choice(*build)


@pytest.mark.parametrize(
    "error, message, changed",
    [
        (ValueError, r"routing.gates: expected shape \(8,\), got \(3,\)", {"gates": torch.ones(3)}),
        (ValueError, "token_indices on cpu, gates on meta", {"gates": torch.ones(8, device="meta")}),
        (ValueError, "token_indices on cpu, token_rows on meta", {"token_rows": torch.ones(8, device="meta").int()}),
        (ValueError, r"routing.token_rows: expected shape \(8,\), got \(3,\)", {"token_rows": torch.zeros(3).int()}),
        (ValueError, "routing.group_offsets: expected 1 dimension", {"group_offsets": torch.zeros(2, 2).int()}),
        (ValueError, "routing.token_offsets: expected T . 1 offsets", {"token_offsets": torch.zeros(0).int()}),
        (TypeError, "routing.token_indices: expected torch.int32, or int64", {"token_indices": torch.zeros(8)}),
        (TypeError, "token_rows: .*got torch.int16", {"token_rows": torch.zeros(8).short()}),
        (TypeError, "routing.gates: expected a floating dtype", {"gates": torch.zeros(8).int()}),
    ],
)
def test_a_record_whose_tensors_do_not_fit(error, message, changed):
    routing = replace(Routing.from_topk(IDS, WEIGHTS, 3), **changed)
    with pytest.raises(error, match=message):
        ops.permute(torch.zeros(4, 2), routing)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_more_rows_than_int32_counts_are_refused():
    """Before any kernel would write past its memory; the tensors here are views of one number."""
    from diffmoe_kernels.ops.router_topk import _from_topk_library, _library
    from diffmoe_kernels.ops.token_drop import _library as token_drop

    scores, ids = torch.zeros(1).expand(2**23, 256), torch.zeros(1, dtype=torch.int32).expand(2**23, 256)
    for function, *arguments in (
        (token_drop._token_drop._function, scores, 2**23, 1, "triton"),
        (token_drop._token_drop_predicted._function, scores, scores, scores[0], 2**23, False, "cuda"),
        (token_drop._token_choice_drop._function, ids, scores, 256, 1, "triton"),
        (_library._router_topk._function, scores, None, 256, False, 1, 1, 0.0, True, 1.0, "cuda"),
        (_from_topk_library._routing_from_topk._function, scores, ids, 256),
    ):
        with pytest.raises(ValueError, match="at most 2147467264 rows, its numbers being int32; got 2147483648"):
            function(*arguments)
