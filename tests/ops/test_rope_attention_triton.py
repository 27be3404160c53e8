"""The attention kernels: lengths and widths of heads, large scores, schemas, compilation, memory, determinism."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from diffmoe_kernels import RoPEAttention, ops
from diffmoe_kernels.ops.rope_attention.reference import prepare_qkv
from diffmoe_kernels.testing import assert_close, check_accuracy, poisoned_allocations
from diffmoe_kernels.triton_support import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")


def inputs_of(
    num_tokens: int, head_dim: int, *, rope: str | None = "2d", norm: str | None = None, prefix: int = 0, heads: int = 2
):
    """qkv of one sample, so many query heads on one kv head; any angles are a table."""
    inputs = {"qkv": torch.randn(1, num_tokens, heads + 2, head_dim)}
    options = {"rope": rope, "num_kv_heads": 1, "qk_norm": norm, "num_prefix_tokens": prefix}
    if rope:
        angles = torch.rand(num_tokens - prefix, head_dim // 2) * 6
        options |= {"cos": angles.cos(), "sin": angles.sin()}
    if norm:
        inputs |= {"q_norm_weight": torch.randn(head_dim), "k_norm_weight": torch.randn(head_dim)}
    return inputs, options


def plain_attention(qkv, cos=None, sin=None, *, num_kv_heads, q_norm_weight=None, k_norm_weight=None, **options):
    """What anyone would write: norms, rotation and softmax in float32, products in qkv's dtype."""
    options |= {"q_norm": (q_norm_weight, None), "k_norm": (k_norm_weight, None), "norm_eps": 1e-6}
    q, k, v = prepare_qkv(qkv, cos, sin, qkv.shape[2] - 2 * num_kv_heads, **options)
    k, v = (one.repeat_interleave(q.shape[2] // num_kv_heads, dim=2) for one in (k, v))
    q, k, v = (one.to(qkv.dtype).transpose(1, 2) for one in (q, k, v))
    scores = (q @ k.mT).to(torch.promote_types(qkv.dtype, torch.float32)) * q.shape[3] ** -0.5
    return (scores.softmax(-1).to(qkv.dtype) @ v).transpose(1, 2).flatten(2)


def check(inputs: dict, options: dict, *dtypes: torch.dtype) -> None:
    """At most twice the error of plain PyTorch in the same dtype."""
    for dtype in dtypes:
        with poisoned_allocations():
            check_accuracy(
                lambda **kw: ops.rope_attention(**kw, **options, backend="triton"),
                lambda **kw: plain_attention(**kw, **options),
                dtype,
                inputs,
            )


def test_float16_tables_are_what_bfloat16_is_turned_by():
    inputs, options = inputs_of(20, 32)
    halves = options["cos"].half(), options["sin"].half()
    straight = torch.ones_like(halves[0]), torch.zeros_like(halves[0])

    def attend(dtype, backend="triton", **more):
        return ops.rope_attention(inputs["qkv"].to(dtype), **options, **more, backend=backend)

    low = attend(torch.bfloat16)
    assert torch.equal(low, attend(torch.bfloat16, float16_tables=halves))
    assert not torch.equal(low, attend(torch.bfloat16, float16_tables=straight))
    for dtype, backend in ((torch.float32, "triton"), (torch.bfloat16, "torch"), (torch.bfloat16, "reference")):
        assert torch.equal(attend(dtype, backend), attend(dtype, backend, float16_tables=straight)), "the float32 ones"


@pytest.mark.parametrize("num_tokens", [1, 17, 255, 288])
def test_lengths(num_tokens):
    heads = 2 if num_tokens < 100 else 1
    inputs, options = inputs_of(num_tokens, 32, norm="rmsnorm", prefix=min(num_tokens, 3), heads=heads)
    check(inputs, options, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("rope", ["1d", "2d", "2d_interleaved", None])
@pytest.mark.parametrize("head_dim", [8, 32, 64, 72, 96, 128])
def test_widths_of_heads(head_dim, rope):
    check(*inputs_of(66, head_dim, rope=rope, norm="layernorm" if rope == "1d" else None), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_tokens", "head_dim", "norm"),
    [
        *((1, 32, None), (17, 64, "rmsnorm"), (70, 32, "layernorm"), (255, 32, None), (288, 16, "rmsnorm")),
        *((66, 72, None), (66, 96, "rmsnorm"), (66, 128, None)),
    ],
)
def test_error_is_at_most_twice_that_of_sdpa(num_tokens, head_dim, norm, dtype):
    """Against float64, in value and all gradients: `backend="torch"` rotates and normalises around SDPA."""
    inputs, options = inputs_of(num_tokens, head_dim, norm=norm, heads=2 if num_tokens < 100 else 1)
    triton, sdpa = (partial(ops.rope_attention, **options, backend=backend) for backend in ("triton", "torch"))
    check_accuracy(triton, sdpa, dtype, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_keys_whose_scores_are_minus_infinity_weigh_nothing(dtype):
    qkv = torch.randn(1, 200, 3, 1, 16, dtype=dtype)
    qkv[:, :, 0] = 1e20
    qkv[:, :150, 1] = -1e20  # products below float32's range; the first blocks hold nothing else
    qkv[:, 150:, 1] = 1e-20
    results = [ops.rope_attention(qkv, backend=backend) for backend in ("triton", "reference")]
    assert results[1].isfinite().all()
    assert_close(*results, tolerance=1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 30), (torch.float32, 1e4), (torch.bfloat16, 1e4)])
def test_huge_scores_stay_finite(dtype, factor):
    """One token's query and key are so long that exp of its scores overflows."""
    inputs, options = inputs_of(40, 32)
    inputs["qkv"][:, 7, :3] *= factor
    qkv = inputs["qkv"].to(dtype).requires_grad_()
    results = {}
    for backend in ("triton", "torch"):
        y = ops.rope_attention(qkv, **options, backend=backend)
        results[backend] = y, *torch.autograd.grad(y.float().square().sum(), qkv)
    for ours, theirs in zip(*results.values(), strict=True):
        assert ours.isfinite().all()
        if factor == 30:  # with more, which key wins is a matter of rounding
            assert_close(ours, theirs, tolerance=1e-4)


def test_a_norm_of_q_alone():
    inputs, options = inputs_of(20, 16, norm="rmsnorm")
    del inputs["k_norm_weight"]
    check(inputs, options, torch.float32)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_norms_without_weights_or_epsilon(norm):
    """Rows past the last token have no deviation to divide by."""
    inputs, options = inputs_of(20, 16, norm=norm)
    for backend in ("triton", "reference"):
        qkv = inputs["qkv"].clone().requires_grad_()
        y = ops.rope_attention(qkv, **options, norm_eps=0.0, backend=backend)
        (grad,) = torch.autograd.grad(y.square().sum(), qkv)
        if backend == "triton":
            ours = y, grad
    assert_close(ours[0], y, tolerance=1e-5)
    assert_close(ours[1], grad, tolerance=1e-5)


@pytest.mark.parametrize("names", [["q_norm_bias"], ["k_norm_weight", "q_norm_bias"], ["q_norm_weight"]])
def test_weights_of_norms_in_float32(names):
    """As a bfloat16 activation meets them under autocast, some of them left out."""
    inputs, options = inputs_of(20, 16, norm="layernorm")
    weights = {name: 1 + 0.1 * torch.randn(16) for name in names}
    results = {}
    for backend in ("triton", "reference"):
        leaves = {"qkv": inputs["qkv"].bfloat16(), **weights}
        leaves = {name: one.clone().requires_grad_() for name, one in leaves.items()}
        y = ops.rope_attention(**leaves, **options, backend=backend)
        results[backend] = y, *torch.autograd.grad(y.float().square().sum(), list(leaves.values()))
    for ours, right in zip(*results.values(), strict=True):
        assert_close(ours, right, tolerance=2e-2)


def test_a_scale_that_float16_has_no_room_for():
    qkv = torch.ones(1, 4, 3, 1, 8, dtype=torch.float16) * 1e-3
    qkv[:, :, 0] = 5e4
    with pytest.raises(NotImplementedError, match="a scale of at most ln 2 in float16, not 1.0"):
        ops.rope_attention(qkv, scale=1.0, backend="triton")
    assert ops.rope_attention(qkv, scale=0.5, backend="triton").isfinite().all()


def test_tables_that_ask_for_a_gradient_under_no_grad():
    inputs, options = inputs_of(20, 16)
    tables = {name: options[name].clone().requires_grad_() for name in ("cos", "sin")}
    with pytest.raises(NotImplementedError, match="no gradient with respect to cos"):
        ops.rope_attention(**inputs, **{**options, **tables}, backend="triton")
    with torch.no_grad():
        ours = ops.rope_attention(**inputs, **{**options, **tables}, backend="triton")
    assert torch.equal(ours, ops.rope_attention(**inputs, **options, backend="triton"))


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("has_norm", [False, True])
def test_opcheck(has_norm):
    library = pytest.importorskip("diffmoe_kernels.ops.rope_attention._library")
    qkv = torch.randn(2, 9, 12, 16, requires_grad=True)
    norms = [torch.randn(16, requires_grad=True) for _ in range(4)] if has_norm else [None] * 4
    tables = ops.rope_table("2d", 16, 3)
    options = (4, "2d", 0, "layernorm" if has_norm else "none", 1e-6, 0.25, True)
    arguments = (qkv, *norms, *tables, *options)
    torch.library.opcheck(library._rope_attention.overload, arguments, test_utils=CHECKS)
    with torch.no_grad():
        out, lse = library._rope_attention(*arguments)
        arguments = (torch.randn_like(out), qkv, *norms, *tables, out, lse, *options[:-1])
    arguments = [one.detach() if isinstance(one, torch.Tensor) else one for one in arguments]
    torch.library.opcheck(library._rope_attention_backward.overload, arguments, test_utils=CHECKS)


def layer_of(**options: object) -> RoPEAttention:
    torch.manual_seed(0)
    return RoPEAttention(32, 2, qk_norm="rmsnorm", backend="triton", **options)


def results(function, layer: RoPEAttention, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(2, 16, 32, dtype=dtype, requires_grad=True)
    y = function(x)
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_layer_compiles_to_one_graph(backend):
    layer = layer_of(grid_size=4)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for one, other in zip(results(compiled, layer), results(layer, layer), strict=True):
        assert_close(one, other, tolerance=1e-5)


def test_recomputed_and_repeated_runs_have_the_same_bits():
    layer = layer_of()
    plain = results(layer, layer)
    for function in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        assert all(torch.equal(one, other) for one, other in zip(results(function, layer), plain, strict=True))


def test_autocast():
    layer = layer_of()

    def low(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    ours, full = results(low, layer), results(layer, layer)
    assert ours[0].dtype == torch.bfloat16 and ours[1].dtype == torch.float32
    for one, other in zip(ours, full, strict=True):
        assert_close(one, other, dtype=one.dtype, tolerance=3e-2)


def test_what_is_kept_for_the_backward():
    """The packed projection, the output, one number a query and head, and the tables."""
    qkv = torch.randn(2, 9, 3, 4, 16, dtype=torch.bfloat16, requires_grad=True)
    cos, sin = ops.rope_table("2d", 16, 3)
    kept: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        y = ops.rope_attention(qkv, cos, sin, rope="2d", backend="triton")
    own = {qkv.data_ptr(), y.data_ptr()}
    shapes = sorted((tuple(t.shape), t.dtype) for pointer, t in kept.items() if pointer not in own)
    assert shapes == [((2, 4, 9), torch.float32), ((9, 8), torch.float16), ((9, 8), torch.float16)]


def test_nothing_is_written_for_a_backward_that_is_not_to_come(monkeypatch):
    library = pytest.importorskip("diffmoe_kernels.ops.rope_attention._library")
    attend, asked = library.rope_attention_fwd, []
    monkeypatch.setattr(
        library,
        "rope_attention_fwd",
        lambda *args, keep_lse: asked.append(keep_lse) or attend(*args, keep_lse=keep_lse),
    )
    qkv = torch.randn(1, 4, 3, 1, 16, requires_grad=True)
    ops.rope_attention(qkv, backend="triton")
    with torch.no_grad():
        ops.rope_attention(qkv, backend="triton")
    ops.rope_attention(qkv.detach(), backend="triton")
    assert asked == [True, False, False]


def test_a_second_derivative_is_refused():
    qkv = torch.randn(1, 4, 3, 1, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.rope_attention(qkv, backend="triton").square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered|does not require grad"):
        torch.autograd.grad(grad.sum(), qkv)


@pytest.mark.parametrize(
    ("reason", "qkv", "options"),
    [
        ("up to 128 channels a head, not 136", torch.zeros(1, 4, 3, 1, 136), {}),
        ("up to 65535 samples, not 65536", torch.zeros(65536, 1, 3, 1, 2), {}),
        ("an even number of channels a head, not 7", torch.zeros(1, 4, 3, 1, 7), {}),
        ("not torch.float64", torch.zeros(1, 4, 3, 1, 8, dtype=torch.float64), {}),
        (
            "no gradient with respect to cos",
            torch.zeros(1, 4, 3, 1, 8),
            {"cos": torch.ones(4, 4, requires_grad=True)},
        ),
    ],
)
def test_says_why_it_cannot_run(reason, qkv, options):
    tables = {"rope": "1d", "sin": torch.zeros(4, 4), **options} if options else {}
    with pytest.raises(NotImplementedError, match=f"rope_attention: backend 'triton' can't run here: .*{reason}"):
        ops.rope_attention(qkv, **tables, backend="triton")
    assert ops.rope_attention(qkv, **tables).isfinite().all()  # "auto" takes another
