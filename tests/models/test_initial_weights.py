"""Weights as the official code draws them, and drawn again after the meta device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffmoe_kernels.modules import Experts, FeedForward, TopKRouter
from models import create_model

SMALL = {"hidden_size": 16, "num_heads": 2, "num_experts": 4}
FAMILIES = {
    "DiT-digits": {},
    "DSMoE-digits": {"norm": "rmsnorm", "balance": "bias"},
    "DiffMoE-digits": {},
    "TC-DiT-digits": {},
    "EC-DiT-digits": {},
    "JiT-digits": {},
    "JiTMoE-digits": {},
}


def is_uniform_within(weight: Tensor, bound: float) -> bool:
    return 0.95 * bound < weight.abs().max().item() <= bound * (1 + 1e-6)


def test_matrices_of_dsmoe_are_xavier_each_by_itself() -> None:
    """gate_proj and up_proj, though they lie in one tensor here."""
    model = create_model("DSMoE-S-E16", **SMALL, moe_intermediate_size=32, depth=2)
    layer = model.blocks[1].mlp
    bound = (6 / (16 + 32)) ** 0.5
    weights = (layer.experts.gate_up_proj, layer.experts.down_proj, layer.shared_expert.gate_up_proj.weight)
    assert all(is_uniform_within(weight, bound) for weight in weights)
    assert not layer.router.expert_bias.any()


def test_jits_w12_is_one_matrix() -> None:
    model = create_model("JiTMoE-digits", **SMALL, moe_intermediate_size=32)
    networks = [module for module in model.modules() if isinstance(module, FeedForward | Experts)]
    assert {type(network) for network in networks} == {FeedForward, Experts}
    for network in networks:
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any()
            else:
                assert is_uniform_within(parameter, (6 / sum(parameter.shape[-2:])) ** 0.5), name


def test_tc_dits_router_is_drawn_as_a_linear_layer() -> None:
    model = create_model("TC-DiT-digits")
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    assert routers and all(is_uniform_within(router.weight, 96**-0.5) for router in routers)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_from_the_meta_device_is_as_new(name) -> None:
    """`to_empty` and `reset_parameters`, as sharded models are made."""
    torch.manual_seed(0)
    expected = create_model(name, **FAMILIES[name]).state_dict()
    with torch.device("meta"):
        model = create_model(name, **FAMILIES[name])
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan)
    model.reset_parameters()
    for key, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), key
        # Of the constructor's draws nothing is left but their spread.
        assert tensor.std(correction=0).item() == pytest.approx(expected[key].std(correction=0).item(), rel=0.3), key
        assert tensor.mean().item() == pytest.approx(expected[key].mean().item(), abs=0.1), key
