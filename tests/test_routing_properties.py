"""`Routing` against a construction by hand, over random sizes, drops and duplicates."""

import pytest
import torch

from diffmoe_kernels import Routing, ops

pytest.importorskip("hypothesis", reason="property tests need hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

moderate = settings(max_examples=80, deadline=None)


@st.composite
def token_choices(draw):
    """(T, K) expert ids with -1 for dropped slots; duplicates within a token included."""
    num_experts = draw(st.integers(1, 12))
    top_k = draw(st.integers(1, 4))
    lowest = draw(st.sampled_from([-1, 0]))
    unique = draw(st.booleans()) and top_k <= num_experts
    slots = st.lists(st.integers(lowest, num_experts - 1), min_size=top_k, max_size=top_k)
    if unique:
        slots = slots.filter(lambda ids: len({i for i in ids if i >= 0}) == sum(i >= 0 for i in ids))
    ids = draw(st.lists(slots, max_size=40))
    return torch.tensor(ids, dtype=torch.int64).view(-1, top_k), num_experts


@st.composite
def expert_choices(draw):
    """(E, C) ascending token ids, the number of tokens, and how many of the C each expert takes, or None for all."""
    num_tokens = draw(st.integers(1, 40))
    num_experts = draw(st.integers(1, 12))
    capacity = draw(st.integers(0, min(num_tokens, 6)))
    lists = [sorted(draw(st.permutations(range(num_tokens)))[:capacity]) for _ in range(num_experts)]
    counts = draw(st.none() | st.lists(st.integers(0, capacity), min_size=num_experts, max_size=num_experts))
    return torch.tensor(lists, dtype=torch.int64).view(num_experts, capacity), num_tokens, counts


def check_record(routing, rows, rows_of_token, num_experts):
    """``rows`` is the expected list of (expert, token, gate), ``rows_of_token`` that of the row numbers."""
    count = len(rows)
    ends = [sum(expert <= e for expert, _, _ in rows) for e in range(num_experts)]
    assert routing.group_offsets.tolist() == ends
    assert routing.token_indices.tolist() == [token for _, token, _ in rows] + [0] * (routing.num_rows - count)
    assert routing.gates.tolist() == [gate for _, _, gate in rows] + [0.0] * (routing.num_rows - count)
    assert routing.token_offsets.tolist() == [sum(map(len, rows_of_token[:t])) for t in range(len(rows_of_token) + 1)]
    assert routing.token_rows.tolist() == sum(rows_of_token, []) + [0] * (routing.num_rows - count)
    assert sorted(sum(rows_of_token, [])) == list(range(count))  # every kept row belongs to one token
    assert routing.row_experts.tolist() == [e for e, _, _ in rows] + [num_experts] * (routing.num_rows - count)
    assert routing.row_is_valid.tolist() == [row < count for row in range(routing.num_rows)]


@moderate
@given(token_choices())
def test_from_topk(choices):
    ids, num_experts = choices
    weights = torch.rand(ids.shape)
    slots = [(e, t, k) for t, row in enumerate(ids.tolist()) for k, e in enumerate(row) if e >= 0]
    ordered = sorted(slots)  # by expert, then token, then slot
    rows = [(e, t, weights[t, k].item()) for e, t, k in ordered]
    by_slot = sorted(range(len(ordered)), key=lambda row: ordered[row][2])
    rows_of_token = [[r for r in by_slot if ordered[r][1] == t] for t in range(ids.shape[0])]
    routing = Routing.from_topk(ids, weights, num_experts)
    assert routing.num_rows == ids.numel()
    check_record(routing, rows, rows_of_token, num_experts)


@moderate
@given(expert_choices())
def test_from_expert_choice(choices):
    tokens, num_tokens, counts = choices
    num_experts, capacity = tokens.shape
    gates = torch.rand(tokens.shape)
    taken = [capacity] * num_experts if counts is None else counts
    rows = [(e, int(tokens[e, c]), gates[e, c].item()) for e in range(num_experts) for c in range(taken[e])]
    rows_of_token = [[r for r, row in enumerate(rows) if row[1] == t] for t in range(num_tokens)]
    counts = None if counts is None else torch.tensor(counts)
    check_record(Routing.from_expert_choice(tokens, gates, num_tokens, counts), rows, rows_of_token, num_experts)


@moderate
@given(token_choices())
def test_unit_gates_return_each_token_times_its_kept_slots(choices):
    ids, num_experts = choices
    routing = Routing.from_topk(ids, torch.ones(ids.shape), num_experts)
    x = torch.randint(-9, 10, (ids.shape[0], 3)).float()  # integers: sums are exact
    kept = (ids >= 0).sum(1, keepdim=True)
    assert torch.equal(ops.unpermute(ops.permute(x, routing), routing), kept * x)


@moderate
@given(token_choices())
def test_gate_gradient_is_that_of_the_slot(choices):
    ids, num_experts = choices
    weights = torch.rand(ids.shape, requires_grad=True)
    routing = Routing.from_topk(ids, weights, num_experts)
    # A row's cotangent is the weight it carries: each kept slot gets its own back.
    (grad,) = torch.autograd.grad(routing.gates, weights, routing.gates.detach())
    assert torch.equal(grad, weights.detach().where(ids >= 0, 0))
