"""Whole models against the official code, through official configurations and keys."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from diffmoe_kernels import ExpertChoiceAux, Routing, ops
from models import ModelAux
from models.checkpoint import build_official, load_official, official_state_dict
from models.objectives import RectifiedFlow
from tests.golden.vectors import Case, assert_grads_match, assert_matches, load_case, official_grads

TARGETS = {
    "dit": "models.models_DiT.DiT",
    "dsmoe": "models.models_DSMoE.DiT",
    "diffmoe": "models.models_DiffMoE.DiT",
    "tc": "models.models_TCDiT.DiT",
    "ec": "models.models_ECDiT.DiT",
    "jit": "model_jit.JiT",
}
MODELS = ["model_dense_dit", "model_dsmoe_dit_rope2d", "model_dsmoe_dit_sincos", "model_diffmoe_dit"]
MODELS += ["model_tcdit", "model_ecdit", "model_jit_moe"]
GUIDED = [name for name in MODELS if name != "model_jit_moe"]  # JiT's official model has no forward_with_cfg


def build(case: Case) -> torch.nn.Module:
    model = build_official(TARGETS[case.config["kind"]], case.config["ctor"])
    return load_official(model, case.state_dict)


def label_drop(values: torch.Tensor):
    """The uniform numbers that decide which labels are dropped."""
    return mock.patch("models.layers.torch.rand", lambda *size, **_: values)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name) -> None:
    case = load_case(name)
    model = build(case)
    x, t, y = case["input.x"].clone().requires_grad_(), case["input.t"], case["input.y"]
    model.eval()
    assert_matches(model(x, t, y), case["output.y"], f"{name}: evaluation")
    model.train()
    with label_drop(case.tensors.get("input.train.label_drop_rand")):  # JiT's model drops none
        out, aux = model(x, t, y, return_aux=True)
    assert_matches(out, case["output.train.y"], f"{name}: training")
    loss = (out * case["input.W"]).sum()
    if case.config["kind"] == "tc":  # the official layer injects this gradient
        loss = loss + aux.loss
    loss.backward()
    assert_grads_match(case, official_grads(model))
    if "grad.input.x" in case.tensors:
        assert_matches(x.grad, case["grad.input.x"], f"{name}: gradient of x", 5e-5)


@pytest.mark.parametrize("name", GUIDED)
def test_guidance(name) -> None:
    case = load_case(name)
    inputs = (case[f"input.cfg.{part}"] for part in ("x", "t", "y"))
    actual = build(case).eval().forward_with_cfg(*inputs, case.config["cfg_scale"])
    assert_matches(actual, case["output.cfg"], f"{name}: guidance")


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_comes_back_with_the_same_bits(name) -> None:
    case = load_case(name)
    actual = official_state_dict(build(case))
    assert actual.keys() == case.state_dict.keys()
    assert all(torch.equal(actual[key], tensor) for key, tensor in case.state_dict.items())


def test_diffmoe_thresholds_move_with_the_training_forward() -> None:
    case = load_case("model_diffmoe_dit")
    model = build(case).train()
    with label_drop(case["input.train.label_drop_rand"]):
        _, aux = model(case["input.x"], case["input.t"], case["input.y"], return_aux=True)
    model.update_routing_state(aux)
    for index in (1, 3):
        expected = case[f"output.train.expert_threshold_updated.{index}"]
        assert_matches(model.blocks[index].mlp.expert_threshold, expected, f"thresholds of block {index}")


@pytest.mark.parametrize("name", ["rf_dsmoe_train", "rf_diffmoe_train"])
def test_rectified_flow_training_step(name) -> None:
    case = load_case(name)
    model = build(case).train()
    with label_drop(case["input.label_drop_rand"]):
        result = RectifiedFlow().loss(
            model, case["input.x"], case["input.y"], t=case["input.t"], noise=case["input.z0"]
        )
    assert_matches(result.mse, case["output.terms.mse"], "mse")
    assert_matches(result.loss, case["output.terms.loss"], "loss")
    if "output.terms.cp_loss" in case.tensors:
        assert_matches(result.aux.loss, case["output.terms.cp_loss"], "capacity loss")
        model.update_routing_state(result.aux)
        assert_matches(model.blocks[1].mlp.expert_threshold, case["output.expert_threshold_updated.1"], "thresholds")
    result.loss.backward()
    assert_grads_match(case, official_grads(model))


def test_capacity_loss_of_several_layers() -> None:
    """The weighted sum over layers of the mean cross-entropy of given predictions against given choices."""
    case = load_case("rf_capacity_loss")
    layers, leaves = [], {}
    for index in case.config["layers"]:
        logits = case[f"input.capacity_pred.{index}"].clone().requires_grad_()
        chosen = case[f"input.ones.{index}"].flatten(0, 1).t()  # (E, T), with any number of tokens an expert
        tokens = chosen.argsort(dim=1, descending=True, stable=True)
        routing = Routing.from_expert_choice(tokens, torch.ones(tokens.shape), chosen.shape[1], chosen.sum(1).int())
        loss = ops.capacity_loss(logits.flatten(0, 1), routing)
        assert_matches(loss, case[f"output.terms.Capacity_Pred_loss_{index}"], f"loss of layer {index}")
        layers.append(ExpertChoiceAux(chosen.sum(1), torch.tensor(0), loss, None))
        leaves[index] = logits
    loss = ModelAux(tuple(layers), case.config["weight"]).loss
    assert_matches(loss, case["output.terms.cp_loss"], "sum")
    loss.backward()
    for index, logits in leaves.items():
        assert_matches(logits.grad, case[f"grad.input.capacity_pred.{index}"], f"gradient of layer {index}", 5e-5)


# The official samples of rf_diffmoe_train were taken with the thresholds it started with.
@pytest.mark.parametrize("name", ["rf_dsmoe_train", "rf_diffmoe_train"])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_rectified_flow_sampling(name, method) -> None:
    case = load_case(name)
    model = build(case).eval()
    actual = RectifiedFlow().sample(
        model,
        case["input.sample.z"],
        case["input.y"],
        steps=case.config["steps"],
        method=method,
        cfg_scale=case.config["cfg"],
        null_labels=case["input.sample.null"],
    )
    assert_matches(actual, case[f"output.sample.{method}"], f"sample by {method}")
