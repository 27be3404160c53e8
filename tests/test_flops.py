"""The formula of a model's operations against torch's count of what the reference runs, and against a paper's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import CONFIGS, DiT, create_model, list_models
from models.flops import model_flops
from models.objectives import objective_for

BATCH = 3


def small(name: str, **changes: Any) -> DiT:
    """The model with all its kinds of blocks, few and narrow ones."""
    config = CONFIGS[name]
    sizes = {"input_size": 4 * config.patch_size, "hidden_size": 8 * config.num_heads, "depth": 2}
    sizes |= {"moe_intermediate_size": 20} if getattr(config, "moe_intermediate_size", 0) else {}
    if "JiT" in name:
        sizes |= {"depth": 4, "num_context_tokens": 3, "context_start": 2, "bottleneck_size": 7}
    torch.manual_seed(0)
    return create_model(name, **(sizes | {"backend": "reference"} | changes))


def inputs(model: DiT) -> tuple[torch.Tensor, ...]:
    images = torch.randn(BATCH, model.in_channels, model.input_size, model.input_size)
    return images, torch.rand(BATCH), torch.randint(model.num_classes, (BATCH,))


def counted(model: DiT, training: bool) -> int:
    images, t, labels = inputs(model)
    with FlopCounterMode(display=False) as counter:
        if training:
            objective_for(model.train()).loss(model, images, labels, t=t).loss.backward()
        else:
            with torch.no_grad():
                model.eval()(images, t, labels)
    return counter.get_total_flops()


# A predictor lets through what it likes; bounded by the capacity of training it takes just that.
BOUND = {"max_capacity_factor": 1.0}


@pytest.mark.filterwarnings("ignore:ExpertChoiceMoE is evaluated with thresholds that were never updated")
@pytest.mark.parametrize("name", list_models())
def test_every_model_is_counted_as_torch_counts_it(name) -> None:
    model = small(name, **(BOUND if name.startswith("DiffMoE") else {}))
    forward, both = model_flops(model.config, BATCH), model_flops(model.config, BATCH, training=True)
    assert counted(model, training=False) == forward
    assert counted(model, training=True) == both
    assert 2.5 * forward < both < 3 * forward


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("DiT-S/2", {"swiglu": True, "learn_sigma": False, "head_dim": 12}),
        ("DSMoE-S-E48", {"num_kv_heads": 2, "shared_expert": False}),
        ("DSMoE-S-E16", {"interleave": False, "num_dense_blocks": 1, "depth": 3}),
        ("DiffMoE-S-E16", {"shared_expert": True, "interleave": False, "capacity_factor": 1.7, "num_experts": 6}),
        ("DiffMoE-S-E16", {"swiglu": True}),
        ("JiTMoE-B/16-E16", {"shared_expert": False, "num_context_tokens": 0}),
        ("TC-DiT-S-E16", {"num_shared_experts": 2, "top_k": 2, "swiglu": True}),
        ("EC-DiT-S-E16", {"num_shared_experts": 1, "capacity_factor": 2.3, "num_experts": 5}),
    ],
)
def test_every_option_is_counted(name, changes) -> None:
    model = small(name, **changes)
    assert counted(model, training=True) == model_flops(model.config, BATCH, training=True)


def test_dropped_choices_do_not_count() -> None:
    """The formula has the bound: experts that few tokens chose take less."""
    free, bound = (small("DSMoE-S-E16", capacity_factor=factor) for factor in (None, 0.5))
    choices = BATCH * 16 * 2
    dropped = choices - 16 * int(choices / 16 * 0.5)
    limit = model_flops(bound.config, BATCH)
    assert model_flops(free.config, BATCH) - limit == 2 * 3 * dropped * bound.config.hidden_size * 20
    assert limit - 2 * 3 * choices * bound.config.hidden_size * 20 < counted(bound, training=False) <= limit


@pytest.mark.parametrize(
    ("name", "giga"), [("DiT-S/2", 6.06), ("DiT-B/2", 23.01), ("DiT-L/2", 80.71), ("DiT-XL/2", 118.64)]
)
def test_dit_as_its_paper_says(name, giga) -> None:
    """arXiv:2212.09748: its "Gflops" are multiply-adds."""
    assert model_flops(CONFIGS[name]) / 2e9 == pytest.approx(giga, rel=2e-3)


@pytest.mark.parametrize("name", ["DiT-L/2", "JiT-L/16"])
def test_the_published_size_on_the_meta_device(name) -> None:
    with torch.device("meta"):
        model = create_model(name, backend="reference")
        assert counted(model, training=False) == model_flops(CONFIGS[name], BATCH)


def test_a_batch_of_nothing_and_less() -> None:
    assert model_flops(CONFIGS["DiffMoE-L-E8"], 0, training=True) == 0
    with pytest.raises(ValueError, match="batch: expected 0 images or more, got -1"):
        model_flops(CONFIGS["DiT-L/2"], -1)
