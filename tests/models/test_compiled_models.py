"""Models whose blocks torch.compile takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffmoe_kernels.testing import assert_close
from models import create_model
from models.training.loading import compile_blocks
from tests.models.helpers import random_inputs, randomize


@pytest.mark.parametrize("name", ["DiT-digits", "JiT-digits"])
def test_tokens_lie_in_one_piece(name) -> None:
    """A convolution leaves them in columns: each op of the first blocks would copy them, and inductor reduces such
    tiles wrong on a CPU (torch 2.13.0, as in pytorch/pytorch#196681)."""
    model = create_model(name)
    x, _, _ = random_inputs(model, batch=2)
    assert model.x_embedder(x).is_contiguous()


def test_compiled_blocks_have_the_gradients_of_eager_ones() -> None:
    """By inductor; they were off by 2e-2 where tokens lay in columns."""
    torch.manual_seed(0)
    model = randomize(create_model("DiT-digits", depth=2, class_dropout_prob=0.0)).train()
    inputs, found = random_inputs(model), []
    for compiled in (False, True):
        for block in model.blocks if compiled else ():
            block.compile(dynamic=False)
        model.zero_grad()
        model(*inputs).square().mean().backward()
        found.append({name: one.grad for name, one in model.named_parameters() if one.requires_grad})
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, tolerance=1e-5, name=name)


def test_every_size_of_a_batch_is_compiled(monkeypatch) -> None:
    """Of a batch and a guided one, in training and in sampling: more graphs than torch.compile's usual limit."""
    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, dynamic: compile(self, backend="aot_eager", dynamic=dynamic))
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        model = create_model("JiTMoE-digits", depth=4, context_start=2, class_dropout_prob=0.0)
        compile_blocks(model)
        for size in (4, 8):
            model.train()(*random_inputs(model, batch=size)).sum().backward()
            with torch.no_grad():
                model.eval()(*random_inputs(model, batch=size))
