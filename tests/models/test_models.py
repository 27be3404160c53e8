"""Sizes, options and bad input of the model zoo."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffmoe_kernels import Balance, MoE
from models import CONFIGS, count_parameters, create_model, list_models
from tests.models.helpers import random_inputs, randomize

# Millions, total and activated.
PARAMETERS = {
    "DiT-S/2": (33.0, 33.0),
    "DiT-B/2": (130.5, 130.5),
    "DiT-L/2": (458.1, 458.1),
    "DiT-XL/2": (675.1, 675.1),
    "DSMoE-S-E16": (96.9, 34.9),
    "DSMoE-B-E16": (386.3, 138.6),
    "DSMoE-L-E16": (1368.1, 487.3),
    "DSMoE-3B-E16": (3101.7, 1011.5),
    "DSMoE-S-E48": (69.2, 31.2),
    "DSMoE-B-E48": (275.6, 123.4),
    "DSMoE-L-E48": (1166.9, 456.8),
    "DiffMoE-S-E16": (140.3, 33.9),
    "DiffMoE-B-E16": (559.2, 134.2),
    "DiffMoE-L-E8": (1176.0, 470.9),
    "DiffMoE-L-E16": (1982.0, 471.1),
    "JiT-B/16": (131.3, 131.3),
    "JiT-L/16": (459.1, 459.1),
    "JiTMoE-B/16-E16": (387.6, 139.6),
    "JiTMoE-L/16-E16": (1370.2, 488.7),
    **{f"{family}-DiT-S-E16": (139.3, 33.0) for family in ("TC", "EC")},
    **{f"{family}-DiT-B-E16": (555.6, 130.6) for family in ("TC", "EC")},
    **{f"{family}-DiT-L-E16": (1969.2, 458.3) for family in ("TC", "EC")},
}


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_parameter_counts(name) -> None:
    with torch.device("meta"):
        total, activated = count_parameters(create_model(name))
    assert (total / 1e6, activated / 1e6) == pytest.approx(PARAMETERS[name], abs=0.051)


def test_no_token_uses_more_than_all_experts() -> None:
    total, activated = count_parameters(create_model("DiffMoE-digits", capacity_factor=40.0))
    assert activated == total


def test_digits_models_are_of_one_activated_size() -> None:
    activated = {name: count_parameters(create_model(name))[1] for name in list_models() if name.endswith("-digits")}
    assert len(activated) >= 2
    assert max(activated.values()) <= 1.05 * min(activated.values()), activated
    assert 0.9e6 < min(activated.values()) < 1.2e6


def test_list_prints_the_table_of_the_readme() -> None:
    output = subprocess.run([sys.executable, "-m", "models.list"], capture_output=True, text=True, check=True).stdout
    assert [line.split()[1] for line in output.splitlines()[2:]] == list_models()
    assert output.strip() in (Path(__file__).parents[2] / "README.md").read_text()


def test_every_latent_model_has_the_published_shape() -> None:
    for name, config in CONFIGS.items():
        if not name.endswith("-digits") and not name.startswith("JiT"):
            assert (config.input_size, config.in_channels, config.num_classes) == (32, 4, 1000), name
            assert config.learn_sigma and config.class_dropout_prob == 0.1, name


SMALL = {"input_size": 8, "hidden_size": 32, "depth": 4, "num_heads": 4, "num_classes": 10}
SMALL_MOE = {**SMALL, "num_experts": 8, "moe_intermediate_size": 16}
OPTIONS = {
    "plain": {},
    "every block": {"interleave": False},
    "first dense": {"num_dense_blocks": 2},
    "grouped-query": {"num_kv_heads": 2},
    "no shared expert": {"shared_expert": False},
    "no rope": {"rope": None},
    "1-d rope": {"rope": "1d"},
    "rmsnorm": {"norm": "rmsnorm"},
    "groups": {"num_groups": 4, "top_groups": 1},
    "head_dim": {"head_dim": 12},
    "capacity": {"capacity_factor": 0.5},
    "balance": {"balance": Balance(bias_rate=1e-3, loss_weight=1e-2)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_dsmoe_options_train(options) -> None:
    """Every option gives finite outputs of the right shape, and a gradient to every parameter that can have one."""
    torch.manual_seed(0)
    model = randomize(create_model("DSMoE-S-E16", **SMALL_MOE, **options))
    x, t, labels = random_inputs(model, batch=8)
    out, aux = model(x, t, labels, return_aux=True)
    assert out.shape == (8, 8, 8, 8)
    assert len(aux.layers) == 4
    (out.square().mean() + (aux.loss if aux.loss is not None else 0)).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
    model.update_routing_state(aux)


def moe_blocks(**options) -> list[int]:
    with torch.device("meta"):
        model = create_model("DSMoE-S-E16", **SMALL_MOE, **options)
    return [index for index, block in enumerate(model.blocks) if isinstance(block.mlp, MoE)]


def test_which_blocks_are_mixtures() -> None:
    assert moe_blocks() == [1, 3]
    assert moe_blocks(interleave=False) == [0, 1, 2, 3]
    assert moe_blocks(num_dense_blocks=2) == [3]
    assert moe_blocks(num_dense_blocks=1, interleave=False) == [1, 2, 3]


def test_aux_loss_is_the_sum_of_the_layers() -> None:
    model = randomize(create_model("DSMoE-S-E16", **SMALL_MOE, balance="loss"))
    _, aux = model(*random_inputs(model), return_aux=True)
    layers = [layer.loss for layer in aux.layers if layer is not None]
    assert len(layers) == 2
    assert torch.equal(aux.loss, layers[0] + layers[1])
    _, aux = create_model("DiT-digits")(*random_inputs(create_model("DiT-digits")), return_aux=True)
    assert aux.loss is None and aux.layers == (None,) * 6


def test_update_routing_state_takes_micro_batches() -> None:
    models = [create_model("DSMoE-S-E16", **SMALL_MOE, balance="bias") for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x, t, labels = random_inputs(models[0], batch=8)
    for model in models:
        model.eval()
    _, whole = models[0](x, t, labels, return_aux=True)
    halves = [models[1](x[part], t[part], labels[part], return_aux=True)[1] for part in (slice(0, 4), slice(4, 8))]
    models[0].update_routing_state(whole)
    models[1].update_routing_state(halves)
    for one, other in zip(models[0].buffers(), models[1].buffers(), strict=True):
        assert torch.equal(one, other)
    assert models[0].blocks[1].mlp.router.expert_bias.abs().max() == pytest.approx(1e-3)


def test_adaln_zero_starts_as_the_zero_function() -> None:
    for name in ("DiT-digits", "DSMoE-digits"):
        model = create_model(name)
        assert not model(*random_inputs(model)).any()


def test_label_dropout_only_in_training() -> None:
    torch.manual_seed(0)
    model = randomize(create_model("DiT-digits", class_dropout_prob=0.5))
    x, t, labels = random_inputs(model, batch=64)
    unconditional = model.eval()(x, t, torch.full_like(labels, model.null_label))
    conditional = model(x, t, labels)
    dropped = (model.train()(x, t, labels) - unconditional).abs().amax((1, 2, 3)) < 1e-5
    kept = (model(x, t, labels) - conditional).abs().amax((1, 2, 3)) < 1e-5
    assert 16 < dropped.sum() < 48
    assert 16 < kept.sum() < 48
    assert create_model("DiT-digits", class_dropout_prob=0.0).null_label is None


def test_meta_model_becomes_real() -> None:
    """Tables that no state dict holds survive the meta device and casts."""
    source = randomize(create_model("DSMoE-S-E16", **SMALL_MOE)).eval()
    with torch.device("meta"):
        model = create_model("DSMoE-S-E16", **SMALL_MOE).eval()
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    inputs = random_inputs(source)
    assert torch.equal(model(*inputs), source(*inputs))
    model.bfloat16().float()
    for name, buffer in model.named_buffers():
        if "expert_bias" not in name:
            assert torch.equal(buffer, source.get_buffer(name)), name


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.endswith("-digits")])
def test_meta_model_takes_a_state_dict_by_assignment(name) -> None:
    """As from a file that is mapped into memory: the tables that no state dict holds come too."""
    source = randomize(create_model(name)).eval()
    with torch.device("meta"):
        model = create_model(name).eval()
    model.load_state_dict(source.state_dict(), assign=True)
    assert not any(one.is_meta for one in (*model.parameters(), *model.buffers()))
    inputs = random_inputs(source)
    assert torch.equal(model(*inputs), source(*inputs))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(*inputs), source(*inputs))


@pytest.mark.parametrize("name", ["DSMoE-digits", "DiT-digits"])
def test_what_is_no_record_is_refused(name) -> None:
    model = create_model(name)
    with pytest.raises(ValueError, match="expected at least one record"):
        model.update_routing_state([])
    for wrong, told in ((None, "NoneType"), ([None], "NoneType"), ([{}, 3], "dict, int")):
        with pytest.raises(TypeError, match=f"aux: expected ModelAux, or a sequence of them, got {told}"):
            model.update_routing_state(wrong)
    for depth in (2, 8):
        _, aux = (other := create_model(name, depth=depth))(*random_inputs(other), return_aux=True)
        with pytest.raises(ValueError, match=f"aux: expected records of 6 blocks, got {depth}"):
            model.update_routing_state(aux)
    x, t, labels = random_inputs(model)
    for number, named in enumerate(("x", "t", "labels")):
        inputs = [x, t, labels]
        inputs[number] = None
        with pytest.raises(TypeError, match=f"^{named}: expected a tensor, got NoneType"):
            model(*inputs)


def test_bfloat16_model_and_autocast_run() -> None:
    torch.manual_seed(0)
    model = randomize(create_model("DSMoE-S-E16", **SMALL_MOE)).eval()
    x, t, labels = random_inputs(model)
    expected = model(x, t, labels)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(x, t, labels)
    low = model.bfloat16()(x.bfloat16(), t, labels)
    for actual in (autocast, low):
        assert (actual.float() - expected).norm() < 0.05 * expected.norm()


FAMILIES = ["DSMoE-digits", "DiffMoE-digits", "TC-DiT-digits", "EC-DiT-digits", "JiTMoE-digits"]


@pytest.mark.parametrize("name", FAMILIES)
def test_activation_checkpointing_changes_nothing(name) -> None:
    """Neither outputs, losses and gradients, nor thresholds and biases, before and after their update."""
    from torch.utils.checkpoint import checkpoint

    results = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        overrides = {"balance": "bias"} if name == "DSMoE-digits" else {}
        model = randomize(create_model(name, depth=4, **overrides))
        x, t, labels = random_inputs(model)
        if recomputed:
            for block in model.blocks:
                block.forward = lambda *args, inner=block.forward: checkpoint(inner, *args, use_reentrant=False)
        before = {key: buffer.clone() for key, buffer in model.named_buffers()}
        out, aux = model(x, t, labels, return_aux=True)
        loss = out.square().sum() + (0 if aux.loss is None else aux.loss)
        loss.backward()
        assert all(torch.equal(buffer, before[key]) for key, buffer in model.named_buffers())
        model.update_routing_state(aux)
        results.append([out, loss, *(p.grad for p in model.parameters() if p.requires_grad), *model.buffers()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    if name == "DiffMoE-digits":
        assert model.blocks[1].mlp.expert_threshold.any()


@pytest.mark.parametrize(
    ("name", "overrides", "error", "message"),
    [
        ("DSMOE-L-E16", {}, ValueError, "did you mean 'DSMoE-L-E16'"),
        ("DiT-S/2", {"depth": "abc"}, TypeError, "depth: expected int, got 'abc'"),
        ("DiT-S/2", {"depth": 2.5}, TypeError, "depth: expected int, got 2.5"),
        ("DiT-S/2", {"learn_sigma": 1}, TypeError, "learn_sigma: expected bool, got 1"),
        ("DiT-S/2", {"class_dropout_prob": None}, TypeError, "class_dropout_prob: expected float, got None"),
        ("DiffMoE-S-E16", {"capacity_schedule": [1000]}, ValueError, r"capacity_schedule: .* got \[1000\]"),
        ("resnet50", {}, ValueError, "unknown model 'resnet50'"),
        ("DiT-S/2", {"num_class": 10}, TypeError, "no configuration field 'num_class'"),
        ("DiT-S/2", {"input_size": 31}, ValueError, "input_size: expected a multiple of patch_size = 2, got 31"),
        ("DiT-S/2", {"input_size": 0}, ValueError, "input_size: expected 1 or more, got 0"),
        ("DiT-S/2", {"patch_size": 0}, ValueError, "patch_size: expected 1 or more, got 0"),
        ("DiT-S/2", {"num_classes": 0}, ValueError, "num_classes: expected 1 or more, got 0"),
        ("DSMoE-S-E16", {"num_dense_blocks": -1}, ValueError, "num_dense_blocks: expected 0 or more, got -1"),
        ("DSMoE-S-E16", {"swiglu": True}, ValueError, "swiglu: expected False"),
        (
            "DSMoE-S-E16",
            {"balance": {}},
            ValueError,
            "balance: expected None, 'bias', 'loss' or a Balance, .*, got {}",
        ),
        ("DSMoE-S-E16", {"scaling_factor": math.nan}, ValueError, "scaling_factor: expected a finite number, got nan"),
        ("DSMoE-S-E16", {"masked_group_fill": math.inf}, ValueError, "masked_group_fill: expected a finite number"),
        ("DSMoE-S-E16", {"mlp_ratio": 0.0}, ValueError, "mlp_ratio: expected an MLP of at least one channel, got 0.0"),
        ("DSMoE-S-E16", {"mlp_ratio": math.inf}, ValueError, "mlp_ratio: expected a finite number, got inf"),
        ("TC-DiT-S-E16", {"num_shared_experts": -1}, ValueError, "num_shared_experts: expected 0 or more, got -1"),
        ("EC-DiT-S-E16", {"num_shared_experts": -1}, ValueError, "num_shared_experts: expected 0 or more, got -1"),
        ("JiT-B/16", {"num_experts": -1}, ValueError, "num_experts: expected 0 or more, got -1"),
        ("JiT-B/16", {"bottleneck_size": 0}, ValueError, "bottleneck_size: expected 1 or more, got 0"),
        ("JiT-B/16", {"context_start": 12}, ValueError, "context_start: expected a block, 0 to 11, got 12"),
        ("JiT-B/16", {"learn_sigma": True}, ValueError, "JiT has none of these"),
        ("DiT-S/2", {"num_heads": 7}, ValueError, "num_heads: expected a divisor of hidden_size = 384, got 7"),
        ("DiT-S/2", {"class_dropout_prob": 1.0}, ValueError, "class_dropout_prob"),
        ("DSMoE-S-E16", {"top_k": 17}, ValueError, "top_k: expected 1 to num_experts = 16, got 17"),
        ("DSMoE-S-E16", {"num_groups": 3}, ValueError, "num_groups: expected a divisor of num_experts = 16, got 3"),
        (
            "DSMoE-S-E16",
            {"num_groups": 16, "top_groups": 1},
            ValueError,
            "1 of 16 groups hold 1 experts, fewer than top_k = 2",
        ),
        ("DSMoE-S-E16", {"head_dim": 10}, ValueError, "head_dim: expected a multiple of 4"),
        ("DSMoE-S-E16", {"rope": "3d"}, ValueError, "rope: expected one of '1d', '2d', None, got '3d'"),
        ("DSMoE-S-E16", {"num_kv_heads": 4}, ValueError, "num_kv_heads: expected a divisor of num_heads = 6, got 4"),
        ("DSMoE-S-E16", {"balance": "los"}, ValueError, "balance: expected None, 'bias', 'loss' or a Balance"),
    ],
)
def test_bad_configurations(name, overrides, error, message) -> None:
    with pytest.raises(error, match=message), torch.device("meta"):
        create_model(name, **overrides)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 1, 16, 16)}, ValueError, r"x: expected shape \(B, 1, 8, 8\), got \(2, 1, 16, 16\)"),
        ({"x": torch.zeros(0, 1, 8, 8)}, ValueError, "at least one sample, got an empty batch"),
        ({"x": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)}, TypeError, "x: expected a floating dtype"),
        ({"t": torch.zeros(3)}, ValueError, r"t: expected shape \(2,\), got \(3,\)"),
        ({"labels": torch.zeros(2)}, TypeError, "labels: expected an integer dtype"),
        ({"labels": torch.zeros(2, 1, dtype=torch.int64)}, ValueError, "labels: expected shape"),
    ],
)
def test_bad_inputs(change, error, message) -> None:
    model = create_model("DSMoE-digits")
    x, t, labels = random_inputs(model, batch=2)
    with pytest.raises(error, match=message):
        model(**({"x": x, "t": t, "labels": labels} | change))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_integer_dtype(dtype) -> None:
    model = randomize(create_model("DSMoE-digits")).eval()
    x, t, labels = random_inputs(model)
    assert torch.equal(model(x, t, labels.to(dtype)), model(x, t, labels))


def test_narrow_labels_may_be_dropped() -> None:
    """uint8 does not hold the null label of 256 classes."""
    model = create_model("DiT-digits", num_classes=256, class_dropout_prob=0.5).train()
    x, t, labels = random_inputs(model)
    assert model(x, t, labels.to(torch.uint8)).isfinite().all()


@pytest.mark.parametrize("name", ["DiffMoE-digits", "TC-DiT-digits", "EC-DiT-digits", "JiT-digits", "JiTMoE-digits"])
def test_the_other_families_train(name) -> None:
    torch.manual_seed(0)
    model = randomize(create_model(name, hidden_size=32, num_heads=4, depth=4))
    out, aux = model(*random_inputs(model, batch=8), return_aux=True)
    (out.square().mean() + (aux.loss if aux.loss is not None else 0)).backward()
    for key, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.isfinite().all(), key
    model.update_routing_state(aux)
    assert (aux.loss is None) == (name not in ("DiffMoE-digits", "TC-DiT-digits"))


def test_samples_of_a_batch_are_independent_where_the_model_says_so() -> None:
    torch.manual_seed(0)
    for name, overrides in {
        "DiT-digits": {},
        "DSMoE-digits": {},
        "TC-DiT-digits": {},
        "EC-DiT-digits": {},
        "JiTMoE-digits": {},
        "DiffMoE-digits": {"inference": "token"},
        "DiffMoE-S-E16": {**SMALL, "num_experts": 4},
        "DSMoE-S-E16": {**SMALL_MOE, "capacity_factor": 0.5},
    }.items():
        model = randomize(create_model(name, **overrides))
        if name.startswith("DiffMoE"):
            for _ in range(20):  # thresholds that choose
                model.update_routing_state(model(*random_inputs(model, batch=16), return_aux=True)[1])
        model.eval()
        x, t, labels = random_inputs(model, batch=8)
        together = model(x, t, labels)
        apart = torch.cat([model(x[i : i + 1], t[i : i + 1], labels[i : i + 1]) for i in range(8)])
        agree = (together - apart).abs().max() < 1e-5 * together.abs().max()
        assert agree != model.mixes_samples, name


@pytest.mark.parametrize("options", [{"num_context_tokens": 0}, {"context_start": 0}, {"shared_expert": False}])
def test_jit_options(options) -> None:
    torch.manual_seed(0)
    model = randomize(create_model("JiTMoE-digits", **options))
    x, t, labels = random_inputs(model)
    out = model(x, t, labels)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert model.null_label == 10 and create_model("JiT-digits", class_dropout_prob=0.0).null_label == 10
