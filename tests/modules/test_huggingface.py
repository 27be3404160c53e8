"""`ops.experts` as an experts implementation of transformers, on a tiny randomly initialised model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffmoe_kernels.huggingface import experts_forward, register_experts
from diffmoe_kernels.testing import assert_close
from diffmoe_kernels.triton_support import HAS_TRITON

transformers = pytest.importorskip("transformers")
BACKENDS = ["auto", "reference", *(["triton"] if HAS_TRITON else [])]


def tiny(**options) -> nn.Module:
    """A Qwen3-MoE of two layers, with 6 experts of which a token takes 2."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2, num_experts=6, num_experts_per_tok=2, **options,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config).train()


def run(model: nn.Module, implementation: str) -> dict[str, torch.Tensor]:
    model.set_experts_implementation(implementation)
    model.zero_grad()
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    output = model(input_ids=tokens, labels=tokens)
    output.loss.backward()
    return {"logits": output.logits.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_computes_the_same(backend):
    model = tiny()
    expected = run(model, "eager")
    register_experts("diffmoe-test", backend=backend)
    for name, value in run(model, "diffmoe-test").items():
        assert_close(value, expected[name], tolerance=1e-5, name=name)


def test_a_model_asks_for_it_by_name_when_built():
    register_experts()
    model = transformers.AutoModelForCausalLM.from_config(tiny().config, experts_implementation="diffmoe")
    assert model.config._experts_implementation == "diffmoe"
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


class Experts(SimpleNamespace):
    """The flags and weights that transformers' decorator leaves on an experts module."""


def module(kind: type = Experts, **changes) -> Experts:
    flags = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    weights = {"gate_up_proj": torch.randn(3, 16, 4), "down_proj": torch.randn(3, 4, 8)}
    return kind(**{**flags, "has_post_expert_norm": False, "act_fn": nn.SiLU(), **weights, **changes})


@pytest.fixture(autouse=True)
def default_gate():
    from transformers.integrations.moe import _default_apply_gate

    Experts._apply_gate = _default_apply_gate


def test_choices_of_another_rank_add_nothing():
    experts, x = module(), torch.randn(5, 4)
    ids, weights = torch.tensor([[0, 1], [2, 3], [3, 3], [1, 3], [0, 2]]), torch.rand(5, 2)
    ours = experts_forward(experts, x, ids, weights)
    kept = weights * (ids < 3)
    assert_close(ours, experts_forward(experts, x, ids.clamp(max=2), kept), tolerance=1e-6)
    assert not ours[2].any()


def test_older_versions_lack_the_flags_of_what_they_did_not_have():
    experts, inputs = module(), (torch.randn(5, 4), torch.randint(3, (5, 2)), torch.rand(5, 2))
    expected = experts_forward(experts, *inputs)
    for flag in ("has_post_expert_norm", "is_concatenated", "has_gate"):
        delattr(experts, flag)
        assert torch.equal(experts_forward(experts, *inputs), expected)


def test_silu_may_be_a_function():
    inputs = torch.randn(5, 4), torch.randint(3, (5, 2)), torch.rand(5, 2)
    experts = module()
    expected = experts_forward(experts, *inputs)
    experts.act_fn = nn.functional.silu
    assert torch.equal(experts_forward(experts, *inputs), expected)


def test_ungated_experts_with_biases():
    x, ids, weights = torch.randn(5, 4), torch.randint(3, (5, 1)), torch.rand(5, 1)
    up, down, up_bias, down_bias = torch.randn(3, 8, 4), torch.randn(3, 4, 8), torch.randn(3, 8), torch.randn(3, 4)
    experts = module(
        has_gate=False, has_bias=True, up_proj=up, down_proj=down, up_proj_bias=up_bias, down_proj_bias=down_bias,
        act_fn=transformers.activations.ACT2FN["gelu_pytorch_tanh"],
    )  # fmt: skip
    e = ids[:, 0]
    hidden = nn.functional.gelu(torch.einsum("td,tid->ti", x, up[e]) + up_bias[e], approximate="tanh")
    expected = weights * (torch.einsum("ti,tdi->td", hidden, down[e]) + down_bias[e])
    assert_close(experts_forward(experts, x, ids, weights), expected, tolerance=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_transposed": True}, "transposed or interleaved"),
        ({"is_concatenated": False}, "transposed or interleaved"),
        ({"has_post_expert_norm": True}, "normalises after each expert"),
        ({"act_fn": nn.ReLU()}, r"its activation ReLU\(\) is not one"),
        ({"act_fn": transformers.activations.ACT2FN["gelu_pytorch_tanh"]}, "its activation .* is not one"),
    ],
)
def test_what_the_op_does_not_have_is_refused(changes, message):
    with pytest.raises(NotImplementedError, match=f"Experts: .*{message}"):
        experts_forward(module(**changes), torch.randn(5, 4), torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1))


def test_a_gate_of_its_own_is_refused():
    class Clipped(Experts):
        def _apply_gate(self, x):
            return x

    with pytest.raises(NotImplementedError, match="Clipped: its gate is its own"):
        experts_forward(module(Clipped), torch.randn(5, 4), torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend: expected one of"):
        register_experts(backend="fast")
