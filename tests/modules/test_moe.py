"""`MoE` against a loop over experts; its state, its balance, and where it may run."""

import copy
import inspect
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from diffmoe_kernels import Balance, ExpertChoiceMoE, MoE
from diffmoe_kernels.modules import Experts, FeedForward, TopKRouter
from diffmoe_kernels.testing import assert_close, poisoned_allocations

CONFIGS = [
    {"top_k": 2},
    {"top_k": 1, "scaling_factor": 2.5, "shared_intermediate_size": 16},
    {"top_k": 2, "bias": True, "activation": "gelu_tanh", "shared_intermediate_size": 8},
    {"top_k": 3, "activation": "silu", "score_function": "softmax", "normalize_weights": False},
    {"top_k": 2, "num_groups": 2, "top_groups": 1, "bias": True, "shared_intermediate_size": 24},
]


def make(top_k=2, hidden=8, inner=16, num_experts=6, **options):
    return MoE(hidden, inner, num_experts, top_k, **options)


def activate(hidden, activation):
    if activation == "swiglu":
        gate, up = hidden.tensor_split(2, dim=-1)
        return F.silu(gate) * up
    return F.silu(hidden) if activation == "silu" else F.gelu(hidden, approximate="tanh")


def moe_loop(layer, x):
    """All tokens through every expert, weighted with 0 where the token did not choose it."""
    router, experts, tokens = layer.router, layer.experts, x.flatten(0, -2)
    logits = tokens @ router.weight.t()
    scores = logits.sigmoid() if router.score_function == "sigmoid" else logits.softmax(-1)
    biased = (scores + router.expert_bias).detach()
    groups = biased.unflatten(1, (router.num_groups, -1))
    kept = groups.topk(2).values.sum(-1).topk(router.top_groups).indices
    open_groups = torch.zeros(len(tokens), router.num_groups).scatter(1, kept, 1.0).bool()
    biased = groups.where(open_groups.unsqueeze(2), -math.inf).flatten(1)
    chosen = torch.zeros_like(scores).scatter(1, biased.topk(router.top_k).indices, 1.0)
    weights = scores * chosen
    if router.normalize_weights and router.top_k > 1:
        weights = weights / weights.sum(1, keepdim=True)
    up_proj, up_bias = getattr(experts, experts.up_name), getattr(experts, f"{experts.up_name}_bias")
    out = torch.zeros_like(tokens)
    for e in range(router.num_experts):
        hidden = activate(F.linear(tokens, up_proj[e], None if up_bias is None else up_bias[e]), experts.activation)
        bias = None if experts.down_proj_bias is None else experts.down_proj_bias[e]
        out = out + router.scaling_factor * weights[:, e : e + 1] * F.linear(hidden, experts.down_proj[e], bias)
    if (shared := layer.shared_expert) is not None:
        up = shared.gate_up_proj if experts.activation == "swiglu" else shared.up_proj
        out = out + shared.down_proj(activate(up(tokens), experts.activation))
    return out.view_as(x), chosen


def grads(layer, out):
    return torch.autograd.grad(out, list(layer.parameters()), torch.ones_like(out).cumsum(-1))


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
@pytest.mark.parametrize("config", CONFIGS)
def test_matches_the_loop(config, backend):
    layer = make(**config, backend=backend)
    layer.router.expert_bias += 0.1 * torch.randn(6)
    x = torch.randn(3, 5, 8, requires_grad=True)
    with poisoned_allocations():
        y, aux = layer(x, return_aux=True)
        ours = grads(layer, y)
    expected, chosen = moe_loop(layer, x)
    assert_close(y, expected)
    for (name, _), grad, other in zip(layer.named_parameters(), ours, grads(layer, expected), strict=True):
        assert_close(grad, other, tolerance=5e-6, name=name)
    assert torch.equal(aux.expert_load, chosen.sum(0)) and aux.expert_load.dtype == torch.float32
    assert aux.num_dropped.item() == 0 and aux.num_dropped.dtype == torch.int64
    assert aux.loss is None
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("config", CONFIGS[:2])
def test_gradcheck(config):
    layer = make(**config, hidden=4, inner=3, num_experts=4, dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)


def test_residual_is_added_in_the_combine():
    layer = make(shared_intermediate_size=8)
    x, residual = torch.randn(3, 5, 8), torch.randn(3, 5, 8, requires_grad=True)
    y = layer(x, residual=residual)
    assert_close(y, layer(x) + residual)
    y.sum().backward()
    assert torch.equal(residual.grad, torch.ones_like(residual))


def test_shapes_and_any_strides():
    layer = make()
    x = torch.randn(2, 3, 4, 8)
    y = layer(x)
    assert y.shape == x.shape
    assert_close(layer(x.reshape(24, 8)).view_as(x), y)
    for strided in (x.transpose(1, 2), torch.stack([x, x], -1)[..., 0], x[:1].expand_as(x)):
        assert_close(layer(strided), layer(strided.contiguous()))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_tokens_pass_like_a_linear_layer(backend):
    layer = make(balance="loss", bias=True, shared_intermediate_size=8, capacity_factor=1.0, backend=backend)
    x = torch.zeros(0, 5, 8, requires_grad=True)
    y, aux = layer(x, return_aux=True)
    (y.sum() + aux.loss).backward()
    assert y.shape == x.grad.shape == (0, 5, 8)
    assert aux.loss.item() == 0
    assert all(not p.grad.any() for p in layer.parameters())


def test_a_capacity_under_one_token_is_refused():
    layer = make(capacity_factor=0.5, num_experts=4)
    with pytest.raises(ValueError, match=r"int\(6 / 4 \* 0.5\) = 0 tokens, expected at least 1: use a larger batch"):
        layer(torch.randn(3, layer.router.weight.shape[1]))


def test_capacity_factor_drops_the_lowest_weights():
    layer = make(capacity_factor=0.5, num_experts=4)
    x = torch.randn(24, 8)
    x[0] = 5 * layer.router.weight[0].detach()  # one token that certainly stays at expert 0
    y, aux = layer(x, return_aux=True)
    capacity = int(24 * 2 / 4 * 0.5)
    choice = layer.router(x)
    weights = torch.zeros(24, 4).scatter(1, choice.topk_ids.long(), choice.topk_weights.detach())
    for e in range(4):  # keep each expert's largest weights
        weights[weights[:, e].argsort(descending=True)[capacity:], e] = 0
    load = torch.zeros(4).scatter_add(0, choice.topk_ids.long().flatten(), torch.ones(48))
    assert aux.expert_load.tolist() == load.tolist()  # before the drop
    assert aux.num_dropped.item() == 48 - int((weights > 0).sum()) > 0
    every = torch.stack(
        [activate(x @ layer.experts.gate_up_proj[e].t(), "swiglu") @ layer.experts.down_proj[e].t() for e in range(4)]
    )
    assert_close(y, torch.einsum("te,etd->td", weights, every))
    assert_close(layer.eval()(x), y)
    roomy = make(capacity_factor=1e6)
    assert roomy(x, return_aux=True)[1].num_dropped.item() == 0


@pytest.mark.parametrize("training", [True, False])
def test_forward_changes_no_state(training):
    layer = make(balance=Balance(1e-3, 1e-2), capacity_factor=1.0).train(training)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(9, 8, requires_grad=True)
    layer(x)
    checkpoint(layer, x, use_reentrant=False).sum().backward()  # computes forward twice
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_activation_checkpointing_gives_the_same_gradients():
    layer = make(bias=True, shared_intermediate_size=8, dropout=0.3)
    x = torch.randn(9, 8)
    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(1)
        out = run(x)
        results.append((out, *grads(layer, out)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_dropout_acts_in_training_alone():
    layer = make(dropout=0.5, shared_intermediate_size=16)
    x = torch.randn(9, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert_close(layer(x), moe_loop(layer, x)[0])


def test_autocast_keeps_router_and_master_gradients_in_float32():
    layer = make(hidden=16, bias=True, shared_intermediate_size=16, balance="loss")
    x = torch.randn(20, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y, aux = layer(x, return_aux=True)
        choice = layer.router(x)
    assert y.dtype == torch.bfloat16 and aux.loss.dtype == torch.float32
    assert torch.equal(choice.router_scores, layer.router(x).router_scores)
    assert choice.router_scores.dtype == choice.routing.gates.dtype == torch.float32
    full = layer(x)
    assert_close(y, full, dtype=torch.bfloat16, tolerance=2e-2)
    for (name, parameter), grad, other in zip(
        layer.named_parameters(), grads(layer, y), grads(layer, full), strict=True
    ):
        assert grad.dtype == parameter.dtype == torch.float32
        assert_close(grad, other, tolerance=3e-2, name=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_keeps_the_selection_bias(dtype):
    layer = make(shared_intermediate_size=8, bias=True)
    layer.router.expert_bias.copy_(torch.tensor([0.3001, -0.2, 1e-3, 0, 0.1, 1]))
    bias = layer.router.expert_bias.clone()
    layer.to(dtype)
    assert torch.equal(layer.router.expert_bias, bias) and layer.router.expert_bias.dtype == torch.float32
    assert all(parameter.dtype == dtype for parameter in layer.parameters())
    y = layer(torch.randn(4, 8).to(dtype))
    assert y.dtype == dtype and y.isfinite().all()
    assert layer.float().double().router.expert_bias.dtype == torch.float64


def test_meta_construction_then_loading():
    source = make(bias=True, shared_intermediate_size=8)
    source.router.expert_bias.normal_()
    with torch.device("meta"):
        layer = make(bias=True, shared_intermediate_size=8)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert make(device="meta").router.weight.is_meta
    layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    x = torch.randn(9, 8)
    assert torch.equal(layer(x), source(x))
    assigned = make(bias=True, shared_intermediate_size=8, device="meta")
    assigned.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(assigned(x), source(x))


def test_state_dict_and_copies():
    layer = make(bias=True, shared_intermediate_size=8)
    assert set(layer.state_dict()) == {
        "router.weight", "router.expert_bias",
        "experts.gate_up_proj", "experts.gate_up_proj_bias", "experts.down_proj", "experts.down_proj_bias",
        "shared_expert.gate_up_proj.weight", "shared_expert.gate_up_proj.bias",
        "shared_expert.down_proj.weight", "shared_expert.down_proj.bias",
    }  # fmt: skip
    assert {name: tuple(p.shape) for name, p in make(activation="silu").experts.named_parameters()} == {
        "up_proj": (6, 16, 8),
        "down_proj": (6, 8, 16),
    }
    x = torch.randn(9, 8)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        other.router.weight.data.zero_()
        assert layer.router.weight.any()


def test_initialisation():
    experts = Experts(64, 32, 8, bias=True)
    for name, fan_in in (("gate_up_proj", 64), ("gate_up_proj_bias", 64), ("down_proj", 32), ("down_proj_bias", 32)):
        parameter = getattr(experts, name)
        assert parameter.abs().max() <= fan_in**-0.5
        assert parameter.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)
    router = TopKRouter(64, 256, 2)
    assert router.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05) and not router.expert_bias.any()


def test_fake_and_meta_tensors():
    """Shapes without data; torch's grouped_mm has fake kernels for bfloat16 alone."""
    with FakeTensorMode():
        layer = make(dtype=torch.bfloat16, backend="torch", bias=True, shared_intermediate_size=8)
        x = torch.randn(3, 5, 8, dtype=torch.bfloat16, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == x.grad.shape == (3, 5, 8) and y.dtype == torch.bfloat16
    layer = make(dtype=torch.bfloat16, device="meta", capacity_factor=1.0)
    assert layer(torch.empty(3, 5, 8, dtype=torch.bfloat16, device="meta")).shape == (3, 5, 8)


@pytest.mark.parametrize(
    "options", [{}, {"capacity_factor": 1.0, "balance": "loss", "bias": True, "shared_intermediate_size": 8}]
)
def test_compiles_to_one_graph_in_bfloat16(options):
    layer = make(dtype=torch.bfloat16, **options)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(9, 8, dtype=torch.bfloat16)
    y, aux = compiled(x, return_aux=True)
    expected, other = layer(x, return_aux=True)
    assert torch.equal(y, expected) and torch.equal(aux.expert_load, other.expert_load)
    for grad, plain in zip(grads(layer, y), grads(layer, expected), strict=True):
        assert_close(grad, plain)


def test_signature():
    """The names, order and defaults that callers rely on."""
    parameters = list(inspect.signature(MoE).parameters.values())
    assert [(p.name, p.default) for p in parameters] == [
        *((name, inspect.Parameter.empty) for name in ("hidden_size", "intermediate_size", "num_experts", "top_k")),
        ("activation", "swiglu"), ("bias", False), ("score_function", "sigmoid"), ("normalize_weights", True),
        ("scaling_factor", 1.0), ("num_groups", 1), ("top_groups", 1), ("shared_intermediate_size", 0),
        ("capacity_factor", None), ("balance", None), ("dropout", 0.0), ("backend", "auto"), ("device", None),
        ("dtype", None), ("masked_group_fill", -math.inf),
    ]  # fmt: skip
    assert [p.kind for p in parameters] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 4 + [
        inspect.Parameter.KEYWORD_ONLY
    ] * 15


def test_feed_forward_is_two_linear_layers():
    layer = FeedForward(8, 16, activation="gelu_tanh", bias=True)
    x = torch.randn(3, 8)
    assert_close(layer(x), layer.down_proj(nn.GELU(approximate="tanh")(layer.up_proj(x))))


@pytest.mark.parametrize(
    "message, options",
    [
        ("hidden_size: expected at least 1, got 0", {"hidden": 0}),
        ("intermediate_size: expected at least 1, got -1", {"inner": -1}),
        ("top_k: expected 1 to num_experts = 6, got 7", {"top_k": 7}),
        ("num_groups: expected a divisor of num_experts = 6, got 4", {"num_groups": 4}),
        ("1 of 3 groups hold 2 experts, fewer than top_k = 3", {"num_groups": 3, "top_k": 3}),
        ("activation: expected one of 'swiglu', .* got 'relu'", {"activation": "relu"}),
        ("score_function: expected one of .* got 'tanh'", {"score_function": "tanh"}),
        ("capacity_factor: expected a finite number above 0, got 0", {"capacity_factor": 0}),
        ("capacity_factor: .* finite number above 0, got inf", {"capacity_factor": float("inf")}),
        ("balance: expected None, 'bias', 'loss' or a Balance, such as .*, got 'both'", {"balance": "both"}),
        ("balance: expected None, .*, got {'rate': 0.1}", {"balance": {"rate": 0.1}}),
        ("bias_rate: expected 0 or more, got -1", {"balance": {"bias_rate": -1}}),
        ("bias_rate: expected a finite number, got nan", {"balance": {"bias_rate": float("nan")}}),
        ("scaling_factor: expected a finite number, got nan", {"scaling_factor": float("nan")}),
        ("backend: expected one of .* got 'gpu'", {"backend": "gpu"}),
    ],
)
def test_construction_rejects(message, options):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("name", ["scaling_factor", "capacity_factor", "dropout"])
def test_construction_rejects_what_is_no_number(name):
    with pytest.raises(TypeError, match=f"{name}: expected a number, got '2'"):
        make(**{name: "2"})


def test_a_record_of_another_layer_is_refused():
    layer, other = make(balance="bias"), MoE(8, 8, 1, 1)  # whose one load would be everyone's
    with pytest.raises(ValueError, match=r"aux.expert_load: expected shape \(6,\), got \(1,\)"):
        layer.update_routing_state(other(torch.randn(3, 8), return_aux=True)[1])
    assert not layer.router.expert_bias.any()


def test_forward_rejects():
    layer = make()
    with pytest.raises(ValueError, match=r"x: expected shape \(\.\.\., T, 8\), got \(3, 7\)"):
        layer(torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"x: expected shape \(\.\.\., T, 8\), got \(8,\)"):
        layer(torch.zeros(8))
    with pytest.raises(ValueError, match=r"residual: expected shape \(3, 8\), got \(8,\)"):
        layer(torch.zeros(3, 8), residual=torch.zeros(8))
    with pytest.raises(ValueError, match="bias_rate: expected 0 or more, got -1"):
        Balance(bias_rate=-1)
    with pytest.raises(NotImplementedError, match="experts: there is no 'cuda' backend|'cuda' can't run here"):
        make(backend="cuda")(torch.zeros(3, 8))


def test_buffers_are_float32_whatever_they_were_cast_to_before():
    layer = make().double().bfloat16()
    assert layer.router.expert_bias.dtype == torch.float32 and layer.router.weight.dtype == torch.bfloat16


def test_integers_are_refused():
    for layer in (make(), make(shared_intermediate_size=8)):
        with pytest.raises(TypeError, match="x: expected a floating dtype, got torch.int64"):
            layer(torch.zeros(3, 8, dtype=torch.int64))
        with pytest.raises(TypeError, match="residual: expected a floating dtype, got torch.int64"):
            layer(torch.zeros(3, 8), residual=torch.zeros(3, 8, dtype=torch.int64))


def test_another_kinds_record_is_refused():
    layer = make(balance="bias")
    _, aux = ExpertChoiceMoE(8, 8, 4)(torch.randn(3, 4, 8), return_aux=True)
    for wrong in (aux, [aux]):
        with pytest.raises(TypeError, match="aux: expected MoEAux, or a sequence of them, got ExpertChoiceAux"):
            layer.update_routing_state(wrong)
