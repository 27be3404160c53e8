"""The capacity predictor's ops and the "token" rule of `token_drop_predicted`, against loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from diffmoe_kernels import Routing, ops
from diffmoe_kernels.testing import assert_close, poisoned_allocations, random_topk
from diffmoe_kernels.triton_support import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BACKENDS_AND_DTYPES = [
    *(("reference", dtype) for dtype in DTYPES),
    *(pytest.param("triton", dtype, marks=needs_triton) for dtype in DTYPES[1:]),
]
THRESHOLDS = torch.tensor([0.0, 0.3, 0.5, 0.8, 1.0])
ROUTINGS = {
    "expert choice": lambda: ops.token_drop(torch.rand(20, 5), 4),
    "per sample": lambda: ops.token_drop(torch.rand(20, 5), 1, num_pools=4),
    "nothing chosen": lambda: ops.token_drop(torch.rand(20, 5), 0),
    "all chosen": lambda: ops.token_drop(torch.rand(20, 5), 20),
    "rows past the count": lambda: ops.token_drop_predicted(torch.rand(20, 5), torch.randn(20, 5), THRESHOLDS)[0],
    "token choice, dropped": lambda: Routing.from_topk(*random_topk(20, 5, 2, kind="dropped"), 5),
}


def chosen_by(routing):
    """{(token, expert): gate} of the rows within the true count."""
    count = int(routing.group_offsets[-1])
    tokens, experts, gates = routing.token_indices, routing.row_experts, routing.gates
    return dict(zip(zip(tokens[:count].tolist(), experts[:count].tolist(), strict=True), gates.tolist(), strict=False))


def mask_of(routing, dtype=torch.float64):
    """(T, E), 1 where the expert chose the token."""
    mask = torch.zeros(routing.num_tokens, routing.num_experts, dtype=dtype)
    for place in chosen_by(routing):
        mask[place] = 1
    return mask


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
@pytest.mark.parametrize("max_capacity", [None, 20, 9, 3, 0])
def test_by_the_token_rule_those_pass_that_are_predicted(max_capacity, backend, dtype):
    scores, logits = torch.rand(20, 5).to(dtype), torch.randn(20, 5).to(dtype)
    with poisoned_allocations():
        routing, num_dropped = ops.token_drop_predicted(
            scores, logits, THRESHOLDS, rule="token", max_capacity=max_capacity, backend=backend
        )
    bound = 20 if max_capacity is None else max_capacity
    expected, dropped = {}, 0
    for e, threshold in enumerate(THRESHOLDS.tolist()):
        passed = [t for t in range(20) if 1 / (1 + math.exp(-logits[t, e].item())) > threshold]
        best = sorted(passed, key=lambda t, e=e: (-scores[t, e].item(), t))[:bound]
        expected |= {(t, e): scores[t, e].item() for t in best}
        dropped += len(passed) - len(best)
    assert chosen_by(routing) == expected
    assert num_dropped.item() == dropped and num_dropped.dtype == torch.int64
    assert (dropped > 0) == (bound < 20)
    assert routing.num_rows == 5 * bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bound_breaks_ties_by_token(backend):
    logits = torch.tensor([[-9.0], [9.0], [-9.0], [9.0], [9.0]])
    routing, _ = ops.token_drop_predicted(
        torch.zeros(5, 1), logits, torch.full((1,), 0.5), rule="token", max_capacity=2, backend=backend
    )
    assert list(chosen_by(routing)) == [(1, 0), (3, 0)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["pool", "token"])
def test_a_prediction_at_its_threshold_does_not_pass(rule, backend):
    thresholds = torch.tensor([0.5, 0.49])
    routing, _ = ops.token_drop_predicted(torch.rand(4, 2), torch.zeros(4, 2), thresholds, rule=rule, backend=backend)
    assert routing.group_sizes.tolist() == [0, 4]


def test_by_the_token_rule_a_token_is_chosen_as_if_alone():
    scores, logits = torch.rand(20, 5), torch.randn(20, 5)
    together = chosen_by(ops.token_drop_predicted(scores, logits, THRESHOLDS, rule="token")[0])
    alone = {}
    for t in range(20):
        routing, _ = ops.token_drop_predicted(scores[t : t + 1], logits[t : t + 1], THRESHOLDS, rule="token")
        alone |= {(t, e): gate for (_, e), gate in chosen_by(routing).items()}
    assert together == alone
    assert together != chosen_by(ops.token_drop_predicted(scores, logits, THRESHOLDS)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_rule_gradient_reaches_the_chosen_scores_alone(backend):
    scores, logits = torch.rand(10, 5, requires_grad=True), torch.randn(10, 5, requires_grad=True)
    routing, _ = ops.token_drop_predicted(scores, logits, THRESHOLDS, rule="token", max_capacity=4, backend=backend)
    routing.gates.sum().backward()
    assert torch.equal(scores.grad, mask_of(routing, torch.float32))
    assert logits.grad is None


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_capacity_loss_is_binary_cross_entropy(routing, backend, dtype):
    routing = routing()
    logits = (3 * torch.randn(20, 5)).to(dtype).requires_grad_()
    with poisoned_allocations():
        loss = ops.capacity_loss(logits, routing, backend=backend)
        (grad,) = torch.autograd.grad(loss, logits)
    exact = logits.detach().double().requires_grad_()
    expected = F.binary_cross_entropy_with_logits(exact, mask_of(routing))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert_close(loss, expected, dtype=wide)
    assert_close(grad, torch.autograd.grad(expected, exact)[0], dtype=dtype)


@pytest.mark.parametrize("name", ["expert choice", "rows past the count", "nothing chosen"])
def test_capacity_loss_gradcheck(name):
    routing = ROUTINGS[name]()
    logits = torch.randn(20, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: ops.capacity_loss(z, routing), (logits,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_capacity_loss_leaves_the_gates_alone(backend):
    scores = torch.rand(20, 5, requires_grad=True)
    logits = torch.randn(20, 5, requires_grad=True)
    ops.capacity_loss(logits, ops.token_drop(scores, 4, backend=backend), backend=backend).backward()
    assert scores.grad is None and logits.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_capacity_loss_of_large_logits_is_finite(backend):
    routing = ops.token_drop(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 1)  # token 0 to expert 0, 1 to 1
    right = torch.tensor([[200.0, -200.0], [-200.0, 200.0]])
    assert ops.capacity_loss(right, routing, backend=backend).item() == 0
    assert ops.capacity_loss(-right, routing, backend=backend).item() == 200


@pytest.mark.parametrize("backend", BACKENDS)
def test_capacity_quantile_is_the_sorted_prediction(backend):
    logits = torch.randn(12, 3)
    ordered = logits.double().sigmoid().sort(dim=0, descending=True).values
    for capacity in range(1, 13):
        quantile = ops.capacity_quantile(logits, capacity, backend=backend)
        assert_close(quantile, ordered[capacity - 1], dtype=torch.float32)
        # As a threshold it lets all but the last place pass.
        routing, _ = ops.token_drop_predicted(logits, logits, quantile, rule="token", backend=backend)
        assert (routing.group_sizes == capacity - 1).all()
    assert ops.capacity_quantile(logits, 0, backend=backend).tolist() == [1, 1, 1]


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_capacity_quantile_dtype_strides_and_gradient(backend, dtype):
    logits = torch.randn(3, 12).to(dtype).t().requires_grad_()
    quantile = ops.capacity_quantile(logits, 5, backend=backend)
    assert quantile.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not quantile.requires_grad
    assert torch.equal(quantile, ops.capacity_quantile(logits.contiguous(), 5, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    empty = torch.zeros(0, 3, requires_grad=True)
    loss = ops.capacity_loss(empty, ops.token_drop(empty.detach(), 0, backend=backend), backend=backend)
    loss.backward()
    assert loss.item() == 0 and empty.grad.shape == (0, 3)
    assert ops.capacity_quantile(empty, 0, backend=backend).tolist() == [1, 1, 1]
    routing, dropped = ops.token_drop_predicted(empty, empty, torch.zeros(3), rule="token", backend=backend)
    assert routing.num_rows == 0 and dropped.item() == 0


S, THR, INT = torch.zeros(12, 3), torch.zeros(3), torch.zeros(12, 3, dtype=torch.int64)
CHOSEN = ops.token_drop(S, 4)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (
            ValueError,
            "rule: expected one of 'pool', 'token', got 'batch'",
            lambda: ops.token_drop_predicted(S, S, THR, rule="batch"),
        ),
        (TypeError, "routing: expected a Routing, got Tensor", lambda: ops.capacity_loss(S, S)),
        (TypeError, "capacity_logits: expected a floating dtype", lambda: ops.capacity_loss(INT, CHOSEN)),
        (ValueError, r"capacity_logits: expected shape \(12, 3\)", lambda: ops.capacity_loss(S[:5], CHOSEN)),
        (ValueError, r"capacity_logits: expected shape \(12, 3\)", lambda: ops.capacity_loss(S[:, :2], CHOSEN)),
        (ValueError, "different devices", lambda: ops.capacity_loss(S.to("meta"), CHOSEN)),
        (TypeError, "capacity_logits: expected a floating dtype", lambda: ops.capacity_quantile(INT, 1)),
        (ValueError, r"capacity_logits: expected shape \(T, E\), got \(3,\)", lambda: ops.capacity_quantile(THR, 1)),
        (ValueError, "expert_capacity: expected 0 to 12, .*, got 13", lambda: ops.capacity_quantile(S, 13)),
        (ValueError, "expert_capacity: expected 0 to 12, .*, got -1", lambda: ops.capacity_quantile(S, -1)),
        (
            NotImplementedError,
            "capacity_loss: there is no 'cuda'",
            lambda: ops.capacity_loss(S, CHOSEN, backend="cuda"),
        ),
        (NotImplementedError, "capacity_quantile: .* no 'cuda'", lambda: ops.capacity_quantile(S, 1, backend="cuda")),
    ],
)
def test_rejects_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()
