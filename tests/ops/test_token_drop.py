"""The `token_drop` ops against loops over experts and choices."""

import math

import pytest
import torch

from diffmoe_kernels import Routing, ops
from diffmoe_kernels.testing import assert_close, poisoned_allocations, random_topk, value_and_grads
from diffmoe_kernels.triton_support import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BACKENDS_AND_DTYPES = [
    *(("reference", dtype) for dtype in DTYPES),
    *(pytest.param("triton", dtype, marks=needs_triton) for dtype in DTYPES[1:]),
]
FIELDS = ("token_indices", "gates", "group_offsets", "token_offsets", "token_rows")


def best_tokens(scores, count):
    """Indices of the ``count`` largest, ties to the lower, ascending."""
    return sorted(sorted(range(len(scores)), key=lambda t: (-scores[t], t))[:count])


def rows_of(routing):
    """[(expert, token, gate)] of the rows within the true count."""
    count = int(routing.group_offsets[-1])
    return list(zip(routing.row_experts.tolist(), routing.token_indices.tolist(), routing.gates.tolist(), strict=True))[
        :count
    ]


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
@pytest.mark.parametrize(
    "num_tokens, num_experts, capacity, num_pools",
    [
        (12, 3, 4, 1),
        (12, 3, 2, 2),
        (12, 5, 1, 4),
        (12, 3, 12, 1),
        (12, 3, 0, 1),
        (1, 1, 1, 1),
        (7, 2, 3, 1),
        (6, 2, 1, 6),
    ],
)
def test_token_drop_takes_each_experts_best(num_tokens, num_experts, capacity, num_pools, backend, dtype):
    scores = torch.rand(num_tokens, num_experts).to(dtype)
    with poisoned_allocations():
        routing = ops.token_drop(scores, capacity, num_pools=num_pools, backend=backend)
    size = num_tokens // num_pools
    expected = [
        (e, p * size + t, scores[p * size + t, e].item())
        for e in range(num_experts)
        for p in range(num_pools)
        for t in best_tokens(scores[p * size : (p + 1) * size, e].tolist(), capacity)
    ]
    assert rows_of(routing) == expected
    assert routing.num_rows == len(expected) == num_experts * num_pools * capacity
    assert routing.num_tokens == num_tokens
    assert routing.gates.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_drop_per_sample_equals_calls_per_sample(backend):
    scores = torch.rand(3, 8, 4)
    together = rows_of(ops.token_drop(scores.flatten(0, 1), 3, num_pools=3, backend=backend))
    apart = [(e, t + 8 * s, g) for s in range(3) for e, t, g in rows_of(ops.token_drop(scores[s], 3, backend=backend))]
    assert together == sorted(apart)


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_drop_breaks_ties_by_token(backend):
    assert [token for _, token, _ in rows_of(ops.token_drop(torch.zeros(6, 2), 2, backend=backend))] == [0, 1, 0, 1]
    scores = torch.tensor([[0.0], [1.0], [0.5], [1.0], [0.5]])
    assert [token for _, token, _ in rows_of(ops.token_drop(scores, 3, backend=backend))] == [1, 2, 3]


@pytest.mark.parametrize("capacity, num_pools", [(4, 1), (2, 2), (0, 1), (12, 1)])
def test_token_drop_gradcheck(capacity, num_pools):
    scores = torch.stack([torch.randperm(12) for _ in range(3)], dim=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: ops.token_drop(s, capacity, num_pools=num_pools).gates, (scores,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_capacity", [None, 20, 9, 3, 0])
def test_predicted_capacity(max_capacity, backend):
    scores, logits = torch.rand(20, 5), torch.randn(20, 5)
    thresholds = torch.tensor([0.0, 0.3, 0.5, 0.8, 1.0])
    with poisoned_allocations():
        routing, num_dropped = ops.token_drop_predicted(
            scores, logits, thresholds, max_capacity=max_capacity, backend=backend
        )
    bound = 20 if max_capacity is None else max_capacity
    wanted = [
        sum(1 / (1 + math.exp(-x)) > thr for x in logits[:, e].tolist()) for e, thr in enumerate(thresholds.tolist())
    ]
    assert wanted[0] == 20 and wanted[4] == 0
    expected = [
        (e, t, scores[t, e].item()) for e in range(5) for t in best_tokens(scores[:, e].tolist(), min(wanted[e], bound))
    ]
    assert rows_of(routing) == expected
    assert routing.num_rows == 5 * bound
    assert num_dropped.item() == sum(max(count - bound, 0) for count in wanted) and num_dropped.dtype == torch.int64


@pytest.mark.parametrize("backend", BACKENDS)
def test_predicted_capacity_gradient_reaches_the_chosen_scores_alone(backend):
    scores = torch.rand(10, 3, requires_grad=True)
    logits = torch.randn(10, 3, requires_grad=True)
    routing, _ = ops.token_drop_predicted(scores, logits, torch.full((3,), 0.5), max_capacity=6, backend=backend)
    routing.gates.sum().backward()
    chosen = torch.zeros(10, 3)
    for expert, token, _ in rows_of(routing):
        chosen[token, expert] = 1
    assert torch.equal(scores.grad, chosen)
    assert logits.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_predicted_rows_past_the_count_leak_nowhere(backend):
    """With the bound, the experts compute what they compute without it, and no gradient comes from past the count."""
    scores, logits, x = torch.rand(10, 3), torch.randn(10, 3), torch.randn(10, 4)
    up, down = torch.randn(3, 8, 4), torch.randn(3, 4, 8)
    thresholds = torch.full((3,), 0.5)

    def bounded(scores, x, up, down):
        routing, _ = ops.token_drop_predicted(scores, logits, thresholds, backend=backend)
        return ops.experts(x, routing, up, down, activation="silu", backend="torch")

    def by_mask(scores, x, up, down):
        wanted = (logits.sigmoid() > thresholds).sum(0).tolist()
        outs = []
        for e in range(3):
            mask = torch.zeros(10, 1)
            mask[best_tokens(scores[:, e].tolist(), wanted[e])] = 1
            outs.append(mask * scores[:, e : e + 1] * (torch.nn.functional.silu(x @ up[e].t()) @ down[e].t()))
        return torch.stack(outs).sum(0)

    inputs = {"scores": scores, "x": x, "up": up, "down": down}
    with poisoned_allocations():
        ours = value_and_grads(bounded, **inputs)
    for name, expected in value_and_grads(by_mask, **inputs).items():
        assert_close(ours[name], expected, name=name)


def drop_loop(ids, scores, num_experts, capacity):
    """(ids with -1, count): each expert keeps its best choices, ties to the lower token."""
    kept = set()
    for expert in range(num_experts):
        choices = [(t, k) for t, row in enumerate(ids) for k, e in enumerate(row) if e == expert]
        kept |= set(sorted(choices, key=lambda choice: (-scores[choice[0]][choice[1]], choice))[:capacity])
    out = [[e if (t, k) in kept else -1 for k, e in enumerate(row)] for t, row in enumerate(ids)]
    return out, sum(e >= 0 for row in ids for e in row) - len(kept)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("kind", ["balanced", "skewed", "one_expert", "empty_experts", "dropped"])
@pytest.mark.parametrize("capacity", [0, 1, 4, 100])
def test_token_choice_drop(capacity, kind, ties):
    ids, weights = random_topk(17, 5, 2, kind=kind)
    weights = (weights * 3).round() if ties else weights
    expected, num_dropped = drop_loop(ids.tolist(), weights.tolist(), 5, capacity)
    for integer in (torch.int32, torch.int64):
        with poisoned_allocations():
            out, count = ops.token_choice_drop(ids.to(integer), weights, 5, capacity)
        assert out.tolist() == expected and out.dtype == integer
        assert count.item() == num_dropped and count.dtype == torch.int64
    assert (Routing.from_topk(out, weights, 5).group_sizes <= capacity).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    scores = torch.rand(6, 12).t()
    for name in FIELDS:
        ours, dense = (getattr(ops.token_drop(s, 4, backend=backend), name) for s in (scores, scores.contiguous()))
        assert torch.equal(ours, dense)
    logits, thresholds = torch.randn(12, 12)[:, ::2], torch.tensor(0.4).expand(6)
    ours, _ = ops.token_drop_predicted(scores, logits, thresholds, backend=backend)
    dense, _ = ops.token_drop_predicted(
        scores.contiguous(), logits.contiguous(), thresholds.contiguous(), backend=backend
    )
    assert rows_of(ours) == rows_of(dense)
    ids, weights = random_topk(2, 12, 12)
    ours, dense = (
        ops.token_choice_drop(i, w, 12, 1)[0]
        for i, w in ((ids.t(), weights.t()), (ids.t().clone(), weights.t().clone()))
    )
    assert torch.equal(ours, dense)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    empty = torch.zeros(0, 3)
    assert ops.token_drop(empty, 0, backend=backend).num_rows == 0
    routing, dropped = ops.token_drop_predicted(empty, empty, torch.zeros(3), backend=backend)
    assert routing.num_rows == 0 and dropped.item() == 0
    ids, dropped = ops.token_choice_drop(empty.long(), empty, 4, 2)
    assert ids.shape == (0, 3) and dropped.item() == 0


S, THR, INT = torch.zeros(12, 3), torch.zeros(3), torch.zeros(12, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (TypeError, "router_scores: expected a floating dtype", lambda: ops.token_drop(INT, 1)),
        (ValueError, r"router_scores: expected shape \(T, E\), got \(12,\)", lambda: ops.token_drop(S[:, 0], 1)),
        (
            ValueError,
            "num_pools: expected a divisor of the 12 tokens, got 5",
            lambda: ops.token_drop(S, 1, num_pools=5),
        ),
        (
            ValueError,
            "num_pools: expected a divisor of the 12 tokens, got 0",
            lambda: ops.token_drop(S, 1, num_pools=0),
        ),
        (ValueError, "expert_capacity: expected 0 to 6, .*, got 7", lambda: ops.token_drop(S, 7, num_pools=2)),
        (ValueError, "expert_capacity: expected 0 to 12, .*, got -1", lambda: ops.token_drop(S, -1)),
        (TypeError, "router_scores: expected a floating", lambda: ops.token_drop_predicted(INT, S, THR)),
        (TypeError, "capacity_logits: expected a floating", lambda: ops.token_drop_predicted(S, INT, THR)),
        (TypeError, "thresholds: expected a floating", lambda: ops.token_drop_predicted(S, S, INT[0])),
        (ValueError, r"capacity_logits: expected shape \(12, 3\)", lambda: ops.token_drop_predicted(S, S[:5], THR)),
        (ValueError, r"thresholds: expected shape \(3,\), got \(2,\)", lambda: ops.token_drop_predicted(S, S, THR[:2])),
        (ValueError, "different devices", lambda: ops.token_drop_predicted(S, S, THR.to("meta"))),
        (
            ValueError,
            "max_capacity: expected 0 to 12, .*, got 13",
            lambda: ops.token_drop_predicted(S, S, THR, max_capacity=13),
        ),
        (TypeError, "topk_ids: expected an integer", lambda: ops.token_choice_drop(S, S, 3, 1)),
        (TypeError, "drop_scores: expected a floating", lambda: ops.token_choice_drop(INT, INT, 3, 1)),
        (ValueError, r"topk_ids: expected shape \(T, K\)", lambda: ops.token_choice_drop(INT[0], S[0], 3, 1)),
        (ValueError, r"drop_scores: expected shape \(12, 3\)", lambda: ops.token_choice_drop(INT, S[:, :2], 3, 1)),
        (ValueError, "different devices", lambda: ops.token_choice_drop(INT, S.to("meta"), 3, 1)),
        (ValueError, "expert_capacity: expected at least 0, got -1", lambda: ops.token_choice_drop(INT, S, 3, -1)),
        (ValueError, "num_experts: expected at least 1, got 0", lambda: ops.token_choice_drop(INT, S, 0, 1)),
        (TypeError, "expert_capacity: expected an integer, got 2.0", lambda: ops.token_drop(S, 2.0)),
        (TypeError, "num_pools: expected an integer, got 2.0", lambda: ops.token_drop(S, 2, num_pools=2.0)),
        (TypeError, "num_experts: expected an integer, got 3.0", lambda: ops.token_choice_drop(INT, S, 3.0, 1)),
        (NotImplementedError, "'cuda' can't run", lambda: ops.token_drop(S.double(), 1, backend="cuda")),
        (NotImplementedError, "'cuda' can't", lambda: ops.token_drop_predicted(S, S.double(), THR, backend="cuda")),
        (NotImplementedError, "'cuda' can't", lambda: ops.token_choice_drop(INT, S.double(), 3, 1, backend="cuda")),
        (NotImplementedError, "there is no 'cuda'", lambda: ops.capacity_quantile(S, 1, backend="cuda")),
    ],
)
def test_rejects_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()
