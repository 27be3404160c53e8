"""Whole models with ``backend="triton"``: what the reference computes, in training and in evaluation."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffmoe_kernels.testing import relative_error
from diffmoe_kernels.triton_support import HAS_TRITON
from models import create_model
from models.objectives import RectifiedFlow
from tests.models.helpers import set_thresholds

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
NAMES = [f"{family}-digits" for family in ("DiT", "DSMoE", "DiffMoE", "JiT", "JiTMoE", "TC-DiT", "EC-DiT")]


def models_of(name: str, **fields) -> list[nn.Module]:
    """One with the kernels and the reference, with weights at which nothing is 0."""
    torch.manual_seed(0)
    depth = 3 if name.startswith("JiT") else 2  # where its class tokens have come in
    found = [create_model(name, backend=backend, depth=depth, **fields) for backend in ("triton", "reference")]
    with torch.no_grad():
        for parameter in found[0].parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        set_thresholds(found[0], 0.4)
    found[1].load_state_dict(found[0].state_dict())
    return found


def outcome(model: nn.Module, training: bool) -> dict[str, Tensor]:
    torch.manual_seed(1)  # labels are dropped in training
    x = torch.randn(2, model.in_channels, model.input_size, model.input_size)
    inputs = x, torch.tensor([0.1, 0.9]), torch.tensor([0, 9])
    if not training:
        with torch.no_grad():
            return {"y": model.eval()(*inputs)}
    y, aux = model.train()(*inputs, return_aux=True)
    loss = y.square().mean() + (0 if getattr(aux, "loss", None) is None else aux.loss)
    loss.backward()
    return {"y": y.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_on_the_kernels(name, training):
    ours, right = (outcome(model, training) for model in models_of(name))
    assert ours.keys() == right.keys() and right["y"].abs().max() > 0.01
    for key, expected in right.items():
        assert relative_error(ours[key], expected) < 1e-4, key


@pytest.mark.parametrize(("name", "fields"), [*((name, {}) for name in NAMES), ("DSMoE-digits", {"rope": None})])
def test_norms_are_rounded_as_autocast_rounds_them(name, fields, monkeypatch):
    """In the norm's own pass, to the same bits as in a cast before each linear layer, forward and backward.

    All norms but the routers'; DSMoE's stream is bfloat16 already, unless a position table makes it float32.
    """
    model, results, layers = models_of(name, **fields)[0], [], importlib.import_module("models.layers")
    for dtype_of in (layers.compute_dtype, lambda x: x.dtype):
        monkeypatch.setattr(layers, "compute_dtype", dtype_of)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
            found = outcome(model, training=True)
        results.append((found, casts.count))
    (ours, fewer), (right, more) = results
    assert all(torch.equal(ours[key], value) for key, value in right.items())
    norms = 2 * len(model.blocks) + 1 - sum(block.use_moe for block in model.blocks)
    assert more - fewer == (0 if name == "DSMoE-digits" and not fields else 2 * norms)


class Casts(TorchDispatchMode):
    """How many tensors of tokens are cast."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default and args[0].dim() == 3
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The kernels that are launched, by name."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    names = []
    run = interpreter.GridExecutor.__call__

    def counted(self, *args, **options):
        names.append(self.fn.__name__)
        return run(self, *args, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    return names


@pytest.mark.parametrize(("name", "passes"), [("DSMoE-digits", 2 * 2 + 1), ("JiT-digits", 2 * 3 + 3)])
def test_a_norm_adds_the_branch_before_it(launched, name, passes):
    """Two norms a block and the last one; JiT adds by itself where class tokens come in and go."""
    outcome(models_of(name)[0], training=True)
    assert launched.count("_adaln_fwd_kernel") == launched.count("_adaln_bwd_kernel") == passes


def test_guidance_launches_no_kernel_more(launched):
    """A guided step is one call of the model, of twice the batch."""
    model = models_of("DSMoE-digits")[0].eval()
    shape = model.in_channels, model.input_size, model.input_size
    labels, sample = torch.zeros(4, dtype=torch.int64), RectifiedFlow().sample
    sample(model, torch.randn(4, *shape), labels, steps=1, method="euler")
    plain = launched.copy()
    launched.clear()
    null = torch.full((2,), model.null_label)
    sample(model, torch.randn(2, *shape), labels[:2], steps=1, method="euler", cfg_scale=2.0, null_labels=null)
    assert launched == plain and "_rope_attention_fwd_kernel" in plain
