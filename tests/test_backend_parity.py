"""What the second parity measures, that it passes where it should, and that it fails where a backend is broken."""

import json
from functools import partial

import pytest
import torch

from benchmarks import backend_parity
from benchmarks.parity import backends
from benchmarks.parity.backends import Measure, Trained, blobs, compare_backends, train
from diffmoe_kernels.triton_support import INTERPRETED
from models import create_model
from tests.models.runs import one_thread

TINY = {"hidden_size": 16, "depth": 2, "num_heads": 2, "num_experts": 4}
BATCHES = blobs(12, 8)

needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs Triton, interpreted")


def tiny(backend):
    return create_model("DSMoE-digits", **TINY, moe_intermediate_size=8, backend=backend)


def tiny_diffmoe(backend):
    return create_model("DiffMoE-digits", **TINY, backend=backend)


def tiny_jitmoe(backend):
    return create_model("JiTMoE-digits", **TINY, context_start=1, moe_intermediate_size=8, backend=backend)


@pytest.fixture(autouse=True)
def threads():
    with one_thread():
        yield


@pytest.mark.parametrize("make_model", [tiny, tiny_diffmoe, tiny_jitmoe])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pytorchs_own_path_ends_where_the_reference_does(make_model, dtype):
    measures = compare_backends(make_model, BATCHES, backend="torch", dtype=dtype)
    assert [one.name for one in measures] == ["final loss", "loss curve", "prediction"]
    for one in measures:
        assert one.spread > 1e-3 and one.passes, one
        if dtype == torch.float32:
            assert one.distance < 1e-3 * one.spread, one


def test_the_reference_is_at_no_distance_from_itself():
    assert [one.distance for one in compare_backends(tiny, BATCHES, backend="reference")] == [0.0, 0.0, 0.0]


@needs_interpreter
@pytest.mark.parametrize("make_model", [tiny, tiny_diffmoe, tiny_jitmoe])
def test_the_kernels_end_where_the_reference_does(make_model):
    """A few steps in Triton's interpreter; `test_gpu_parity.py` has all on a GPU."""
    for one in compare_backends(make_model, blobs(5, 4), backend="triton"):
        assert one.passes, one


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options",
    [
        ("DSMoE-digits", {"moe_intermediate_size": 16}),
        ("DiffMoE-digits", {}),
        ("JiTMoE-digits", {"moe_intermediate_size": 16, "context_start": 1}),
    ],
)
def test_200_steps_on_the_kernels_end_where_the_reference_does(name, options):
    def make_model(backend):
        return create_model(name, hidden_size=32, depth=2, num_heads=2, num_experts=4, **options, backend=backend)

    for one in compare_backends(make_model, blobs(200, 8), backend="triton"):
        print(name, one)
        assert one.passes, one


def wrong_gradient(backend):
    """The weights of the experts learn the wrong way round."""
    model = tiny(backend)
    if backend == "torch":
        for name, parameter in model.named_parameters():
            if "adaLN" not in name and parameter.requires_grad:
                parameter.register_hook(torch.neg)
    return model


def wrong_weights(backend):
    """The initial weights are others, as of a seed of its own."""
    if backend == "torch":
        torch.rand(1)
    return tiny(backend)


def wrong_output(backend):
    model = tiny(backend)
    if backend == "torch":
        model.final_layer.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    return model


@pytest.mark.parametrize("make_model", [wrong_gradient, wrong_weights, wrong_output])
def test_a_broken_backend_fails(make_model):
    measures = {one.name: one for one in compare_backends(make_model, BATCHES, backend="torch")}
    assert not measures["prediction"].passes, measures


def test_measures_by_hand(monkeypatch):
    """Losses of 40 steps fall from a start to an end; window and choice of the spread are those of the docstring."""

    def ended(end, prediction):
        return Trained(torch.cat([torch.ones(20), torch.full((20,), end)]).double(), torch.tensor([prediction, 0.0]))

    runs = {("reference", 0): ended(0.50, 1.0), ("reference", 1): ended(0.60, 1.5), ("reference", 2): ended(0.80, 2.0)}
    runs["torch", 0] = ended(0.55, 1.2)
    monkeypatch.setattr(backends, "train", lambda make, batches, *, backend, seed, dtype: runs[backend, seed])
    final, curve, prediction = compare_backends(tiny, BATCHES, backend="torch")
    assert (final.distance, final.spread) == pytest.approx((0.05, 0.30))
    # Of 21 running means number i holds i of the last steps: 210 / 420 of a difference at the end, on average.
    assert (curve.distance, curve.spread) == pytest.approx((0.025, 0.05))
    assert (prediction.distance, prediction.spread) == pytest.approx((0.2, 0.25))
    assert final.passes and curve.passes and prediction.passes
    assert not Measure("loss", 0.2, 0.1).passes and not Measure("loss", float("nan"), 0.1).passes


def test_a_run_is_a_function_of_its_seed():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    run = partial(train, tiny, BATCHES[:3], backend="reference", dtype=torch.bfloat16)
    first, again, other = run(seed=0), run(seed=0), run(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.losses.shape == (3,) and first.prediction.shape == (8, 1, 8, 8)
    assert torch.equal(first.losses, again.losses) and torch.equal(first.prediction, again.prediction)
    assert not torch.isclose(first.losses, other.losses).any()


def test_the_routing_state_is_updated_once_a_step():
    calls = []

    def counted(backend):
        model = tiny_diffmoe(backend)
        update = model.update_routing_state
        model.update_routing_state = lambda aux: calls.append(len(aux)) or update(aux)
        return model

    train(counted, BATCHES[:3], backend="torch", seed=0, dtype=torch.float32)
    assert calls == [1, 1, 1]


def test_training_gets_somewhere():
    losses = train(tiny, blobs(80, 16), backend="torch", seed=0, dtype=torch.float32).losses
    assert losses[-10:].mean() < 0.8 * losses[:10].mean()


def test_no_batches_and_losses_that_are_not_finite():
    with pytest.raises(ValueError, match="batches must hold at least one"):
        compare_backends(tiny, [], backend="torch")
    images, labels = BATCHES[0]
    with pytest.raises(ValueError, match="backend 'torch', seed 0: .*not finite"):
        compare_backends(tiny, [(images * float("nan"), labels)], backend="torch")


def test_blobs_show_their_class():
    (images, labels), (others, _) = blobs(2, 200, seed=3)
    assert images.shape == (200, 1, 8, 8) and images.min() >= -1 and images.max() <= 1 and images.max() > 0.9
    assert not torch.equal(images, others) and torch.equal(images, blobs(1, 200, seed=3)[0][0])
    means = torch.stack([images[labels == label].mean(0).flatten() for label in range(10)])
    nearest = torch.cdist(images.flatten(1), means).argmin(1)
    assert (nearest == labels).float().mean() > 0.8


def run(*arguments):
    return backend_parity.main(["--models", "DSMoE-digits", "--steps", "2", *arguments])


def test_the_command_prints_and_writes(tmp_path, capsys):
    file = tmp_path / "new" / "parity.json"
    assert run("--backend", "reference", "--output", str(file)) == 0
    printed = capsys.readouterr().out
    assert "says nothing about the kernels" in printed and "| DSMoE-digits | prediction | 0.00e+00 |" in printed
    measures = json.loads(file.read_text())["models"]["DSMoE-digits"]
    assert [one["name"] for one in measures] == ["final loss", "loss curve", "prediction"]
    assert all(one["distance"] == 0 < one["spread"] for one in measures)


def test_the_command_fails_beyond_the_spread(monkeypatch, capsys):
    monkeypatch.setattr(backend_parity, "compare_backends", lambda *_, **__: [Measure("final loss", 0.2, 0.1)])
    assert run() == 1
    assert "| 2.00e-01 | 1.00e-01 | **beyond** |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "cuda"], "there is no 'cuda' backend"),
        (["--backend", "fast"], "backend: expected one of"),
        (["--steps", "0"], "batches must hold at least one"),
        (["--models", "DSMoE-digit"], "did you mean 'DSMoE-digits'"),
    ],
)
def test_the_command_refuses(capsys, arguments, message):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
