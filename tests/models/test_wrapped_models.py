"""Models whose parts are wrapped, as activation checkpointing wraps them."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from diffmoe_kernels.testing import assert_close
from models import create_model
from tests.models.helpers import random_inputs, randomize


@pytest.mark.parametrize("name", ["DiffMoE-digits", "TC-DiT-digits", "EC-DiT-digits", "DSMoE-digits", "JiTMoE-digits"])
def test_a_wrapped_mixture_keeps_its_record(name) -> None:
    """What torch.compile or activation checkpointing puts around it is another class."""
    options = {"depth": 4, **({"capacity_schedule": (1, 4)} if name == "DiffMoE-digits" else {})}
    model = create_model(name, **options)
    mixture = model.blocks[1].mlp
    model.blocks[1].mlp = checkpoint_wrapper(mixture)
    _, aux = model(*random_inputs(model), return_aux=True)
    assert [layer is not None for layer in aux.layers] == [False, True, False, True]
    model.update_routing_state(aux)
    if name == "DiffMoE-digits":
        assert mixture.expert_threshold.any()
        before = mixture.capacity_factor
        model.set_training_step(0)
        assert mixture.capacity_factor == model.blocks[3].mlp.capacity_factor > before


@pytest.mark.parametrize("kind", ["REENTRANT", "NO_REENTRANT"])
@pytest.mark.parametrize("name", ["DiT-digits", "DSMoE-digits", "JiTMoE-digits"])
def test_blocks_may_be_computed_again(name, kind) -> None:
    """Activation checkpointing block by block, either way, changes no gradient."""
    torch.manual_seed(0)
    model = randomize(create_model(name, depth=4, class_dropout_prob=0.0)).train()
    inputs = random_inputs(model)
    model(*inputs).square().mean().backward()
    expected = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(one is not None and one.isfinite().all() for one in expected)
    model.zero_grad(set_to_none=True)
    for index, block in enumerate(model.blocks):
        model.blocks[index] = checkpoint_wrapper(block, checkpoint_impl=CheckpointImpl[kind])
    model(*inputs).square().mean().backward()
    for found, one in zip([p.grad for p in model.parameters() if p.requires_grad], expected, strict=True):
        assert_close(found, one, tolerance=1e-5)
