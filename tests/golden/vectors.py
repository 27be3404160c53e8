"""Reading the reference vectors, and comparing with them.

Each case is one .safetensors file: the official parameters and buffers, inputs, outputs and gradients of the official
code (github.com/yhlleo/EfficientMoE at cd7a27c, github.com/facebookresearch/DiT at ed81ce2), run in float32 on a CPU.
The files beside this module hold a selection (`python -m tests.golden.select FOLDER` made it); with GOLDEN_DIR the same
tests read a full set.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

HERE = Path(__file__).parent
VALUE_TOLERANCE = 1e-5  # of the largest reference value
GRAD_TOLERANCE = 5e-5
# Left out of the selection for its size: other cases check the same code.
FULL_SET_ONLY = ("diffmoe_block_e8", "jit_denoiser_net")


@dataclass(frozen=True)
class Case:
    """One file: ``config`` as its metadata tells, ``tensors`` by full name."""

    name: str
    config: dict
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix`` and a dot, without it."""
        return {name[len(prefix) + 1 :]: t for name, t in self.tensors.items() if name.startswith(f"{prefix}.")}

    @property
    def state_dict(self) -> dict[str, Tensor]:
        """The official state dict."""
        return self.group("param") | self.group("buffer")

    @property
    def parameter_grads(self) -> dict[str, Tensor]:
        return {name: grad for name, grad in self.group("grad").items() if not name.startswith("input.")}


def load_case(name: str) -> Case:
    folder = Path(os.environ.get("GOLDEN_DIR", HERE))
    if folder == HERE and name in FULL_SET_ONLY:
        pytest.skip("in a full set of vectors only: set GOLDEN_DIR")
    with safe_open(folder / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])["config"]
        return Case(name, config, {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118


def assert_matches(
    actual: Tensor, expected: Tensor, what: str, tolerance: float = VALUE_TOLERANCE, smallest_scale: float = 0.0
) -> None:
    """The largest difference is at most ``tolerance`` of the largest reference value."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual.detach().double() - expected.double()).abs().max()
    bound = tolerance * max(expected.double().abs().max().item(), smallest_scale)
    assert error <= bound, f"{what}: off by {error:.2e}, at most {bound:.2e} expected"


def assert_grads_match(case: Case, actual: dict[str, Tensor], prefix: str = "grad") -> None:
    """Every parameter gradient that the case holds, by official name."""
    expected = {name: grad for name, grad in case.group(prefix).items() if not name.startswith("input.")}
    assert expected, f"{case.name} holds no gradients"
    for name, grad in expected.items():
        # A key bias moves all scores of a query alike: without RoPE its gradient is rounding error and nothing else.
        scale = 0.1 if name.endswith("k_proj.bias") else 0.0
        assert_matches(actual[name], grad, f"{case.name}: gradient of {name}", GRAD_TOLERANCE, scale)


def official_grads(model: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters' gradients by official name; zeros where a parameter has none, as the vectors have."""
    from copy import deepcopy

    from models.checkpoint import official_state_dict

    grads = deepcopy(model)
    for parameter, source in zip(grads.parameters(), model.parameters(), strict=True):
        parameter.data = torch.zeros_like(source) if source.grad is None else source.grad
    return official_state_dict(grads)
