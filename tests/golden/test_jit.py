"""JiT's objective and sampler against the official denoiser."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from models.checkpoint import build_official, load_official
from models.objectives import JiTFlow, objective_for
from tests.golden.vectors import Case, assert_grads_match, assert_matches, load_case, official_grads


class FormulaModel(nn.Module):
    """The stand-in for a network that the vectors document: A tanh(z) + t B z + emb[y]."""

    num_classes = null_label = 10

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.A, self.B = (nn.Parameter(case[f"param.net.{name}"].clone()) for name in "AB")
        self.emb = nn.Embedding.from_pretrained(case["param.net.emb.weight"].clone(), freeze=False)
        self.drop: Tensor | None = None

    def forward(self, z: Tensor, t: Tensor, labels: Tensor, return_aux: bool = False):
        if self.training and self.drop is not None:
            labels = labels.where(self.drop >= 0.1, self.null_label)
        out = torch.einsum("oc,nchw->nohw", self.A, z.tanh()) + self.emb(labels)[:, :, None, None]
        out = out + t.view(-1, 1, 1, 1) * torch.einsum("oc,nchw->nohw", self.B, z)
        return (out, None) if return_aux else out


def flow(case: Case, low: float | None = None, high: float | None = None) -> JiTFlow:
    args = case.config["args"]
    return JiTFlow(
        time_mean=args["P_mean"],
        time_std=args["P_std"],
        noise_scale=args["noise_scale"],
        min_gap=args["t_eps"],
        guidance_interval=(
            args["interval_min"] if low is None else low,
            args["interval_max"] if high is None else high,
        ),
    )


def draw_official_times(case: Case, objective: JiTFlow) -> Tensor:
    normal = case["input.t_normal"]
    with mock.patch("models.objectives.jit.torch.randn", lambda *size, **_: normal):
        return objective.draw_times(len(normal), normal.device)


def check_loss(case: Case, model: nn.Module, grads) -> None:
    objective = flow(case)
    t = draw_official_times(case, objective)
    assert_matches(t, case["output.t"].flatten(), f"{case.name}: times")
    arguments = {"t": t, "noise": case["input.noise"]}
    x, labels = case["input.x"], case["input.y"]
    assert_matches(objective.loss(model.eval(), x, labels, **arguments).loss, case["output.eval.loss"], "evaluation")
    loss = objective.loss(model.train(), x, labels, **arguments).loss
    assert_matches(loss, case["output.train.loss"], f"{case.name}: training loss")
    loss.backward()
    assert_grads_match(case, grads(model))


def check_samples(case: Case, model: nn.Module) -> None:
    for name, method, scale, low, high in case.config["gen"]:
        sample = flow(case, low, high).sample(
            model.eval(),
            case["input.sample.z"],
            case["input.y"],
            steps=case.config["args"]["num_sampling_steps"],
            method=method,
            cfg_scale=scale,
        )
        assert_matches(sample, case[f"output.sample.{name}"], f"{case.name}: {name}")


def test_objective_and_sampler() -> None:
    case = load_case("jit_denoiser_simple")
    model = FormulaModel(case)
    model.drop = case["input.label_drop_rand"]
    check_loss(case, model, lambda model: {f"net.{name}": p.grad for name, p in model.named_parameters()})
    check_samples(case, model)


def test_whole_denoiser() -> None:
    case = load_case("jit_denoiser_net")
    config = {**case.config["net"], "input_size": case.config["args"]["img_size"]}
    model = build_official("model_jit.JiT", {**config, "num_classes": case.config["args"]["class_num"]})
    load_official(model, case.state_dict)  # its keys begin with net.
    assert objective_for(model) == JiTFlow()
    model.y_embedder.dropout_prob = case.config["args"]["label_drop_prob"]
    with mock.patch("models.layers.torch.rand", lambda *size, **_: case["input.label_drop_rand"]):
        check_loss(case, model, lambda model: {f"net.{name}": g for name, g in official_grads(model).items()})
    check_samples(case, model)


@pytest.mark.parametrize(("time", "scale"), [(0.0, 3.0), (0.5, 3.0), (1.0, 1.0)])
def test_an_interval_from_zero_includes_zero(time, scale) -> None:
    assert JiTFlow(guidance_interval=(0.0, 1.0)).guidance(3.0, time) == scale
    assert JiTFlow(guidance_interval=(0.1, 1.0)).guidance(3.0, 0.1) == 1.0
