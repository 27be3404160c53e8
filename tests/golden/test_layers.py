"""Layers against the official code: values and every gradient."""

from __future__ import annotations

import pytest
import torch

from diffmoe_kernels import MoE, RoPEAttention
from diffmoe_kernels.modules import FeedForward
from models.checkpoint import load_official, official_state_dict
from tests.golden.vectors import Case, assert_grads_match, assert_matches, load_case, official_grads
from tests.ops.backends import TRITON

BACKENDS = ("reference", "torch", TRITON)


def check_layer(case: Case, layer: torch.nn.Module, **arguments) -> None:
    load_official(layer, case.state_dict)
    x = case["input.x"].clone().requires_grad_()
    y = layer(x, **{name: x if value == "x" else value for name, value in arguments.items()})
    (y * case["input.W"]).sum().backward()
    assert_matches(y, case["output.y"], f"{case.name}: y")
    assert_matches(x.grad, case["grad.input.x"], f"{case.name}: gradient of x", 5e-5)
    assert_grads_match(case, official_grads(layer))


def assert_same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name",
    [
        *("attn_1d_hd8", "attn_1d_hd16", "attn_2d_hd8", "attn_2d_hd16", "attn_2d_qknorm"),
        *("attn_none_hd8", "attn_none_hd16", "attn_gqa_1d", "attn_gqa_2d", "attn_gqa_none"),
    ],
)
def test_dsmoe_attention(name: str, backend: str) -> None:
    case = load_case(name)
    options = case.config["ctor"]
    rope = None if options["rope_type"] == "none" else options["rope_type"]
    attention = RoPEAttention(
        options["dim"],
        options["num_heads"],
        num_kv_heads=options["num_heads"] // 2 if options.get("enable_gqa") else None,
        qkv_bias=options["qkv_bias"],
        qk_norm="layernorm" if options.get("qk_norm") else None,
        rope=rope,
        grid_size=4 if rope == "2d" else None,
        backend=backend,
    )
    check_layer(case, attention)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["jit_attn", "jit_attn_incontext"])
def test_jit_attention(name: str, backend: str) -> None:
    case = load_case(name)
    attention = RoPEAttention(
        case.config["dim"],
        case.config["num_heads"],
        qk_norm="rmsnorm",
        rope="2d_interleaved",
        grid_size=case.config["grid"],
        num_prefix_tokens=case.config["num_cls_token"],
        backend=backend,
    )
    check_layer(case, attention)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name",
    [
        *(f"dsmoe_layer_{kind}" for kind in ("g1", "g2", "maskfill", "s0", "top1", "zero_bias")),
        *(f"jit_dsmoe_layer_{kind}" for kind in ("g1", "g2", "s0")),
    ],
)
def test_moe(name: str, backend: str) -> None:
    case = load_case(name)
    options = case.config["ctor"]
    layer = MoE(
        options["hidden_size"],
        options["moe_intermediate_size"],
        options["num_experts"],
        options["num_experts_per_tok"],
        bias=name.startswith("jit"),
        scaling_factor=options["routed_scaling_factor"],
        num_groups=options["n_group"],
        top_groups=options["topk_group"],
        shared_intermediate_size=options["moe_intermediate_size"] if options["use_shared_expert"] else 0,
        masked_group_fill=0.0,
        backend=backend,
    )
    check_layer(case, layer, **({} if options["use_shared_expert"] else {"residual": "x"}))
    assert_same_bits(official_state_dict(layer), case.state_dict)


def test_masked_groups_lose_with_the_sound_fill() -> None:
    """In this case the 0.0 fill lets the masked experts win; -inf must not."""
    case = load_case("dsmoe_layer_maskfill")
    layer = MoE(32, 24, 4, 2, scaling_factor=2.5, num_groups=2, top_groups=1, shared_intermediate_size=24)
    load_official(layer, case.state_dict)
    choice = layer.router(case["input.x"].reshape(-1, 32))
    biased = choice.router_scores + case["buffer.gate.e_score_correction_bias"]
    best_group = biased.view(-1, 2, 2).sum(-1).argmax(-1)
    assert torch.equal(choice.topk_ids // 2, best_group.int()[:, None].expand(-1, 2))
    assert (layer(case["input.x"]) - case["output.y"]).abs().max() > 0.1


def test_swiglu_in_two_slices() -> None:
    """The official MoeMLP computes its width in two slices; an even width is the plain product."""
    case = load_case("moemlp_tp2")
    check_layer(case, FeedForward(32, 48))
