"""The same maths on a GPU as on the CPU, and no host sync in a layer."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch

from benchmarks.steps import Training
from diffmoe_kernels import MoE, RoPEAttention
from diffmoe_kernels.testing import assert_close
from diffmoe_kernels.triton_support import HAS_TRITON
from models import create_model
from models.cuda_graphs import Captured, CapturedModel
from models.data import check_labels
from models.objectives import RectifiedFlow
from models.precision import weights_cast_once
from models.sampling import sample_batches
from models.training.config import TrainConfig
from models.training.trainer import Trainer
from tests.models.helpers import random_inputs, randomize, set_thresholds

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[1]
MIXTURES = ["DSMoE-digits", "DiffMoE-digits", "TC-DiT-digits", "EC-DiT-digits", "JiTMoE-digits"]
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")

LAYERS = {
    "experts": lambda backend: MoE(64, 48, 8, 2, shared_intermediate_size=48, backend=backend),
    "capacity": lambda backend: MoE(64, 48, 8, 2, capacity_factor=1.0, backend=backend),
    "2d": lambda backend: RoPEAttention(64, 4, rope="2d", grid_size=4, qk_norm="rmsnorm", backend=backend),
    "grouped-query": lambda backend: RoPEAttention(64, 4, num_kv_heads=2, rope="1d", backend=backend),
}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_layers_agree_with_the_cpu(layer, backend) -> None:
    on_cpu = layer("reference").double()
    on_gpu = copy.deepcopy(on_cpu).float().cuda()
    for module in on_gpu.modules():
        if hasattr(module, "backend"):
            module.backend = backend
    x = torch.randn(3, 16, 64, dtype=torch.float64, requires_grad=True)
    x_gpu = x.detach().float().cuda().requires_grad_()
    y, y_gpu = on_cpu(x), on_gpu(x_gpu)
    grad = torch.randn_like(y)
    y.backward(grad)
    y_gpu.backward(grad.float().cuda())
    assert_close(y_gpu.cpu(), y.float(), tolerance=1e-5)
    assert_close(x_gpu.grad.cpu(), x.grad.float(), tolerance=1e-5)
    for (name, ours), theirs in zip(on_gpu.named_parameters(), on_cpu.parameters(), strict=True):
        assert_close(ours.grad.cpu(), theirs.grad.float(), tolerance=1e-5, name=name)


def test_moe_waits_for_nothing() -> None:
    """A layer that stops the host could not be captured in a CUDA graph."""
    layer = MoE(64, 48, 8, 2, shared_intermediate_size=48, capacity_factor=1.0, balance="bias").cuda().bfloat16()
    x = torch.randn(4, 16, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()  # the first call may allocate and plan
    torch.cuda.set_sync_debug_mode("error")
    try:
        y, aux = layer(x, return_aux=True)
        y.sum().backward()
        layer.update_routing_state(aux)
    finally:
        torch.cuda.set_sync_debug_mode("default")


COMPILED = {
    "experts": lambda backend: MoE(256, 512, 8, 2, shared_intermediate_size=256, backend=backend),
    "attention": lambda backend: RoPEAttention(256, 4, grid_size=8, qk_norm="rmsnorm", backend=backend),
}


@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("layer", COMPILED.values(), ids=COMPILED.keys())
def test_compiled_in_one_graph_as_eager(layer, backend) -> None:
    layer = layer(backend).cuda().bfloat16()
    x = torch.randn(4, 64, 256, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn_like(x)

    def outcome(call) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        return [y, *torch.autograd.grad(y, [leaf, *layer.parameters()], grad)]

    for ours, expected in zip(outcome(torch.compile(layer, fullgraph=True)), outcome(layer), strict=True):
        assert_close(ours, expected, tolerance=2e-2)


@pytest.mark.parametrize("name", ["DiT-digits", "DSMoE-digits"])
def test_a_training_step_in_bfloat16(name) -> None:
    model = randomize(create_model(name)).cuda()
    x, t, labels = (tensor.cuda() for tensor in random_inputs(model, batch=16))
    with torch.autocast("cuda", torch.bfloat16):
        result = RectifiedFlow().loss(model, x, labels, t=t)
    result.loss.backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", ["DiT-digits", *MIXTURES])
def test_a_training_step_waits_for_nothing(name) -> None:
    """Loss, backward, AdamW, routing state and moving average: the host may run ahead of the GPU."""
    model = randomize(create_model(name, backend="triton" if HAS_TRITON else "auto")).cuda()
    images, _, _ = random_inputs(model, batch=16)
    run = Training(model, torch.bfloat16)
    run.begin()
    step = run.step_on(images.cuda())
    for _ in range(2):  # the second finds AdamW's state, and an average that has begun
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cuda_graph", [False, True], ids=["launched", "replayed"])
def test_the_trainer_reads_no_step_before_the_next(cuda_graph, tmp_path) -> None:
    """A step with its batch, draws, clipped gradients and figures: the last are there once they are asked for."""
    config = TrainConfig("DSMoE-digits", output=str(tmp_path / "run"), device="cuda", cuda_graph=cuda_graph)
    trainer = Trainer(config)
    with trainer.lock, closing(trainer._batches()) as batches:
        for _ in range(Captured.WARM_UP + 1):
            trainer.train_step(*next(batches))
        torch.cuda.set_sync_debug_mode("error")
        try:
            launched = [trainer.launch_step(*next(batches)) for _ in range(2)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        stats = [one.stats() for one in launched]
    assert all(one.grad_norm > 0 for one in stats) and stats[0] != stats[1]


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["DiT-digits", *MIXTURES])
def test_a_captured_run_has_the_same_bits(name, compile, tmp_path) -> None:
    """Weights and records of steps that a CUDA graph replays, label dropout included, and of a run that is resumed."""
    backend = {"backend": "triton"} if HAS_TRITON else {}
    options = {"model": name, "model_options": backend, "precision": "bfloat16", "compile": compile, "device": "cuda"}
    runs = {}
    for cuda_graph in (False, True):
        output, records = str(tmp_path / str(cuda_graph)), []
        config = TrainConfig(output=output, cuda_graph=cuda_graph, batch_size=32, warmup_steps=1, **options)
        for resume in (False, True):
            trainer = Trainer(config, resume=resume)
            with trainer.lock, closing(trainer._batches()) as batches:
                records += [trainer.train_step(*batch) for batch in itertools.islice(batches, 5)]
                trainer.save()
            assert isinstance(trainer.gradients, Captured) == cuda_graph
        runs[cuda_graph] = trainer.model.state_dict(), trainer.averages["ema"].module.state_dict(), records
    for ours, expected in zip(runs[True][:2], runs[False][:2], strict=True):
        assert all(torch.equal(value, expected[key]) for key, value in ours.items())
    assert runs[True][2] == runs[False][2]


OUTSIDE = """
import torch
from models.data import check_labels
check_labels(torch.tensor([0, 9], device="cuda"), 10, wait=False)
torch.cuda.synchronize()
print("those were inside", flush=True)
check_labels(torch.tensor([0, 10], device="cuda"), 10, wait=False)
torch.cuda.synchronize()
"""


def test_labels_outside_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels must be in \[0, 9\] for 10 classes, got \[10\] \(1 of 2 labels\)"):
        check_labels(torch.tensor([0, 10], device="cuda"), 10)


def test_labels_outside_are_refused_by_the_device() -> None:
    """Where nobody waits for it: by an assertion, after which a process can't use the GPU any more."""
    done = subprocess.run([sys.executable, "-c", OUTSIDE], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "those were inside" in done.stdout and done.returncode, done.stderr
    assert "labels must be in [0, 9]" in done.stdout + done.stderr


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["DiT-digits", *MIXTURES])
def test_captured_samples_have_the_same_bits(name, precision) -> None:
    """With guidance, which JiT's first steps leave out, and a last batch of another size."""
    model = randomize(create_model(name, backend="triton" if HAS_TRITON else "auto")).cuda().eval()
    set_thresholds(model, 0.5)
    options = {"cfg_scale": 1.5, "steps": 12, "batch_size": 8, "precision": precision}
    labels = torch.arange(12, device="cuda") % 10
    with weights_cast_once(model, precision):
        expected = torch.cat([*sample_batches(model, labels, **options)])
        found = torch.cat([*sample_batches(CapturedModel(model), labels, **options)])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_model_fits_in_a_graph(name) -> None:
    """A step of sampling, on the kernels where triton is installed: nothing in it waits for the host."""
    model = randomize(create_model(name, backend="triton" if HAS_TRITON else "auto")).cuda().eval()
    inputs = tuple(tensor.cuda() for tensor in random_inputs(model, batch=16))
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        expected = model(*inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(*inputs)
        y.zero_()
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
