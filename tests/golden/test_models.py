"""Whole models against the official code, through official configurations and keys."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from models.checkpoint import build_official, load_official, official_state_dict
from models.objectives import RectifiedFlow
from tests.golden.vectors import Case, assert_grads_match, assert_matches, load_case, official_grads

TARGETS = {"dit": "models.models_DiT.DiT", "dsmoe": "models.models_DSMoE.DiT"}
MODELS = ["model_dense_dit", "model_dsmoe_dit_rope2d", "model_dsmoe_dit_sincos"]


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
    with label_drop(case["input.train.label_drop_rand"]):
        out = model(x, t, y)
    assert_matches(out, case["output.train.y"], f"{name}: training")
    (out * case["input.W"]).sum().backward()
    assert_grads_match(case, official_grads(model))
    if "grad.input.x" in case.tensors:
        assert_matches(x.grad, case["grad.input.x"], f"{name}: gradient of x", 5e-5)


@pytest.mark.parametrize("name", MODELS)
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


def test_rectified_flow_training_step() -> None:
    case = load_case("rf_dsmoe_train")
    model = build(case).train()
    with label_drop(case["input.label_drop_rand"]):
        result = RectifiedFlow().loss(
            model, case["input.x"], case["input.y"], t=case["input.t"], noise=case["input.z0"]
        )
    assert_matches(result.mse, case["output.terms.mse"], "mse")
    assert_matches(result.loss, case["output.terms.loss"], "loss")
    result.loss.backward()
    assert_grads_match(case, official_grads(model))


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_rectified_flow_sampling(method) -> None:
    case = load_case("rf_dsmoe_train")
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
