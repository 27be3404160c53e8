"""A sample's bits do not depend on how many are drawn at a time, nor a token's on its batch mates."""

import pytest
import torch

from diffmoe_kernels import ExpertChoiceMoE, MoE
from models import create_model
from models.objectives import objective_for
from models.sampling import balanced_labels, sample_images
from tests.models.helpers import randomize, set_thresholds

FAMILIES = ["DiT", "DSMoE", "DiffMoE", "JiT", "JiTMoE", "TC-DiT", "EC-DiT"]


def family(name: str, **options):
    """A model of digits' size; DiffMoE's tokens choose by thresholds that send about half of them to each expert."""
    torch.manual_seed(0)
    if name == "DiffMoE":
        options.setdefault("inference", "token")
    model = randomize(create_model(f"{name}-digits", **options)).eval()
    set_thresholds(model, 0.5)
    return model


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
@pytest.mark.parametrize("name", FAMILIES)
def test_eight_in_one_go_or_in_several(name, cfg_scale):
    model, labels = family(name), balanced_labels(8, range(10))
    whole = sample_images(model, labels, steps=3, cfg_scale=cfg_scale, batch_size=8)
    assert whole.std() > 0.1
    for batch_size in (1, 3, 4):
        parts = sample_images(model, labels, steps=3, cfg_scale=cfg_scale, batch_size=batch_size)
        assert torch.equal(parts, whole), batch_size


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_of_a_run(name):
    """As several processes draw them, or one that was stopped."""
    model, labels = family(name), balanced_labels(11, range(10))
    whole = sample_images(model, labels, seed=5, steps=2, cfg_scale=1.5)
    for first, last in ((0, 1), (1, 8), (8, 11)):
        part = sample_images(model, labels[first:last], seed=5, steps=2, cfg_scale=1.5, first=first)
        assert torch.equal(part, whole[first:last]), first


OTHER_GEOMETRIES = {
    "DiT, odd width": ("DiT-digits", {"hidden_size": 72, "num_heads": 4}),
    "DSMoE, colour": ("DSMoE-digits", {"in_channels": 3, "input_size": 16}),
    "JiT, colour": ("JiT-digits", {"in_channels": 3, "input_size": 16, "hidden_size": 64, "num_heads": 4}),
    "DiT-S/2": ("DiT-S/2", {"depth": 1}),
    "DSMoE-S-E16": ("DSMoE-S-E16", {"depth": 2}),
    "JiT, large patches": ("JiT-B/16", {"depth": 2, "input_size": 64, "context_start": 1}),
}


@pytest.mark.parametrize(("name", "options"), OTHER_GEOMETRIES.values(), ids=OTHER_GEOMETRIES.keys())
def test_other_geometries(name, options):
    torch.manual_seed(0)
    model, labels = randomize(create_model(name, **options)).eval(), balanced_labels(5, range(10))
    for cfg_scale in (1.0, 1.5):
        arguments = {"steps": 1, "method": "euler", "cfg_scale": cfg_scale}
        whole = sample_images(model, labels, **arguments)
        for batch_size in (1, 3):
            assert torch.equal(sample_images(model, labels, batch_size=batch_size, **arguments), whole), batch_size


@pytest.mark.parametrize("method", ["ancestral", "ddim"])
@pytest.mark.parametrize("name", ["DiT", "DiffMoE"])
def test_ddpm_in_one_go_or_two(name, method):
    model, labels = family(name, learn_sigma=True), balanced_labels(8, range(10))
    arguments = {"objective": objective_for(model, "ddpm"), "method": method, "steps": 4, "cfg_scale": 1.5}
    whole = sample_images(model, labels, batch_size=8, **arguments)
    assert torch.equal(sample_images(model, labels, batch_size=4, **arguments), whole)
    assert torch.equal(sample_images(model, labels[:3], **arguments), whole[:3])
    assert torch.equal(sample_images(model, labels[3:], first=3, **arguments), whole[3:])
    assert not torch.equal(sample_images(model, labels, seed=1, **arguments), whole)


def test_choice_among_the_pool_does_depend_on_the_batch():
    """So that the tests above are known to see a difference."""
    model, labels = family("DiffMoE", inference="pool"), balanced_labels(8, range(10))
    whole = sample_images(model, labels, steps=3, batch_size=8)
    assert not torch.equal(sample_images(model, labels, steps=3, batch_size=4), whole)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("layer", ["token", "topk"])
def test_a_layer_at_fixed_shapes_whatever_the_mates(layer, grad):
    """Mates change how many tokens each expert has, from one upwards."""
    torch.manual_seed(0)
    if layer == "token":
        mixture = ExpertChoiceMoE(32, 64, 16, inference="token", shared_intermediate_size=64).eval()
        mixture.expert_threshold.fill_(0.52)
    else:
        mixture = MoE(32, 64, 16, 2, shared_intermediate_size=64).eval()
    own = torch.randn(1, 16, 32)
    with torch.set_grad_enabled(grad):
        results, loads = [], []
        for seed in range(8):
            mates = 3 * torch.randn(7, 16, 32, generator=torch.Generator().manual_seed(seed))
            y, aux = mixture(torch.cat([own, mates]), return_aux=True)
            results.append(y[0])
            loads.append(aux.expert_load)
    loads = torch.stack(loads)
    assert loads.std(0).max() > 0 and (loads < 16).any() and (loads > 16).any()
    assert all(torch.equal(result, results[0]) for result in results)
