"""`RoPEAttention` against its definition in terms of projections and plain attention."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from diffmoe_kernels import RoPEAttention, ops
from diffmoe_kernels.testing import assert_close, poisoned_allocations
from diffmoe_kernels.triton_support import HAS_TRITON

CONFIGS = [
    {"rope": None, "qkv_bias": False},
    {"rope": "1d", "qk_norm": "layernorm"},
    {"rope": "2d", "num_kv_heads": 2},
    {"rope": "2d", "grid_size": (2, 8), "qk_norm": "rmsnorm", "num_kv_heads": 1},
    {"rope": "2d_interleaved", "grid_size": 3, "num_prefix_tokens": 7, "head_dim": 12},
    {"rope": "1d", "num_prefix_tokens": 16},
]


def make(hidden=32, num_heads=4, **options):
    layer = RoPEAttention(hidden, num_heads, **options)
    for name, parameter in layer.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0)
    return layer


def rotated(x, rope, grid):
    """(B, N, H, d) turned as complex numbers."""
    head_dim = x.shape[-1]
    cos, sin = ops.rope_table(rope, head_dim, grid)
    turn = torch.complex(cos, sin).unsqueeze(1)  # (N, 1, d / 2)
    if rope == "2d_interleaved":
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
    halves = x.chunk(2 if rope == "2d" else 1, dim=-1)
    turns = turn.chunk(len(halves), dim=-1)
    out = []
    for half, angle in zip(halves, turns, strict=True):
        both = torch.complex(*half.chunk(2, dim=-1)) * angle
        out += [both.real, both.imag]
    return torch.cat(out, dim=-1)


def plain(layer, x):
    heads, kv_heads, dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
    if hasattr(layer, "qkv"):
        q, k, v = layer.qkv(x).chunk(3, dim=-1)
    else:
        q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    q, k, v = (packed.unflatten(-1, (count, dim)) for packed, count in ((q, heads), (k, kv_heads), (v, kv_heads)))
    if layer.q_norm is not None:
        q, k = layer.q_norm(q), layer.k_norm(k)
    if layer.rope is not None:
        prefix, rest = layer.num_prefix_tokens, x.shape[1] - layer.num_prefix_tokens
        grid = layer.grid_size or (rest if layer.rope == "1d" else (round(rest**0.5), round(rest**0.5)))
        q, k = (torch.cat([p[:, :prefix], rotated(p[:, prefix:], layer.rope, grid)], 1) for p in (q, k))
    k, v = (p.repeat_interleave(heads // kv_heads, dim=2) for p in (k, v))
    out = F.scaled_dot_product_attention(*(p.transpose(1, 2) for p in (q, k, v)))
    return layer.proj(out.transpose(1, 2).flatten(2))


def grads(layer, out):
    return torch.autograd.grad(out, list(layer.parameters()), torch.ones_like(out).cumsum(-1))


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
@pytest.mark.parametrize("config", CONFIGS)
def test_matches_plain_attention(config, backend):
    layer = make(**config, backend=backend)
    x = torch.randn(2, 16, 32)
    with poisoned_allocations():
        y = layer(x)
        ours = grads(layer, y)
    expected = plain(layer, x)
    assert_close(y, expected)
    for (name, parameter), grad, other in zip(layer.named_parameters(), ours, grads(layer, expected), strict=True):
        # A bias of the keys changes no softmax where nothing is rotated: its gradient is rounding alone.
        assert (grad - other).norm() <= 1e-5 * max(other.norm(), parameter.norm()), name
    assert y.shape == x.shape


class Products(TorchDispatchMode):
    """Counts matrix products, and the numbers that are copied beside others."""

    products = copied = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.products += 1
        if function is torch.ops.aten.cat.default:
            self.copied += out.numel()
        return out


@pytest.mark.parametrize("bias", [True, False])
def test_grouped_queries_are_projected_by_one_product(bias):
    layer, x = make(num_kv_heads=1, rope=None, qkv_bias=bias, backend="torch"), torch.randn(8, 64, 32)
    with Products() as seen:
        layer(x)
    assert seen.products == 2  # and the output projection
    assert seen.copied == (32 + bias) * (32 + 2 * 8)  # weights, no activations


class Doubled(nn.Linear):
    """Of an adapter's kind: another class in the place of a projection."""

    def forward(self, x):
        return 2 * super().forward(x)


def scale_weight(layer):
    with torch.no_grad():
        layer.weight *= 2
        layer.bias *= 2


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize("change", ["hook", "pre-hook", "class", "forward"])
def test_what_is_put_on_a_projection_is_heard(change, name):
    layer, x = make(num_kv_heads=2), torch.randn(2, 16, 32)
    doubled, projection = copy.deepcopy(layer), layer.get_submodule(name)
    scale_weight(doubled.get_submodule(name))
    if change == "hook":
        projection.register_forward_hook(lambda module, inputs, out: 2 * out)
    elif change == "pre-hook":
        projection.register_forward_pre_hook(lambda module, inputs: scale_weight(module))
    elif change == "class":
        projection.__class__ = Doubled
    else:
        forward = projection.forward
        projection.forward = lambda x: 2 * forward(x)
    assert_close(layer(x), doubled(x))


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_gradient_hooks_of_a_projection_are_called(kind):
    layer, calls = make(num_kv_heads=2), []
    getattr(layer.k_proj, kind)(lambda module, *grads: calls.append(grads[-1][0].shape))
    layer(torch.randn(2, 16, 32, requires_grad=True)).sum().backward()
    assert calls == [(2, 16, 16)]


def test_a_projection_may_be_the_one_without_a_bias():
    layer, x = make(num_kv_heads=2), torch.randn(2, 16, 32)
    zero = copy.deepcopy(layer)
    nn.init.zeros_(zero.k_proj.bias)
    layer.k_proj.bias = None
    assert_close(layer(x), zero(x))


def test_a_projection_with_weights_of_another_kind_is_called():
    """As quantizing tools make them: of a class that knows linear layers and nothing else."""

    class OnlyLinear(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.cat and args[0][0].ndim == 2:
                raise NotImplementedError("weights side by side")
            return super().__torch_function__(function, types, args, kwargs or {})

    layer, x = make(num_kv_heads=2), torch.randn(2, 16, 32)
    expected = layer(x)
    weight = layer.v_proj.weight.detach().as_subclass(OnlyLinear)
    layer.v_proj.weight = nn.Parameter(weight, requires_grad=False)
    assert_close(layer(x), expected)


@pytest.mark.parametrize("config", CONFIGS[1:5])
def test_gradcheck(config):
    layer = make(
        hidden=8, num_heads=2, dtype=torch.float64, **{**config, "num_kv_heads": config.get("num_kv_heads") and 1}
    )
    x = torch.randn(1, 16, 8, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)


def test_keys_are_the_official_codes():
    assert set(make(qk_norm="layernorm").state_dict()) == {
        f"{name}.{kind}" for name in ("qkv", "proj", "q_norm", "k_norm") for kind in ("weight", "bias")
    }
    assert set(make(qkv_bias=False, num_kv_heads=2, qk_norm="rmsnorm", grid_size=4).state_dict()) == {
        "q_proj.weight", "k_proj.weight", "v_proj.weight", "proj.weight", "proj.bias", "q_norm.weight", "k_norm.weight",
    }  # fmt: skip
    layer = make(num_kv_heads=2, head_dim=12)
    assert layer.q_proj.weight.shape == (48, 32) and layer.k_proj.weight.shape == (24, 32)
    assert make(qk_norm="layernorm").q_norm.eps == 1e-5 and make(qk_norm="rmsnorm").q_norm.eps == 1e-6


@pytest.mark.parametrize("qk_norm", [None, "layernorm", "rmsnorm"])
def test_tables_stay_float32_in_any_cast(qk_norm):
    layer = make(grid_size=4, qk_norm=qk_norm)
    cos = layer._cos.clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        layer.to(dtype)
        assert layer._cos.dtype == layer._sin.dtype == torch.float32 and torch.equal(layer._cos, cos)
        assert torch.equal(layer._cos_float16, cos.half()) and torch.equal(layer._sin_float16, layer._sin.half())
        y = layer(torch.randn(2, 16, 32, dtype=dtype))
        assert y.dtype == dtype and y.isfinite().all()


@pytest.mark.parametrize("grid_size", [4, None])
def test_tables_of_a_known_grid_are_not_cast_at_every_call(grid_size, monkeypatch):
    layer, given = make(grid_size=grid_size), []
    attend = ops.rope_attention
    monkeypatch.setattr(
        ops, "rope_attention", lambda *args, **kw: given.append(kw["float16_tables"]) or attend(*args, **kw)
    )
    layer(torch.randn(2, 16, 32))
    assert given == [None] if grid_size is None else given[0] == (layer._cos_float16, layer._sin_float16)


def test_tools_that_cast_buffers():
    """Behind a module's back, as FSDP does on request: those tables count."""
    layer = make(grid_size=4, backend="triton") if HAS_TRITON else make(grid_size=4)
    layer.to(torch.bfloat16)
    x, unchanged = torch.randn(2, 16, 32).bfloat16(), copy.deepcopy(layer)
    for buffer in layer.buffers():
        buffer.data = buffer.data.to(torch.bfloat16)
    assert_close(layer(x), unchanged(x), dtype=torch.bfloat16, tolerance=3e-2)
    assert layer._float16_tables() is None and unchanged._float16_tables() is not None
    layer.reset_tables()
    assert torch.equal(layer(x), unchanged(x))


def test_autocast():
    layer = make(qk_norm="rmsnorm")
    x = torch.randn(2, 16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, layer(x), dtype=torch.bfloat16, tolerance=3e-2)
    assert all(grad.dtype == torch.float32 for grad in grads(layer, y))


def test_meta_construction_then_loading():
    source = make(grid_size=(2, 8), qk_norm="layernorm")
    with torch.device("meta"):
        layer = make(grid_size=(2, 8), qk_norm="layernorm")
    assert layer._cos.is_meta and layer.qkv.weight.is_meta
    assigned = copy.deepcopy(layer)
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    assigned.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(2, 16, 32)
    assert torch.equal(layer(x), source(x)) and torch.equal(assigned(x), source(x))


def test_copies_and_checkpointing():
    layer = make(grid_size=4)
    x = torch.randn(2, 16, 32)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    again = checkpoint(layer, x, use_reentrant=False)
    assert torch.equal(again, y)
    assert all(torch.equal(*pair) for pair in zip(grads(layer, again), grads(layer, y), strict=True))


def test_grid_size_none_reads_the_grid_off_the_input():
    layer, fixed = make(), make(grid_size=3)
    fixed.load_state_dict(layer.state_dict())
    x = torch.randn(2, 9, 32)
    assert torch.equal(layer(x), fixed(x))
    assert layer(torch.randn(2, 25, 32)).shape == (2, 25, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"grid_size": 4, "qk_norm": "rmsnorm"}, {"num_kv_heads": 2}])
def test_compiles_to_one_graph(options, dtype):
    layer = make(dtype=dtype, **options)
    x = torch.randn(2, 16, 32, dtype=dtype)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert_close(y, layer(x))
    for grad, other in zip(grads(layer, y), grads(layer, layer(x)), strict=True):
        assert (grad - other).norm() <= 1e-2 * other.norm() + 1e-4


@pytest.mark.parametrize("rope", ["1d", "2d", "2d_interleaved"])
@pytest.mark.parametrize("num_prefix_tokens", [0, 3])
def test_compiles_to_one_graph_for_any_length(rope, num_prefix_tokens):
    layer = RoPEAttention(16, 2, rope=rope, num_prefix_tokens=num_prefix_tokens)
    graphs = []
    compiled = torch.compile(layer, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for num_tokens in (16, 9, 25, 36):
        x = torch.randn(2, num_prefix_tokens + num_tokens, 16)
        assert_close(compiled(x), layer(x))
    assert len(graphs) == 2  # the first length's, and that of all others


def test_fake_meta_and_empty_tensors():
    with FakeTensorMode():
        x = torch.randn(2, 16, 32, requires_grad=True)
        make(grid_size=4)(x).sum().backward()
        assert x.grad.shape == x.shape
    assert make(device="meta")(torch.empty(2, 16, 32, device="meta")).shape == (2, 16, 32)
    x = torch.zeros(0, 16, 32, requires_grad=True)
    make()(x).sum().backward()
    assert x.grad.shape == (0, 16, 32)


def test_signature():
    """The names, order and defaults that callers rely on."""
    parameters = list(inspect.signature(RoPEAttention).parameters.values())
    assert [(p.name, p.default) for p in parameters] == [
        ("hidden_size", inspect.Parameter.empty), ("num_heads", inspect.Parameter.empty), ("head_dim", None),
        ("num_kv_heads", None), ("qkv_bias", True), ("qk_norm", None), ("rope", "2d"), ("grid_size", None),
        ("num_prefix_tokens", 0), ("backend", "auto"), ("device", None), ("dtype", None),
    ]  # fmt: skip
    assert [p.kind for p in parameters] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2 + [
        inspect.Parameter.KEYWORD_ONLY
    ] * 10


@pytest.mark.parametrize(
    "message, options",
    [
        ("num_heads: expected at least 1, got 0", {"num_heads": 0}),
        ("num_heads: expected a divisor of hidden_size = 32, got 5", {"num_heads": 5}),
        ("num_kv_heads: expected a divisor of num_heads = 4, got 3", {"num_kv_heads": 3}),
        ("num_kv_heads: expected at least 1, got 0", {"num_kv_heads": 0}),
        ("num_prefix_tokens: expected at least 0, got -1", {"num_prefix_tokens": -1}),
        ("head_dim: expected a multiple of 4 for rope '2d', got 6", {"head_dim": 6}),
        ("head_dim: expected a multiple of 2 for rope '1d', got 5", {"head_dim": 5, "rope": "1d"}),
        ("rope: expected one of '1d', '2d', '2d_interleaved' or None, got 'none'", {"rope": "none"}),
        ("qk_norm: expected one of 'layernorm', 'rmsnorm', got True", {"qk_norm": True}),
        ("backend: expected one of .* got 'flash'", {"backend": "flash"}),
    ],
)
def test_construction_rejects(message, options):
    with pytest.raises(ValueError, match=message):
        RoPEAttention(32, **{"num_heads": 4, **options})


def test_forward_rejects():
    for wrong, told in (
        (None, "tensor, got NoneType"),
        (torch.zeros(2, 16, 32).int(), "floating dtype, got torch.int"),
    ):
        with pytest.raises(TypeError, match=f"x: expected a {told}"):
            make()(wrong)
    with pytest.raises(ValueError, match=r"x: expected shape \(B, N, 32\), got \(2, 16, 8\)"):
        make()(torch.zeros(2, 16, 8))
    with pytest.raises(ValueError, match=r"x: expected 16 tokens for grid_size \(4, 4\) after 2 prefix tokens, got 14"):
        make(grid_size=4, num_prefix_tokens=2)(torch.zeros(2, 16, 32))
    with pytest.raises(ValueError, match="x: expected a square number of tokens for rope '2d', got 15; set grid_size"):
        make()(torch.zeros(2, 15, 32))
    with pytest.raises(ValueError, match="x: expected at least the 2 prefix tokens, got 1"):
        make(num_prefix_tokens=2)(torch.zeros(2, 1, 32))
    with pytest.raises(NotImplementedError, match="rope_attention: there is no 'cuda' backend"):
        make(backend="cuda")(torch.zeros(2, 16, 32))
