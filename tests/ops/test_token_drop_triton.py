"""What only the Triton kernels of `token_drop` have: several programs a segment, launches, registration with torch."""

import math

import pytest
import torch

from diffmoe_kernels import ops
from diffmoe_kernels.testing import poisoned_allocations
from diffmoe_kernels.triton_support import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
if HAS_TRITON:
    from diffmoe_kernels.ops.token_drop import _capacity_library, _library, _select, _triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FIELDS = ("token_indices", "gates", "group_offsets", "token_offsets", "token_rows")
SMALL_PARTS = {"IN_REGISTERS": 8, "CHUNK": 16, "MAX_PARTS": 4, "TILE": 16, "MAX_BLOCKS": 8}


@pytest.fixture(params=["in registers", "several programs"])
def plan(request, monkeypatch):
    """Both ways to select, at sizes that the interpreter can bear."""
    if request.param == "several programs":
        for name, value in SMALL_PARTS.items():
            monkeypatch.setattr(_select, name, value)
    return request.param


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels launched since."""
    names = []
    kind = type(_triton._token_drop_place_kernel)
    run = kind.run

    def counted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(kind, "run", counted)
    return names


def scores_like(kind, *shape):
    scores = torch.randn(*shape)
    if kind == "equal":
        scores = torch.full(shape, 0.25)
    elif kind == "ties":
        scores = (2 * scores).round()
    elif kind == "zeros of both signs":
        scores = torch.zeros(shape).where(scores > 0, -0.0)
    elif kind == "not finite":
        odd = torch.tensor([math.inf, -math.inf, math.nan, 3e38])
        scores = odd[torch.randint(4, shape)].where(torch.rand(shape) < 0.4, scores)
    elif kind == "subnormal":
        scores = 1e-40 * scores
    return scores.to(DEVICE)


def assert_same(ours, expected):
    """Bit for bit; a NaN equals a NaN."""
    for name in FIELDS:
        one, other = getattr(ours, name), getattr(expected, name)
        assert one.dtype == other.dtype and one.shape == other.shape, name
        bits = [x.view(torch.int32).where(x == x, -1) for x in (one, other)]  # 0 is a number of its own
        assert torch.equal(*bits), f"{name}: got {one.tolist()}, expected {other.tolist()}"


KINDS = ["random", "equal", "ties", "zeros of both signs", "not finite", "subnormal"]


@pytest.mark.parametrize(
    "pool_size, num_pools, num_experts, capacity",
    [(1, 1, 1, 1), (2, 3, 5, 1), (61, 1, 2, 20), (61, 1, 1, 61), (37, 2, 1, 0), (37, 2, 1, 1)],
)
def test_token_drop_is_the_references_choice(pool_size, num_pools, num_experts, capacity, plan):
    dtypes = 2 * (torch.float32, torch.bfloat16, torch.float16)
    for kind, dtype in zip(KINDS, dtypes, strict=True):
        scores = scores_like(kind, pool_size * num_pools, num_experts).to(dtype)
        with poisoned_allocations():
            ours = ops.token_drop(scores, capacity, num_pools=num_pools, backend="triton")
        assert_same(ours, ops.token_drop(scores, capacity, num_pools=num_pools, backend="reference"))


@pytest.mark.parametrize("rule", ["pool", "token"])
@pytest.mark.parametrize("num_tokens, max_capacity", [(1, 1), (61, 61), (61, 20), (30, 0)])
def test_predicted_is_the_references_choice(num_tokens, max_capacity, rule, plan):
    thresholds = torch.tensor([0.0, 1.0, 0.5], device=DEVICE)
    for kind in KINDS:
        arguments = scores_like(kind, num_tokens, 3), 3 * torch.randn(num_tokens, 3, device=DEVICE), thresholds
        options = {"rule": rule, "max_capacity": max_capacity}
        with poisoned_allocations():
            ours, dropped = ops.token_drop_predicted(*arguments, **options, backend="triton")
        expected, count = ops.token_drop_predicted(*arguments, **options, backend="reference")
        assert_same(ours, expected)
        assert torch.equal(dropped, count) and dropped.dtype == torch.int64


def test_first_thresholds_send_every_token_to_every_expert(plan):
    scores = torch.rand(45, 3, device=DEVICE)
    routing, dropped = ops.token_drop_predicted(
        scores, torch.randn(45, 3, device=DEVICE), torch.zeros(3, device=DEVICE), backend="triton"
    )
    assert routing.group_sizes.tolist() == [45, 45, 45] and dropped.item() == 0
    assert torch.equal(routing.gates.view(3, 45), scores.t())
    assert torch.equal(routing.token_rows.view(45, 3).t().flatten(), torch.arange(135, device=DEVICE).int())


@pytest.mark.parametrize("kind", KINDS)
def test_capacity_quantile_is_the_references(kind, plan):
    logits = scores_like(kind, 61, 1)
    for capacity in (0, 1, 20):
        ours = ops.capacity_quantile(logits, capacity, backend="triton")
        expected = ops.capacity_quantile(logits, capacity, backend="reference")
        torch.testing.assert_close(ours, expected, rtol=3e-7, atol=0, equal_nan=True)


def test_capacity_loss_of_several_blocks(monkeypatch):
    monkeypatch.setattr(_select, "TILE", 16)
    logits = (4 * torch.randn(61, 3, device=DEVICE)).requires_grad_()
    routing = ops.token_drop(torch.rand(61, 3, device=DEVICE), 20)
    with poisoned_allocations():
        ours = ops.capacity_loss(logits, routing, backend="triton")
        (grad,) = torch.autograd.grad(ours, logits)
    expected = ops.capacity_loss(logits, routing, backend="reference")
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, logits)[0], rtol=1e-6, atol=1e-9)


def test_capacity_loss_of_confident_predictions_keeps_its_digits():
    """log1p: log(1 + x) would lose them."""
    logits = torch.linspace(-20, -5, 64, device=DEVICE).view(16, 4)
    routing = ops.token_drop(torch.rand(16, 4, device=DEVICE), 0)
    expected = torch.nn.functional.softplus(logits.double()).mean()
    ours = ops.capacity_loss(logits, routing, backend="triton")
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_of_the_scores(dtype, monkeypatch):
    monkeypatch.setattr(_select, "TILE", 16)
    scores = torch.rand(61, 3, device=DEVICE).to(dtype).requires_grad_()
    weights = torch.randn(60, device=DEVICE)
    grads = []
    for backend in ("triton", "reference"):
        with poisoned_allocations():
            gates = ops.token_drop(scores, 20, backend=backend).gates
            grads += torch.autograd.grad(gates, scores, weights)
    assert grads[0].dtype == dtype and torch.equal(*grads)


def test_gradient_that_arrives_past_the_count_is_not_read():
    scores = torch.rand(20, 2, device=DEVICE, requires_grad=True)
    routing, _ = ops.token_drop_predicted(
        scores, torch.randn(20, 2, device=DEVICE), torch.full((2,), 0.5, device=DEVICE), backend="triton"
    )
    count = int(routing.group_offsets[-1])
    assert 0 < count < 40
    weights = torch.ones(40, device=DEVICE)
    weights[count:] = math.nan
    routing.gates.backward(weights)
    assert scores.grad.isfinite().all() and scores.grad.sum() == count


def test_the_bits_are_the_same_every_run(plan):
    logits, scores = torch.randn(61, 3, device=DEVICE), torch.rand(61, 3, device=DEVICE)
    thresholds = torch.rand(3, device=DEVICE)
    runs = [ops.token_drop_predicted(scores, logits, thresholds, backend="triton")[0] for _ in range(2)]
    assert_same(*runs)
    losses = [ops.capacity_loss(logits, runs[0], backend="triton") for _ in range(2)]
    assert torch.equal(*losses)


def test_launches(launches, plan):
    scores = torch.rand(61, 3, device=DEVICE, requires_grad=True)
    logits = torch.randn(61, 3, device=DEVICE, requires_grad=True)
    of_selection = 1 if plan == "in registers" else 5

    def launched(function):
        launches.clear()
        result = function()
        return result, len(launches)

    routing, count = launched(lambda: ops.token_drop(scores, 20, backend="triton"))
    assert count == of_selection + 1
    assert launched(routing.gates.sum().backward)[1] == 1
    thresholds = torch.rand(3, device=DEVICE)
    _, count = launched(lambda: ops.token_drop_predicted(scores, logits, thresholds, backend="triton"))
    assert count == of_selection + 1
    loss, count = launched(lambda: ops.capacity_loss(logits, routing, backend="triton"))
    assert count == 2
    assert launched(loss.backward)[1] == 1
    assert launched(lambda: ops.capacity_quantile(logits, 20, backend="triton"))[1] == of_selection + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    scores = torch.rand(12, 3, device=DEVICE).to(dtype).requires_grad_()
    logits = torch.randn(12, 3, device=DEVICE).to(dtype).requires_grad_()
    thresholds = torch.rand(3, device=DEVICE)
    routing = ops.token_drop(scores.detach(), 4)
    maps = routing.group_offsets, routing.token_offsets, routing.token_rows
    torch.library.opcheck(_library._token_drop.overload, (scores, 2, 2, "triton"))
    torch.library.opcheck(_library._token_drop.overload, (scores, 0, 1, "triton"))
    torch.library.opcheck(
        _library._token_drop_predicted.overload, (scores, logits.detach(), thresholds, 6, True, "triton")
    )
    torch.library.opcheck(_library._token_drop_backward.overload, (routing.gates, *maps, dtype, "triton"))
    torch.library.opcheck(_capacity_library._capacity_loss.overload, (logits, *maps))
    torch.library.opcheck(
        _capacity_library._capacity_loss_backward.overload, (torch.ones((), device=DEVICE), logits.detach(), *maps)
    )
    torch.library.opcheck(_capacity_library._capacity_quantile.overload, (logits.detach(), 4))


def test_compiles_whole():
    def step(scores, logits, thresholds):
        chosen = ops.token_drop(scores, 4, num_pools=2, backend="triton")
        predicted, dropped = ops.token_drop_predicted(scores, logits, thresholds, max_capacity=6, backend="triton")
        loss = ops.capacity_loss(logits, chosen, backend="triton")
        total = loss + chosen.gates.square().sum() + predicted.gates.sum()
        return total, ops.capacity_quantile(logits, 8, backend="triton"), dropped

    results = []
    thresholds = torch.rand(3, device=DEVICE)
    leaves = [
        torch.rand(16, 3, device=DEVICE, requires_grad=True),
        torch.randn(16, 3, device=DEVICE, requires_grad=True),
    ]
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        total, *others = function(*leaves, thresholds)
        results.append([total.detach(), *others, *torch.autograd.grad(total, leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_shapes_on_the_meta_device():
    scores = torch.empty(64, 4, device="meta")
    routing, dropped = ops.token_drop_predicted(scores, scores, scores[0], max_capacity=10, backend="triton")
    assert routing.num_rows == 40 and routing.num_tokens == 64 and dropped.shape == ()
    assert ops.capacity_loss(scores, ops.token_drop(scores, 4, num_pools=2, backend="triton"), backend="triton").is_meta


def test_float64_is_refused():
    wide, narrow = torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4, 2)
    refused = pytest.raises(
        NotImplementedError, match="'triton' can't run here: the kernels take .*, not torch.float64"
    )
    with refused:
        ops.token_drop(wide, 1, backend="triton")
    with refused:
        ops.token_drop_predicted(narrow, wide, narrow[0], backend="triton")
    with refused:
        ops.token_drop_predicted(narrow, narrow, wide[0], backend="triton")
    with refused:
        ops.capacity_quantile(wide, 1, backend="triton")
