"""DiffMoE's and the baselines' layers against the official code: training, inference, losses and thresholds."""

from __future__ import annotations

import copy

import pytest
import torch

from diffmoe_kernels import ExpertChoiceMoE, MoE
from diffmoe_kernels.modules import FeedForward
from models.checkpoint import load_official, official_state_dict
from tests.golden.vectors import Case, assert_grads_match, assert_matches, load_case, official_grads
from tests.ops.backends import TRITON

BACKENDS = ("reference", "torch", TRITON)
# "e4" is the one whose further backward passes the selection beside this file keeps.
DIFFMOE = ["diffmoe_block_e4", "diffmoe_block_e4_shared1", "diffmoe_block_e8"]


def diffmoe(name: str, backend: str) -> tuple[Case, ExpertChoiceMoE]:
    case = load_case(name)
    config = case.config
    shared = int(config["hidden"] * config["mlp_ratio"] * 2) if config.get("n_shared_experts") else 0
    layer = ExpertChoiceMoE(
        config["hidden"],
        config["inter"],
        config["E"],
        capacity_factor=config["capacity"],
        shared_intermediate_size=shared,
        backend=backend,
    )
    return case, load_official(layer, case.state_dict)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIFFMOE)
def test_training(name, backend) -> None:
    case, layer = diffmoe(name, backend)
    x = case["input.x"].clone().requires_grad_()
    y = layer(x)
    (y * case["input.W"]).sum().backward()
    assert_matches(y, case["output.train.y"], f"{name}: y")
    assert_matches(x.grad, case["grad.input.x"], f"{name}: gradient of x", 5e-5)
    assert_grads_match(case, official_grads(layer))


@pytest.mark.parametrize("name", DIFFMOE)
def test_capacity_loss_and_thresholds(name) -> None:
    case, layer = diffmoe(name, "auto")
    x = case["input.x"].clone().requires_grad_()
    _, aux = layer(x, return_aux=True)
    assert_matches(aux.loss, case["output.train.capacity_bce"], f"{name}: loss")
    aux.loss.backward()
    assert x.grad is None, "the predictor's loss must not reach the tokens"
    if case.group("grad_bce"):  # the selection here has them of one case, a full set of all
        assert_grads_match(case, official_grads(layer), "grad_bce")
    logits = layer.capacity_predictor(x).view(case["output.train.capacity_pred"].shape)
    assert_matches(logits, case["output.train.capacity_pred"], f"{name}: predictions")
    for key in ("expert_threshold_updated", "expert_threshold_updated_twice"):
        layer.update_routing_state(aux)
        assert_matches(layer.expert_threshold, case[f"output.train.{key}"], f"{name}: {key}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIFFMOE)
def test_inference_over_the_pool(name, backend) -> None:
    case, layer = diffmoe(name, backend)
    layer.eval()
    x = case["input.x"].clone().requires_grad_()
    y = layer(x)
    (y * case["input.W"]).sum().backward()
    assert_matches(y, case["output.eval.y"], f"{name}: y")
    if case.group("grad_eval"):
        assert_matches(x.grad, case["grad_eval.input.x"], f"{name}: gradient of x", 5e-5)
        assert_grads_match(case, official_grads(layer), "grad_eval")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["ec_block", "ec_block_shared"])
def test_ec_dit(name, backend, training) -> None:
    case = load_case(name)
    config = case.config
    swiglu = config.get("expert") == "moemlp"
    layer = ExpertChoiceMoE(
        config["hidden"],
        config["inter"],
        config["E"],
        capacity_factor=config["capacity"],
        pool="sample",
        predictor=False,
        activation="swiglu" if swiglu else "gelu_tanh",
        bias=not swiglu,
        backend=backend,
    )
    if config.get("n_shared_experts"):
        layer.shared_expert = FeedForward(config["hidden"], config["hidden"] * config["n_shared_experts"])
    load_official(layer, case.state_dict).train(training)
    x = case["input.x"].clone().requires_grad_()
    y = layer(x)
    (y * case["input.W"]).sum().backward()
    assert_matches(y, case["output.y"], f"{name}: y")
    assert_matches(x.grad, case["grad.input.x"], f"{name}: gradient of x", 5e-5)
    assert_grads_match(case, official_grads(layer))


@pytest.mark.parametrize("name", DIFFMOE)
def test_state_dict_comes_back_with_the_same_bits(name) -> None:
    case, layer = diffmoe(name, "auto")
    actual = official_state_dict(copy.deepcopy(layer))
    assert actual.keys() == case.state_dict.keys()
    assert all(torch.equal(actual[key], tensor) for key, tensor in case.state_dict.items())


def test_the_selection_holds_the_further_backward_passes_of_one_case() -> None:
    case = load_case("diffmoe_block_e4")
    assert case.group("grad_bce") and case.group("grad_eval")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["tc_block", "tc_block_swiglu"])
def test_tc_dit(name, backend) -> None:
    """Softmax token choice with a balance loss, whose gradient the official code injects with factor 1."""
    case = load_case(name)
    config = case.config
    swiglu = config.get("expert") == "moemlp"
    layer = MoE(
        config["hidden"],
        config["inter"],
        config["E"],
        config["top_k"],
        activation="swiglu" if swiglu else "gelu_tanh",
        bias=not swiglu,
        score_function="softmax",
        normalize_weights=False,
        balance="loss",
        backend=backend,
    )
    layer.shared_expert = FeedForward(config["hidden"], config["hidden"] * config["n_shared_experts"])
    # The official layer has no selection bias: ours is 0, and not in the file.
    load_official(layer, case.state_dict)
    x = case["input.x"].clone().requires_grad_()
    y, aux = layer(x, return_aux=True)
    assert_matches(y, case["output.train.y"], f"{name}: y")
    assert_matches(layer.eval()(x), case["output.eval.y"], f"{name}: y in evaluation")
    assert_matches(aux.loss, case["output.train.aux_loss"], f"{name}: balance loss")
    ((y * case["input.W"]).sum() + aux.loss).backward()
    assert_matches(x.grad, case["grad.input.x"], f"{name}: gradient of x", 5e-5)
    assert_grads_match(case, official_grads(layer))
