"""Embeddings, tables, norms and MLPs against the official code."""

from __future__ import annotations

import pytest
import torch

from diffmoe_kernels import ops
from diffmoe_kernels.modules import FeedForward
from diffmoe_kernels.ops.rope_attention.reference import rotate
from models.checkpoint import load_official
from models.layers import FinalLayer, Mlp, Stream, sincos_table, timestep_embedding, timestep_frequencies
from tests.golden.vectors import assert_matches, load_case


@pytest.fixture(scope="module")
def case():
    return load_case("components")


@pytest.mark.parametrize("dim", [8, 256])
def test_timestep_embedding(case, dim) -> None:
    t, expected = case["input.t"], case[f"output.timestep_embedding.{dim}"]
    actual = timestep_embedding(t, timestep_frequencies(dim))
    assert_matches(actual[t < 999], expected[t < 999], "timestep embedding")
    # exp differs by an ulp between CPUs (MKL's code paths), which moves an angle near 999 by its spacing.
    assert (actual - expected).abs().max() <= torch.tensor(999.0).nextafter(torch.tensor(1e9)) - 999.0


@pytest.mark.parametrize(("dim", "side"), [(48, 4), (32, 3)])
def test_sincos_table(case, dim, side) -> None:
    assert torch.equal(sincos_table(dim, side), case[f"output.sincos.d{dim}_g{side}"].float())


@pytest.mark.parametrize("dim", [8, 16])
def test_rope_table_1d(case, dim) -> None:
    for table, name in zip(ops.rope_table("1d", dim, 16), ("cos", "sin"), strict=True):
        assert_matches(table.repeat(1, 2), case[f"output.rope1d.d{dim}_n16.{name}"], name)


@pytest.mark.parametrize("dim", [8, 16])
def test_rope_table_2d(case, dim) -> None:
    """The official tables are of one axis of heads of twice ``dim`` or of ``dim``; row (y) first."""
    official_dim = case[f"output.rope2d.d{dim}_g4.cos_y"].shape[1]
    for table, name in zip(ops.rope_table("2d", 2 * official_dim, 4), ("cos", "sin"), strict=True):
        by_row, by_column = table.chunk(2, dim=1)
        assert_matches(by_row.repeat(1, 2), case[f"output.rope2d.d{dim}_g4.{name}_y"], f"{name} by row")
        assert_matches(by_column.repeat(1, 2), case[f"output.rope2d.d{dim}_g4.{name}_x"], f"{name} by column")


@pytest.mark.parametrize(("dim", "prefix"), [(12, 0), (16, 4)])
def test_interleaved_rotation(case, dim, prefix) -> None:
    name = f"jitrope.hd{dim}_g4_c{prefix}"
    cos, sin = ops.rope_table("2d_interleaved", dim, 4)
    for table, kind in ((cos, "cos"), (sin, "sin")):
        assert_matches(table.repeat_interleave(2, dim=1), case[f"output.{name}.{kind}"][prefix:], kind)
    q = case[f"input.{name}.q"].transpose(1, 2)  # (B, N, H, d)
    rotated = torch.cat([q[:, :prefix], rotate(q[:, prefix:], cos, sin, "2d_interleaved")], dim=1)
    assert_matches(rotated.transpose(1, 2), case[f"output.{name}.q"], "rotated q")


@pytest.mark.parametrize("name", ["dsmoe", "jit"])
def test_rmsnorm(case, name) -> None:
    x = case["input.norm.x"]
    zeros = torch.zeros(x.shape[0], x.shape[2])
    actual = ops.adaln(x, zeros, zeros, weight=case["param.rmsnorm.weight"], norm="rmsnorm")
    assert_matches(actual, case[f"output.rmsnorm.{name}"], "rmsnorm")


def test_jit_final_layer(case) -> None:
    """JiT's final layer: a weighted RMSNorm behind the modulation."""
    parameters = case.group("param.final_layer_jit")
    modulation = torch.nn.functional.silu(case["input.c"]) @ parameters["adaLN_modulation.1.weight"].T
    shift, scale = (modulation + parameters["adaLN_modulation.1.bias"]).chunk(2, dim=1)
    h = ops.adaln(case["input.norm.x"], shift, scale, weight=parameters["norm_final.weight"], norm="rmsnorm")
    actual = torch.nn.functional.linear(h, parameters["linear.weight"], parameters["linear.bias"])
    assert_matches(actual, case["output.final_layer_jit"], "JiT's final layer")


def test_final_layer(case) -> None:
    layer = FinalLayer(24, 2, 8)
    layer.load_state_dict(case.group("param.final_layer_dsmoe"))
    actual = layer(Stream(case["input.norm.x"]), case["input.c"])
    assert_matches(actual, case["output.final_layer_dsmoe"], "final layer")


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("mlp_gelu_tanh", lambda: Mlp(24, 48, "gelu_tanh")),
        ("mlp_silu_dsmoe_dense", lambda: Mlp(24, 48, "silu")),
        ("swiglu_dsmoe_expert", lambda: FeedForward(24, 24)),
        ("swiglu_jit_expert", lambda: FeedForward(24, 24, bias=True)),
        ("swiglu_jit_dense", lambda: FeedForward(24, 64, bias=True)),
    ],
)
def test_mlp(case, name, layer) -> None:
    layer = load_official(layer(), case.group(f"param.{name}"))
    assert_matches(layer(case["input.norm.x"]), case[f"output.{name}"], name)
