"""`rope_attention` against a loop over heads and tokens, and the properties of the rotation."""

import math

import pytest
import torch
import torch.nn.functional as F

from diffmoe_kernels import RoPEAttention, ops
from diffmoe_kernels.ops.rope_attention.reference import prepare_qkv
from diffmoe_kernels.testing import assert_close, check_accuracy, poisoned_allocations, value_and_grads
from diffmoe_kernels.triton_support import HAS_TRITON

BACKENDS = ("reference", "torch", *(["triton"] if HAS_TRITON else []))
ROPES = ("1d", "2d", "2d_interleaved")


def pair_of(rope, head_dim):
    """(first, second) channel of pair j, as the docstring lists them."""
    half, quarter = head_dim // 2, head_dim // 4
    if rope == "1d":
        return [(j, j + half) for j in range(half)]
    if rope == "2d_interleaved":
        return [(2 * j, 2 * j + 1) for j in range(half)]
    return [(j % quarter + j // quarter * half, j % quarter + j // quarter * half + quarter) for j in range(half)]


def rotated(vector, cos, sin, rope):
    first, second = zip(*pair_of(rope, len(vector)), strict=True)
    a, b = vector[list(first)], vector[list(second)]
    turned = torch.cat([a * cos - b * sin, a * sin + b * cos])
    return turned[torch.tensor(first + second).argsort()]


def normed(vector, kind, weight, bias, eps):
    if kind == "layernorm":
        vector = vector - vector.mean()
    if kind is not None:
        vector = vector / ((vector**2).mean() + eps).sqrt()
    vector = vector if weight is None else vector * weight
    return vector if bias is None else vector + bias


def attention_loop(
    qkv,
    cos=None,
    sin=None,
    rope=None,
    num_kv_heads=None,
    num_prefix_tokens=0,
    qk_norm=None,
    q_norm_weight=None,
    q_norm_bias=None,
    k_norm_weight=None,
    k_norm_bias=None,
    norm_eps=1e-6,
    scale=None,
):
    """(B, N, H + 2 Hkv, d) -> (B, N, H * d), head by head and token by token."""
    num_heads, head_dim = qkv.shape[2] - 2 * num_kv_heads, qkv.shape[3]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale

    def prepared(sample, head, weight, bias):
        vectors = [normed(vector, qk_norm, weight, bias, norm_eps) for vector in sample[:, head]]
        for n in range(num_prefix_tokens, len(vectors) if rope else 0):
            vectors[n] = rotated(
                vectors[n], cos[n - num_prefix_tokens].to(qkv), sin[n - num_prefix_tokens].to(qkv), rope
            )
        return torch.stack(vectors)

    samples = []
    for sample in qkv:
        heads = []
        for head in range(num_heads):
            kv_head = num_heads + head // (num_heads // num_kv_heads)
            q = prepared(sample, head, q_norm_weight, q_norm_bias)
            k = prepared(sample, kv_head, k_norm_weight, k_norm_bias)
            weights = torch.softmax(q @ k.t() * scale, dim=-1)
            heads.append(weights @ sample[:, kv_head + num_kv_heads])
        samples.append(torch.cat(heads, dim=-1))
    return torch.stack(samples)


CONFIGS = [
    {"rope": None},
    {"rope": "1d", "head_dim": 6, "qk_norm": "rmsnorm"},
    {"rope": "2d", "head_dim": 4, "num_kv_heads": 1, "scale": 0.3},
    {"rope": "2d", "head_dim": 8, "num_prefix_tokens": 3, "qk_norm": "layernorm", "norm_eps": 1e-5},
    {"rope": "2d_interleaved", "head_dim": 8, "num_prefix_tokens": 2, "num_kv_heads": 2, "qk_norm": "rmsnorm"},
    {"rope": "1d", "num_tokens": 1, "head_dim": 4},
    {"rope": "2d_interleaved", "head_dim": 64, "num_kv_heads": 1},
    {"rope": "2d", "head_dim": 72},
    {"rope": "1d", "head_dim": 16, "num_kv_heads": 2, "num_tokens": 70, "qk_norm": "layernorm", "num_heads": 4},
]


def make(
    rope=None, head_dim=8, num_heads=4, num_kv_heads=None, num_tokens=6, num_prefix_tokens=0, qk_norm=None, **rest
):
    """(inputs with gradients, options): 6 tokens are a grid of 2 by 3."""
    num_kv_heads = num_kv_heads or num_heads
    inputs = {"qkv": torch.randn(2, num_tokens + num_prefix_tokens, num_heads + 2 * num_kv_heads, head_dim)}
    if qk_norm:
        for name in ["q_norm_weight", "k_norm_weight"] + ["q_norm_bias", "k_norm_bias"] * (qk_norm == "layernorm"):
            inputs[name] = torch.randn(head_dim)
    options = {"rope": rope, "num_kv_heads": num_kv_heads, "num_prefix_tokens": num_prefix_tokens, "qk_norm": qk_norm}
    if rope:
        grid = num_tokens if rope == "1d" else (2, num_tokens // 2)
        options["cos"], options["sin"] = ops.rope_table(rope, head_dim, grid)
    return inputs, options | rest


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", CONFIGS)
def test_value_and_gradients(config, backend):
    inputs, options = make(**config)
    for dtype in (*[torch.float64] * (backend != "triton"), torch.float32, torch.bfloat16, torch.float16):
        with poisoned_allocations():
            check_accuracy(
                lambda **kw: ops.rope_attention(**kw, **options, backend=backend),
                lambda **kw: attention_loop(**kw, **options),
                dtype,
                inputs,
            )


@pytest.mark.parametrize("config", CONFIGS[:5])
def test_gradcheck(config):
    inputs, options = make(**config)
    inputs["qkv"] = inputs["qkv"][:1, :3]
    options["num_prefix_tokens"] = min(options["num_prefix_tokens"], 1)
    if config["rope"]:
        options |= {name: options[name][: 3 - options["num_prefix_tokens"]] for name in ("cos", "sin")}
    leaves = {name: tensor.double().requires_grad_() for name, tensor in inputs.items()}
    for backend in BACKENDS[:2]:
        assert torch.autograd.gradcheck(
            lambda *args, backend=backend: ops.rope_attention(
                **dict(zip(leaves, args, strict=True)), **options, backend=backend
            ),
            tuple(leaves.values()),
            fast_mode=True,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_packings_agree(backend):
    qkv = torch.randn(2, 6, 3, 4, 8)
    tables = ops.rope_table("2d", 8, (3, 2))
    five = ops.rope_attention(qkv, *tables, rope="2d", backend=backend)
    four = ops.rope_attention(qkv.flatten(2, 3), *tables, rope="2d", num_kv_heads=4, backend=backend)
    assert five.shape == (2, 6, 32) and torch.equal(five, four)
    assert torch.equal(five, ops.rope_attention(qkv, *tables, rope="2d", num_kv_heads=4, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_rope_it_is_plain_attention(backend):
    qkv = torch.randn(2, 7, 3, 4, 16)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert_close(ops.rope_attention(qkv, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_heads_equal_repeated_heads(backend):
    q, k, v = torch.randn(2, 6, 4, 8), torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2, 8)
    tables = ops.rope_table("1d", 8, 6)
    grouped = ops.rope_attention(torch.cat([q, k, v], 2), *tables, rope="1d", num_kv_heads=2, backend=backend)
    repeated = torch.stack([q, k[:, :, [0, 0, 1, 1]], v[:, :, [0, 0, 1, 1]]], dim=2)
    assert_close(grouped, ops.rope_attention(repeated, *tables, rope="1d", backend=backend))


@pytest.mark.parametrize("rope", ROPES)
def test_rotation_keeps_norms(rope):
    """With k = q and a huge scale each token attends to itself alone, if all vectors have one norm."""
    q = F.normalize(torch.randn(1, 6, 1, 8), dim=-1)
    v = torch.randn(1, 6, 1, 8)
    cos, sin = ops.rope_table(rope, 8, 6 if rope == "1d" else (2, 3))
    assert_close(cos.square() + sin.square(), torch.ones(6, 4))
    out = ops.rope_attention(torch.stack([q, q, v], 2), cos, sin, rope=rope, scale=1e6)
    assert_close(out, v.flatten(2))


@pytest.mark.parametrize("rope", ROPES)
def test_scores_depend_on_relative_position_alone(rope):
    """Equal tokens everywhere, v = one-hot position: the output holds the softmax weights themselves."""
    rows, columns, head_dim = 4, 4, 16
    num_tokens = rows * columns
    q, k = (torch.randn(head_dim, dtype=torch.float64).expand(1, num_tokens, 1, head_dim) for _ in range(2))
    v = torch.eye(num_tokens, dtype=torch.float64).view(1, num_tokens, 1, head_dim)
    tables = ops.rope_table(rope, head_dim, num_tokens if rope == "1d" else (rows, columns))
    weights = ops.rope_attention(torch.stack([q, k, v], 2), *tables, rope=rope)[0]
    logits = weights.log()

    def offset(n, m):
        return m - n if rope == "1d" else (m // columns - n // columns, m % columns - n % columns)

    seen = {}
    for n in range(num_tokens):
        for m in range(num_tokens):
            # A row of softmax tells scores up to a constant: take the score against the token itself.
            seen.setdefault(offset(n, m), []).append((logits[n, m] - logits[n, n]).item())
    assert all(max(values) - min(values) < 1e-6 for values in seen.values())
    assert len({round(values[0], 6) for values in seen.values()}) == len(seen)


@pytest.mark.parametrize("rope", ROPES)
def test_prefix_tokens_are_not_rotated(rope):
    """Where the other keys are zero, which no rotation changes, prefix queries see plain attention."""
    qkv = torch.randn(1, 3 + 4, 3, 2, 8)
    qkv[:, 3:, 1] = 0
    tables = ops.rope_table(rope, 8, 4 if rope == "1d" else 2)
    turned = ops.rope_attention(qkv, *tables, rope=rope, num_prefix_tokens=3)
    still = ops.rope_attention(qkv)
    assert_close(turned[:, :3], still[:, :3])
    assert (turned[:, 4:] - still[:, 4:]).abs().max() > 1e-2  # the other queries did turn


def test_rope_table_1d():
    cos, sin = ops.rope_table("1d", 6, 5)
    for n in range(5):
        for j in range(3):
            angle = n * 10000 ** (-2 * j / 6)
            assert cos[n, j].item() == pytest.approx(math.cos(angle), abs=1e-6)
            assert sin[n, j].item() == pytest.approx(math.sin(angle), abs=1e-6)
    assert torch.equal(ops.rope_table("1d", 6, (2, 3))[0], ops.rope_table("1d", 6, 6)[0])


@pytest.mark.parametrize("rope", ["2d", "2d_interleaved"])
def test_rope_table_2d_of_a_rectangle(rope):
    rows, columns, head_dim = 2, 3, 8
    cos, sin = ops.rope_table(rope, head_dim, (rows, columns), base=100.0)
    assert cos.shape == sin.shape == (6, 4) and cos.dtype == torch.float32
    for n in range(6):
        for j in range(4):
            position = n // columns if j < 2 else n % columns
            angle = position * 100 ** (-4 * (j % 2) / head_dim)
            assert cos[n, j].item() == pytest.approx(math.cos(angle), abs=1e-6)
            assert sin[n, j].item() == pytest.approx(math.sin(angle), abs=1e-6)
    assert torch.equal(ops.rope_table(rope, 8, 3)[0], ops.rope_table(rope, 8, (3, 3))[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    inputs, options = make(rope="2d", qk_norm="layernorm")
    run = lambda **kw: ops.rope_attention(**kw, **options, backend=backend)  # noqa: E731
    expected = value_and_grads(run, **inputs)
    for name, tensor in inputs.items():
        moved = torch.stack([tensor, tensor * torch.nan], dim=-1)[..., 0]
        for key, value in value_and_grads(run, **{**inputs, name: moved}).items():
            assert_close(value, expected[key], name=f"{key}, {name} moved")
    qkv = inputs["qkv"].transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(run(**{**inputs, "qkv": qkv}), expected["output"])
    leaf = torch.randn(1, 1, 1, 8).expand(2, 6, 12, 8).requires_grad_()
    run(qkv=leaf).sum().backward()  # a gradient of stride 0
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_softmax_and_norms_stay_float32(backend):
    """Under autocast and in bfloat16 alike; tables and norm weights may be float32."""
    inputs, options = make(rope="2d", qk_norm="rmsnorm", head_dim=64)
    low = ops.rope_attention(**{**inputs, "qkv": inputs["qkv"].bfloat16()}, **options, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        cast = ops.rope_attention(**inputs, **options, backend=backend)
    assert low.dtype == cast.dtype == torch.bfloat16 and torch.equal(low, cast)
    if backend == "reference":
        rounded = {**inputs, "qkv": inputs["qkv"].bfloat16().float()}
        assert torch.equal(low, ops.rope_attention(**rounded, **options, backend=backend).bfloat16())


def test_no_samples():
    assert ops.rope_attention(torch.zeros(0, 6, 3, 2, 8)).shape == (0, 6, 16)


QKV, TABLE = torch.zeros(2, 6, 3, 4, 8), torch.zeros(6, 4)
PACKED = QKV.flatten(2, 3)


@pytest.mark.parametrize(
    "error, message, qkv, options",
    [
        (TypeError, "qkv: expected a floating dtype, got torch.int64", QKV.long(), {}),
        (ValueError, r"qkv: expected shape \(B, N, 3, H, d\), got \(2, 6, 2, 4, 8\)", QKV[:, :, :2], {}),
        (ValueError, r"qkv: expected shape \(B, N, H \+ 2 \* num_kv_heads, d\), got \(6, 12, 8\)", PACKED[0], {}),
        (ValueError, "num_kv_heads: expected 4 for qkv .*, got 2", QKV, {"num_kv_heads": 2}),
        (ValueError, "num_kv_heads: expected a number for qkv of 4 dimensions, got None", PACKED, {}),
        (ValueError, "num_kv_heads: expected a divisor of .* 12, got 5", PACKED, {"num_kv_heads": 5}),
        (ValueError, "num_kv_heads: expected a divisor of .* 12, got 0", PACKED, {"num_kv_heads": 0}),
        (ValueError, "num_kv_heads: expected a divisor of .* 12, got 6", PACKED, {"num_kv_heads": 6}),
        (ValueError, "num_prefix_tokens: expected 0 to 6, the tokens, got 7", QKV, {"num_prefix_tokens": 7}),
        (ValueError, "num_prefix_tokens: expected 0 to 6, the tokens, got -1", QKV, {"num_prefix_tokens": -1}),
        (ValueError, "cos: expected a table for rope '1d', got None; see rope_table", QKV, {"rope": "1d"}),
        (ValueError, "sin: expected a table for rope '1d', got None", QKV, {"rope": "1d", "cos": TABLE}),
        (
            ValueError,
            r"cos: expected shape \(5, 4\), got \(6, 4\)",
            QKV,
            {"rope": "2d", "num_prefix_tokens": 1, "cos": TABLE, "sin": TABLE},
        ),
        (ValueError, "rope: expected one of '1d', '2d', '2d_interleaved' or None, got '3d'", QKV, {"rope": "3d"}),
        (ValueError, "head_dim: expected a multiple of 4 for rope '2d', got 6", QKV[..., :6], {"rope": "2d"}),
        (ValueError, "head_dim: expected a multiple of 4 for rope '2d', got 7", QKV[..., :7], {"rope": "2d"}),
        (ValueError, "head_dim: expected a multiple of 2 for rope '1d', got 7", QKV[..., :7], {"rope": "1d"}),
        (ValueError, "qk_norm: expected one of 'layernorm', 'rmsnorm', got 'l2'", QKV, {"qk_norm": "l2"}),
        (
            ValueError,
            r"q_norm_weight: expected shape \(8,\), got \(4, 8\)",
            QKV,
            {"qk_norm": "rmsnorm", "q_norm_weight": torch.zeros(4, 8)},
        ),
        (
            ValueError,
            r"k_norm_bias: expected shape \(8,\), got \(4,\)",
            QKV,
            {"qk_norm": "layernorm", "k_norm_bias": torch.zeros(4)},
        ),
        (
            ValueError,
            "different devices: qkv on cpu, cos on meta",
            QKV,
            {"rope": "1d", "cos": TABLE.to("meta"), "sin": TABLE},
        ),
        (
            NotImplementedError,
            "rope_attention: there is no 'cuda' backend; this op has .*'torch', 'reference'",
            QKV,
            {"backend": "cuda"},
        ),
    ],
)
def test_rejects_bad_input(error, message, qkv, options):
    with pytest.raises(error, match=message):
        ops.rope_attention(qkv, **options)


def test_rope_table_rejects_bad_input():
    with pytest.raises(ValueError, match="rope: expected one of '1d', '2d', '2d_interleaved' or None, got 'none'"):
        ops.rope_table("none", 8, 4)
    with pytest.raises(ValueError, match="head_dim: expected a multiple of 4 for rope '2d_interleaved', got 2"):
        ops.rope_table("2d_interleaved", 2, 4)


def test_tables_without_a_pairing_are_refused() -> None:
    cos, sin = ops.rope_table("1d", 8, 4)
    with pytest.raises(ValueError, match="rope: expected the name of a pairing beside cos and sin, got None"):
        ops.rope_attention(torch.zeros(1, 4, 3, 2, 8), cos, sin)


def test_float16_tables_of_another_kind_are_refused() -> None:
    qkv, (cos, sin) = torch.zeros(1, 4, 3, 2, 8), ops.rope_table("1d", 8, 4)
    for tables, error, message in (
        ((cos, sin), TypeError, "float16_cos: expected torch.float16, got torch.float32"),
        ((cos.half(), None), TypeError, "float16_sin: expected a tensor, got NoneType"),
        ((cos.half(), sin.half()[:3]), ValueError, r"float16_sin: expected shape \(4, 4\), got \(3, 4\)"),
        ((cos.half(),), TypeError, "float16_tables: expected a tuple of two tensors, got tuple"),
        (torch.stack([cos, sin]).half(), TypeError, "float16_tables: expected a tuple of two tensors, got Tensor"),
    ):
        with pytest.raises(error, match=message):
            ops.rope_attention(qkv, cos, sin, rope="1d", float16_tables=tables)
    with pytest.raises(ValueError, match="float16_tables: expected cos and sin beside them"):
        ops.rope_attention(qkv, float16_tables=(cos.half(), sin.half()))


def test_arguments_that_would_be_ignored_or_truncated_are_refused() -> None:
    qkv, (cos, sin) = torch.zeros(1, 4, 3, 2, 8), ops.rope_table("1d", 8, 4)
    with pytest.raises(ValueError, match="qk_norm: expected the norm that q_norm_weight belongs to, got None"):
        ops.rope_attention(qkv, q_norm_weight=torch.ones(8))
    with pytest.raises(TypeError, match="norm_eps: expected a number, got None"):
        ops.rope_attention(torch.zeros(1, 4, 3, 2, 8), qk_norm="rmsnorm", norm_eps=None)
    with pytest.raises(TypeError, match="cos: expected a floating dtype"):
        ops.rope_attention(qkv, cos.long(), sin, rope="1d")
    x, vector = torch.zeros(1, 4, 8), torch.zeros(1, 8)
    with pytest.raises(TypeError, match="shift: expected a floating dtype"):
        ops.adaln(x, vector.long(), vector)
    with pytest.raises(TypeError, match="y: expected a floating dtype"):
        ops.gated_residual(x, x.long(), vector)


def test_what_is_neither_normalised_nor_rotated_is_not_copied():
    """SDPA gets views of the packed projection in its own dtype."""
    qkv = torch.randn(2, 9, 12, 8, dtype=torch.bfloat16)
    norms = {"qk_norm": None, "q_norm": (None, None), "k_norm": (None, None), "norm_eps": 1e-6}
    plain = prepare_qkv(qkv, None, None, 4, rope=None, num_prefix_tokens=0, **norms)
    assert all(one.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr() for one in plain)
    tables = ops.rope_table("2d", 8, 3)
    *_, v = prepare_qkv(qkv, *tables, 4, rope="2d", num_prefix_tokens=0, **norms)
    assert v.dtype == torch.bfloat16


@pytest.mark.parametrize("rope", ["1d", "2d"])
@pytest.mark.parametrize("grid", [-1, (4,), (4, 4, 4), (4, -4)])
def test_grids_that_are_none(rope, grid):
    for make in (lambda: ops.rope_table(rope, 16, grid), lambda: RoPEAttention(16, 1, rope=rope, grid_size=grid)):
        with pytest.raises(ValueError, match="grid_size: expected one or two sizes of 0 or more, got"):
            make()
    with pytest.raises(TypeError, match="grid_size: expected integers, got 2.5"):
        ops.rope_table(rope, 16, 2.5)
