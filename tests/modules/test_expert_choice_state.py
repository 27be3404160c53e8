"""The thresholds of `ExpertChoiceMoE`: how they move, over ranks too, and what leaves them alone; where it may run."""

import copy
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from diffmoe_kernels import ExpertChoiceMoE
from diffmoe_kernels.testing import assert_close

NEVER_UPDATED = "evaluated with thresholds that were never updated"
FULL = {"shared_intermediate_size": 8}


def make(**options):
    return ExpertChoiceMoE(8, 16, 4, **options)


def quantile_of(layer, x, capacity):
    """The capacity-th largest prediction of each expert."""
    predictions = layer.capacity_predictor(x).sigmoid().detach().flatten(0, -2)
    return torch.tensor([sorted(column, reverse=True)[capacity - 1] for column in predictions.t().tolist()])


def record(layer, x):
    return layer(x, return_aux=True)[1]


def trained(**options):
    layer = make(**options)
    layer.update_routing_state(record(layer, torch.randn(3, 8, 8)))
    return layer


@pytest.mark.parametrize("decay, factor", [(0.95, 1.0), (0.0, 2.0), (0.5, 0.5)])
def test_an_update_is_a_moving_average_of_the_quantiles(decay, factor):
    layer = make(threshold_decay=decay, capacity_factor=factor)
    expected = torch.zeros(4)
    for _ in range(3):
        x = torch.randn(3, 8, 8)
        expected = decay * expected + (1 - decay) * quantile_of(layer, x, int(24 / 4 * factor))
        layer.update_routing_state(record(layer, x))
        assert_close(layer.expert_threshold, expected)
    assert expected.min() > 0


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_schedule_of_capacities_compiles(dynamic):
    """A factor that changes is a symbol to Dynamo, and so are the rows."""
    torch.manual_seed(0)
    layer, x = ExpertChoiceMoE(16, 8, 4, dtype=torch.bfloat16), torch.randn(1, 16, 16, dtype=torch.bfloat16)
    compiled = torch.compile(layer, backend="aot_eager", dynamic=dynamic)
    for factor in (4.0, 3.5, 3.0, 1.0):
        layer.capacity_factor = factor
        results = []
        for function in (layer, compiled):
            layer.zero_grad()
            y = function(x)
            y.float().square().sum().backward()
            results.append([y, *(p.grad for p in layer.experts.parameters())])
        for ours, expected in zip(*results, strict=True):
            assert_close(ours, expected)


def test_micro_batches_count_as_one_step():
    layer = make()
    batches = torch.randn(3, 16, 8)
    quantiles = torch.stack([quantile_of(layer, x, 4) for x in batches])
    layer.update_routing_state([record(layer, x) for x in batches])
    assert_close(layer.expert_threshold, 0.05 * quantiles.mean(0))


def test_the_thresholds_converge_to_what_training_chooses():
    """With thresholds at the quantiles, inference passes about as many tokens as training takes."""
    layer, x = make(threshold_decay=0.5), torch.randn(64, 8)
    for _ in range(30):
        layer.update_routing_state(record(layer, x))
    for inference in ("pool", "token"):
        layer.inference = inference
        load = record(layer.eval(), x).expert_load
        layer.train()
        assert ((load >= 15) & (load <= 16)).all()


@pytest.mark.parametrize("training", [True, False])
def test_forward_changes_no_state(training):
    layer = trained(**FULL).train(training)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(9, 8, requires_grad=True)
    record(layer, x)
    checkpoint(layer, x, use_reentrant=False).sum().backward()  # computes forward twice
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_activation_checkpointing_changes_neither_gradients_nor_thresholds():
    results = []
    for run in (lambda layer, x: layer(x, return_aux=True), None):
        torch.manual_seed(1)
        layer, x = trained(**FULL), torch.randn(3, 8, 8)
        y, aux = run(layer, x) if run else checkpoint(layer, x, return_aux=True, use_reentrant=False)
        (y.square().sum() + aux.loss).backward()
        layer.update_routing_state(aux)
        results.append([y, layer.expert_threshold, *(parameter.grad for parameter in layer.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_update_rejects():
    layer = trained()
    before = layer.expert_threshold.clone()
    x = torch.randn(9, 8)
    in_training = record(layer, x)
    in_evaluation = record(layer.eval(), x)
    for wrong in ([], ()):
        with pytest.raises(ValueError, match="aux: expected at least one record of a forward with return_aux=True"):
            layer.update_routing_state(wrong)
    for wrong in (in_evaluation, [in_training, in_evaluation]):
        with pytest.raises(ValueError, match="aux: expected records of forwards in training mode, got one of an eval"):
            layer.update_routing_state(wrong)
    assert torch.equal(layer.expert_threshold, before)


def test_without_a_predictor_there_is_no_state():
    layer = make(predictor=False)
    layer.update_routing_state(record(layer, torch.randn(9, 8)))
    assert not list(layer.buffers())
    with pytest.raises(ValueError, match="aux: expected at least one record"):
        layer.update_routing_state([])


ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, sys
import torch, torch.distributed as dist
from diffmoe_kernels import ExpertChoiceMoE

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
layer = ExpertChoiceMoE(8, 16, 4, threshold_decay=0.5)
torch.manual_seed(rank)
_, aux = layer(torch.randn(16, 8), return_aux=True)
layer.update_routing_state(aux)
print(json.dumps([aux.capacity_quantile.tolist(), layer.expert_threshold.tolist()]))
dist.destroy_process_group()
"""


def test_update_averages_over_ranks(tmp_path):
    command = [sys.executable, "-c", SCRIPT]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        told = [json.loads(process.communicate(timeout=60)[0]) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    quantiles, thresholds = torch.tensor(told).unbind(1)  # (2, 4) each
    assert (quantiles[0] - quantiles[1]).abs().min() > 1e-6  # each rank keeps its own record
    assert torch.equal(*thresholds)
    assert_close(thresholds[0], 0.5 * quantiles.mean(0))


@pytest.mark.parametrize("inference", ["pool", "token"])
def test_the_first_evaluation_without_thresholds_warns_once(inference):
    layer, x = make(inference=inference), torch.randn(9, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)  # training needs none
    with pytest.warns(UserWarning, match=NEVER_UPDATED):
        aux = record(layer.eval(), x)
    assert aux.expert_load.tolist() == [9] * 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)


@pytest.mark.parametrize("how", ["updated", "loaded", "copied", "no predictor"])
def test_no_warning_with_thresholds(how):
    layer = make(predictor=how != "no predictor") if how in ("loaded", "no predictor") else trained()
    if how == "loaded":
        layer.load_state_dict(trained().state_dict())
    elif how == "copied":
        layer = copy.deepcopy(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.eval()(torch.randn(9, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_keeps_the_thresholds(dtype):
    layer = trained(**FULL)
    before = layer.expert_threshold.clone()
    layer.to(dtype)
    assert torch.equal(layer.expert_threshold, before) and layer.expert_threshold.dtype == torch.float32
    assert torch.equal(layer.threshold_decay, torch.tensor([0.95]))
    assert all(parameter.dtype == dtype for parameter in layer.parameters())
    x = torch.randn(3, 8, 8).to(dtype)
    y, aux = layer(x, return_aux=True)
    assert y.dtype == dtype and y.isfinite().all()
    assert aux.loss.dtype == aux.capacity_quantile.dtype == torch.float32
    layer.update_routing_state(aux)
    assert_close(layer.expert_threshold, 0.95 * before + 0.05 * aux.capacity_quantile)
    assert layer.eval()(x).dtype == dtype


def test_updates_go_on_after_half_precision_thresholds():
    layer = make()
    layer.load_state_dict({key: value.bfloat16() for key, value in layer.state_dict().items()}, assign=True)
    _, aux = layer(torch.randn(16, 8).bfloat16(), return_aux=True)
    layer.update_routing_state(aux)
    assert layer.expert_threshold.dtype == torch.float32 and layer.expert_threshold.min() > 0


def test_thresholds_are_float32_whatever_the_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = make()
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.expert_threshold.dtype == layer.threshold_decay.dtype == torch.float32
    assert layer.router.weight.dtype == torch.bfloat16


def test_autocast_keeps_scores_and_losses_in_float32():
    layer, x = trained(**FULL), torch.randn(3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, aux = layer(x, return_aux=True)
        scores = layer.router(x.flatten(0, 1))
        evaluated = layer.eval()(x)
    assert torch.equal(scores, layer.router(x.flatten(0, 1))) and scores.dtype == torch.float32
    assert aux.loss.dtype == aux.capacity_quantile.dtype == torch.float32
    assert y.dtype == evaluated.dtype == torch.bfloat16
    full, exact = layer.train()(x, return_aux=True)
    assert_close(y, full, dtype=torch.bfloat16, tolerance=2e-2)
    assert_close(aux.loss, exact.loss, tolerance=1e-2)
    (y.float().sum() + aux.loss).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_masters_under_half_precision_inputs(dtype):
    masters, x = trained(**FULL), torch.randn(3, 8, 8).to(dtype)
    y, aux = masters(x, return_aux=True)
    expected, exact = masters(x.float(), return_aux=True)
    assert_close(y, expected, dtype=dtype, tolerance=2e-2)
    assert_close(aux.loss, exact.loss, tolerance=1e-2)
    assert masters.router(x.flatten(0, 1)).dtype == torch.float32
    (y.float().sum() + aux.loss).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in masters.parameters())


@pytest.mark.parametrize("inference", ["pool", "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_forward_and_backward_on_the_meta_device(dtype, inference):
    layer = make(device="meta", dtype=dtype, inference=inference, max_capacity_factor=2.0, **FULL)
    x = torch.empty(3, 6, 8, device="meta", dtype=dtype, requires_grad=True)
    y, aux = layer(x, return_aux=True)
    (y.sum() + aux.loss).backward()
    layer.update_routing_state(aux)
    assert (y.shape, y.dtype, x.grad.shape) == (x.shape, dtype, x.shape)
    assert layer.expert_threshold.is_meta
    assert layer.eval()(x).shape == x.shape


def test_meta_construction_then_loading():
    source, x = trained(**FULL), torch.randn(9, 8)
    with torch.device("meta"):
        layer = make(**FULL)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    assigned = make(device="meta", **FULL)
    assigned.load_state_dict(source.state_dict(), assign=True)
    for other in (layer, assigned):
        assert torch.equal(other(x), source(x))
        assert torch.equal(other.eval()(x), copy.deepcopy(source).eval()(x))


def test_state_dict_and_copies():
    layer, x = trained(**FULL), torch.randn(9, 8)
    assert set(layer.state_dict()) == {
        "router.weight", "expert_threshold", "threshold_decay",
        "experts.up_proj", "experts.up_proj_bias", "experts.down_proj", "experts.down_proj_bias",
        "shared_expert.up_proj.weight", "shared_expert.up_proj.bias",
        "shared_expert.down_proj.weight", "shared_expert.down_proj.bias",
        *(f"capacity_predictor.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")),
    }  # fmt: skip
    assert set(make(predictor=False, bias=False).state_dict()) == {
        "router.weight",
        "experts.up_proj",
        "experts.down_proj",
    }
    loaded = make(**FULL, threshold_decay=0.5)
    loaded.load_state_dict(layer.state_dict())
    assert loaded.threshold_decay.item() == layer.threshold_decay.item()
    for other in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        other.update_routing_state(record(other, x))
        assert not torch.equal(other.expert_threshold, layer.expert_threshold)


def test_initialisation():
    layer = ExpertChoiceMoE(64, 8, 256)
    assert layer.router.weight.std().item() == pytest.approx(0.006, rel=0.05)
    assert not layer.expert_threshold.any() and layer.expert_threshold.shape == (256,)
    assert layer.threshold_decay.shape == (1,) and layer.threshold_decay.item() == pytest.approx(0.95)


def test_evaluation_without_values():
    """As memory estimators trace a model."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        layer = ExpertChoiceMoE(8, 16, 4, dtype=torch.bfloat16).eval()
        assert layer(torch.empty(1, 6, 8, dtype=torch.bfloat16)).shape == (1, 6, 8)
