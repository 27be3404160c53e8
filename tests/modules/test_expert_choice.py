"""`ExpertChoiceMoE` against a loop over experts in float64: training, inference, gradients, arguments."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F

from diffmoe_kernels import ExpertChoiceMoE
from diffmoe_kernels.testing import assert_close, poisoned_allocations

RUNS = [("auto", torch.float64), ("reference", torch.float32), ("torch", torch.float32)]
CONFIGS = [
    {},
    {"capacity_factor": 2.0, "shared_intermediate_size": 16},
    {"capacity_factor": 1.5, "activation": "swiglu", "bias": False, "predictor": False},
    {"pool": "sample", "predictor": False, "activation": "silu", "shared_intermediate_size": 8},
]


def make(hidden=8, inner=16, num_experts=4, **options):
    """A layer whose router and predictor tell tokens apart."""
    layer = ExpertChoiceMoE(hidden, inner, num_experts, **options)
    torch.nn.init.normal_(layer.router.weight)
    if layer.capacity_predictor is not None:
        torch.nn.init.normal_(layer.capacity_predictor[-1].weight)
    return layer


def evaluated(threshold=0.5, **options):
    """A layer in evaluation mode, with thresholds that about half of the predictions pass."""
    layer = make(**options).eval()
    layer.expert_threshold = torch.full_like(layer.expert_threshold, threshold)
    return layer


def activate(hidden, activation):
    if activation == "swiglu":
        gate, up = hidden.tensor_split(2, dim=-1)
        return F.silu(gate) * up
    return F.silu(hidden) if activation == "silu" else F.gelu(hidden, approximate="tanh")


def best_of(scores, tokens, count):
    """The ``count`` of ``tokens`` with the largest scores."""
    return sorted(tokens, key=lambda t: -scores[t])[:count]


def scores_of(layer, tokens):
    return (tokens @ layer.router.weight.t()).softmax(-1)


def passed_by(layer, tokens):
    """[tokens that pass] of each expert."""
    first, _, last = layer.capacity_predictor
    hidden = F.silu(tokens @ first.weight.t() + first.bias)
    passed = (hidden @ last.weight.t() + last.bias).sigmoid() > layer.expert_threshold
    return [column.nonzero().flatten().tolist() for column in passed.t()]


def loop(layer, x, chosen):
    """Every expert on its tokens, one at a time; ``chosen(e, scores)`` lists them, ``scores`` being expert e's."""
    tokens, experts = x.flatten(0, -2), layer.experts
    scores = scores_of(layer, tokens)
    up, up_bias = getattr(experts, experts.up_name), getattr(experts, f"{experts.up_name}_bias")
    out, load = torch.zeros_like(tokens), []
    for e in range(layer.num_experts):
        picked = chosen(e, scores[:, e].tolist())
        load.append(len(picked))
        hidden = activate(F.linear(tokens[picked], up[e], None if up_bias is None else up_bias[e]), experts.activation)
        down_bias = None if experts.down_proj_bias is None else experts.down_proj_bias[e]
        rows = scores[picked, e : e + 1] * F.linear(hidden, experts.down_proj[e], down_bias)
        out = out.index_add(0, torch.tensor(picked, dtype=torch.int64), rows)
    if (shared := layer.shared_expert) is not None:
        up = shared.gate_up_proj if experts.activation == "swiglu" else shared.up_proj
        out = out + shared.down_proj(activate(up(tokens), experts.activation))
    return out.view_as(x), load


def grads(layer, out, x):
    inputs = [x, *layer.parameters()]
    return torch.autograd.grad(out, inputs, torch.ones_like(out).cumsum(-1), allow_unused=True, materialize_grads=True)


def assert_equals_loop(layer, x, chosen):
    """Values and gradients; returns the record and the loop's loads."""
    with poisoned_allocations():
        y, aux = layer(x, return_aux=True)
        ours = grads(layer, y, x)
    exact, exact_x = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    expected, load = loop(exact, exact_x, chosen)
    assert_close(y, expected, dtype=x.dtype)
    names = ["x", *dict(layer.named_parameters())]
    tolerance = 1e-12 if x.dtype == torch.float64 else 5e-6
    for name, grad, other in zip(names, ours, grads(exact, expected, exact_x), strict=True):
        assert_close(grad, other, dtype=x.dtype, tolerance=tolerance, name=name)
    assert aux.expert_load.tolist() == load and aux.expert_load.dtype == torch.float32
    assert aux.num_dropped.dtype == torch.int64
    assert torch.equal(layer(x), y)
    return aux, load


@pytest.mark.parametrize("backend, dtype", RUNS)
@pytest.mark.parametrize("config", CONFIGS)
def test_training_takes_each_experts_best_of_the_pool(config, backend, dtype):
    layer = make(**config, backend=backend, dtype=dtype)
    x = torch.randn(3, 6, 8, dtype=dtype, requires_grad=True)
    size = 6 if layer.pool == "sample" else 18
    capacity = int(size / 4 * layer.capacity_factor)

    def chosen(e, scores):
        return [t for first in range(0, 18, size) for t in best_of(scores, range(first, first + size), capacity)]

    aux, load = assert_equals_loop(layer, x, chosen)
    assert load == [capacity * 18 // size] * 4
    assert aux.num_dropped.item() == 0
    if layer.capacity_predictor is None:
        assert aux.loss is aux.capacity_quantile is None
        assert torch.equal(layer.eval()(x), layer.train()(x))  # inference is as training
    else:
        assert aux.loss.dtype == aux.capacity_quantile.dtype == dtype and aux.capacity_quantile.shape == (4,)


@pytest.mark.parametrize("backend, dtype", RUNS)
@pytest.mark.parametrize("bound", [None, 0.5, 100.0])
@pytest.mark.parametrize("inference", ["pool", "token"])
def test_inference_takes_what_was_predicted(inference, bound, backend, dtype):
    options = {"inference": inference, "max_capacity_factor": bound, "backend": backend, "dtype": dtype}
    layer = evaluated(**options, shared_intermediate_size=16)
    layer.expert_threshold = torch.tensor([0.0, 0.45, 0.52, 1.0])  # all, some, some, none
    x = torch.randn(3, 6, 8, dtype=dtype, requires_grad=True)
    passed = passed_by(layer, x.detach().flatten(0, 1))
    most = 2 if bound == 0.5 else 18  # int(18 / 4 * 0.5)

    def chosen(e, scores):
        among = range(18) if inference == "pool" else passed[e]
        return best_of(scores, among, min(len(passed[e]), most))

    aux, load = assert_equals_loop(layer, x, chosen)
    wanted = [len(tokens) for tokens in passed]
    assert wanted[0] == 18 and 2 < wanted[1] < 18 and 2 < wanted[2] < 18 and wanted[3] == 0
    assert aux.num_dropped.item() == sum(wanted) - sum(load)
    assert (aux.num_dropped.item() > 0) == (bound == 0.5)
    assert aux.loss is aux.capacity_quantile is None


@pytest.mark.parametrize("capacity_factor, taken", [(0.45, 1), (3.9, 8), (4.0, 9), (50.0, 9)])
def test_capacities_from_one_to_all(capacity_factor, taken):
    layer = make(capacity_factor=capacity_factor, shared_intermediate_size=16)
    y, aux = layer(torch.randn(9, 8), residual=torch.randn(9, 8), return_aux=True)
    assert aux.expert_load.tolist() == [taken] * 4
    y.sum().backward()
    assert layer.experts.down_proj.grad.any()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (make(capacity_factor=0.1), (9, 8)),  # under one token in any batch of this size
        (make(), (3, 8)),  # S / E * capacity < 1 in a last batch
        (make(pool="sample", predictor=False), (5, 3, 8)),
        (make(pool="sample", predictor=False).eval(), (5, 3, 8)),
    ],
)
def test_a_capacity_under_one_token_is_refused(layer, shape):
    with pytest.raises(ValueError, match=r"int\([39] / 4 \* [01]\.\d\) = 0 tokens, expected at least 1: use a larger"):
        layer(torch.randn(shape))


@pytest.mark.filterwarnings("ignore:ExpertChoiceMoE is evaluated")
def test_inference_by_prediction_takes_a_batch_of_any_size():
    x = torch.randn(1, 8)
    for layer in (evaluated(threshold=0.0), evaluated(threshold=0.0, max_capacity_factor=0.5)):
        assert layer(x, return_aux=True)[1].expert_load.tolist() == [1] * 4


def test_nothing_chosen_gives_the_residual_alone():
    x, residual = torch.randn(9, 8), torch.randn(9, 8)
    for layer in (evaluated(threshold=1.0), evaluated(threshold=1.0, inference="token")):
        assert torch.equal(layer(x, residual=residual), residual)
        assert not layer(x).any()


def test_a_schedule_may_set_the_capacity():
    layer = make()
    layer.capacity_factor = 2.0
    assert layer(torch.randn(9, 8), return_aux=True)[1].expert_load.tolist() == [4] * 4


@pytest.mark.parametrize("config", CONFIGS)
def test_gradcheck(config):
    layer = make(**config, hidden=4, inner=3, dtype=torch.float64)
    x = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def function(x, *values):
        values = dict(zip(names, values, strict=True))
        y, aux = torch.func.functional_call(layer, values, (x,), {"return_aux": True})
        return (y, aux.loss) if layer.capacity_predictor is not None else y

    if layer.capacity_predictor is None:
        assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)
    else:  # the loss stops at the tokens by design, which finite differences cannot know
        fixed = x.detach()
        assert torch.autograd.gradcheck(lambda *values: function(fixed, *values), parameters, fast_mode=True)
        assert torch.autograd.gradcheck(lambda x: function(x, *parameters)[0], (x,), fast_mode=True)


def test_the_loss_trains_the_predictor_alone():
    layer = make(shared_intermediate_size=8)
    x = torch.randn(3, 6, 8, requires_grad=True)
    y, aux = layer(x, return_aux=True)
    aux.loss.backward(retain_graph=True)
    assert x.grad is None
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is not None) == name.startswith("capacity_predictor"), name
    layer.zero_grad()
    y.sum().backward()
    assert all(parameter.grad is None for parameter in layer.capacity_predictor.parameters())


@pytest.mark.parametrize("inference", ["pool", "token"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("seed", range(4))
def test_what_a_sample_owes_to_its_batch_mates(seed, backend, inference):
    """By the token rule nothing, to the bit; only the reference rounds groups of another size differently."""
    torch.manual_seed(seed)
    layer = evaluated(hidden=16, inner=32, inference=inference, backend=backend, shared_intermediate_size=16)
    batch, others = torch.randn(2, 4, 16, 16)
    others[1] = batch[1]
    gates = []

    def keep(_, args):
        routing, count = args[1], int(args[1].group_offsets[-1])
        place = routing.token_indices[:count].long(), routing.row_experts[:count]
        gates.append(torch.zeros(64, 4).index_put(place, routing.gates[:count])[16:32])  # of sample 1

    layer.experts.register_forward_pre_hook(keep)
    ours, other = layer(batch)[1], layer(others)[1]
    if inference == "token":
        assert torch.equal(*gates[:2])
        assert_close(ours, other, tolerance=1e-6 if backend == "reference" else 0.0)
        # The same sizes of groups: the same bits.
        assert torch.equal(layer(batch[[3, 1, 0, 2]])[1], ours)
    else:
        assert not torch.equal(*gates[:2])
        assert (ours - other).abs().amax() > 1e-4


def test_residual_is_added_in_the_combine():
    for layer in (make(shared_intermediate_size=8), evaluated(), make(pool="sample", predictor=False)):
        x, residual = torch.randn(3, 5, 8), torch.randn(3, 5, 8, requires_grad=True)
        y = layer(x, residual=residual)
        assert_close(y, layer(x) + residual)
        y.sum().backward()
        assert torch.equal(residual.grad, torch.ones_like(residual))


def test_shapes_and_any_strides():
    x = torch.randn(2, 4, 5, 8)
    batch, sample = make(), make(pool="sample", predictor=False)
    assert batch(x).shape == x.shape
    assert torch.equal(batch(x.reshape(40, 8)).view_as(x), batch(x))  # one pool, whatever the samples
    assert_close(sample(x), torch.stack([torch.stack([sample(one) for one in row]) for row in x]))
    for layer in (batch, sample):
        for strided in (x.transpose(1, 2), torch.stack([x, x], -1)[..., 0]):
            assert_close(layer(strided), layer(strided.contiguous()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (0, 8)])
@pytest.mark.parametrize(
    "options", [{}, {"inference": "token", "max_capacity_factor": 1.0}, {"pool": "sample", "predictor": False}]
)
@pytest.mark.filterwarnings("ignore:ExpertChoiceMoE is evaluated")
def test_no_tokens_pass_like_a_linear_layer(options, shape, training):
    layer = make(**options, shared_intermediate_size=8).train(training)
    x = torch.zeros(shape, requires_grad=True)
    y, aux = layer(x, return_aux=True)
    (y.sum() + (0 if aux.loss is None else aux.loss)).backward()
    assert y.shape == x.grad.shape == shape
    assert aux.expert_load.tolist() == [0] * 4 and aux.num_dropped.item() == 0
    assert not layer.experts.down_proj.grad.any()


def test_signature():
    """The names, order and defaults that callers rely on."""
    parameters = list(inspect.signature(ExpertChoiceMoE).parameters.values())
    assert [(p.name, p.default) for p in parameters] == [
        *((name, inspect.Parameter.empty) for name in ("hidden_size", "intermediate_size", "num_experts")),
        ("capacity_factor", 1.0), ("pool", "batch"), ("predictor", True), ("activation", "gelu_tanh"), ("bias", True),
        ("shared_intermediate_size", 0), ("inference", "pool"), ("max_capacity_factor", None),
        ("threshold_decay", 0.95), ("backend", "auto"), ("device", None), ("dtype", None),
    ]  # fmt: skip
    assert [p.kind for p in parameters] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 3 + [
        inspect.Parameter.KEYWORD_ONLY
    ] * 12


@pytest.mark.parametrize(
    "message, options",
    [
        ("hidden_size: expected at least 1, got 0", {"hidden": 0}),
        ("intermediate_size: expected at least 1, got -1", {"inner": -1}),
        ("num_experts: expected at least 1, got 0", {"num_experts": 0}),
        ("shared_intermediate_size: expected at least 0, got -8", {"shared_intermediate_size": -8}),
        ("^capacity_factor: expected a finite number above 0, got 0", {"capacity_factor": 0}),
        ("^capacity_factor: expected a finite number above 0, got nan", {"capacity_factor": float("nan")}),
        ("max_capacity_factor: expected a finite number above 0, got -1", {"max_capacity_factor": -1}),
        ("max_capacity_factor: expected a finite number above 0, got inf", {"max_capacity_factor": float("inf")}),
        (r"threshold_decay: expected a number in \[0, 1\), got 1", {"threshold_decay": 1}),
        (r"threshold_decay: expected a number in \[0, 1\), got -0.1", {"threshold_decay": -0.1}),
        ("pool: expected one of 'batch', 'sample', got 'image'", {"pool": "image"}),
        ("inference: expected one of 'pool', 'token', got 'batch'", {"inference": "batch"}),
        ("predictor: expected False with pool 'sample'", {"pool": "sample"}),
        ("predictor: expected True with inference 'token'", {"predictor": False, "inference": "token"}),
        ("predictor: expected True with .*max_capacity_factor", {"predictor": False, "max_capacity_factor": 2.0}),
        ("activation: expected one of 'swiglu', .* got 'relu'", {"activation": "relu"}),
        ("backend: expected one of .* got 'gpu'", {"backend": "gpu"}),
    ],
)
def test_construction_rejects(message, options):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("options", [{"capacity_factor": None}, {"max_capacity_factor": "2"}, {"threshold_decay": "1"}])
def test_construction_rejects_what_is_no_number(options):
    ((name, value),) = options.items()
    with pytest.raises(TypeError, match=f"^{name}: expected a number, got {value!r}"):
        make(**options)


def test_a_record_of_another_layer_is_refused():
    layer, other = make(), ExpertChoiceMoE(8, 8, 1)  # whose one threshold would be everyone's
    with pytest.raises(ValueError, match=r"aux.expert_load: expected shape \(4,\), got \(1,\)"):
        layer.update_routing_state(other(torch.randn(6, 8), return_aux=True)[1])
    assert not layer.expert_threshold.any()


def test_forward_rejects():
    layer = make()
    with pytest.raises(ValueError, match=r"x: expected shape \(\.\.\., T, 8\), got \(3, 7\)"):
        layer(torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"x: expected shape \(\.\.\., T, 8\), got \(8,\)"):
        layer(torch.zeros(8))
    with pytest.raises(ValueError, match=r"residual: expected shape \(3, 8\), got \(8,\)"):
        layer(torch.zeros(3, 8), residual=torch.zeros(8))
    with pytest.raises(NotImplementedError, match="there is no 'cuda' backend"):
        make(backend="cuda")(torch.zeros(4, 8))
