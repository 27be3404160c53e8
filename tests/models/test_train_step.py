"""What happens within a training step: schedules, compiled blocks, clipping, the moving average."""

import copy
import pickle
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from models import create_model
from models.training.checkpoints import list_checkpoints
from models.training.config import TrainConfig
from models.training.logs import read_metrics
from models.training.outcome import LaunchedStep, NonFiniteError
from models.training.state import MovingAverage
from models.training.trainer import Trainer
from tests.models.runs import one_thread, tiny


@pytest.fixture(autouse=True)
def threads():
    with one_thread():
        yield


def test_the_trainer_follows_a_capacity_schedule(tmp_path, monkeypatch):
    seen = []
    options = {"capacity_schedule": [1, 3], "num_experts": 4, "depth": 2, "hidden_size": 16, "num_heads": 2}
    trainer = Trainer(
        TrainConfig(
            model="DiffMoE-digits", model_options=options, output=str(tmp_path), steps=5, batch_size=8, sample_steps=1
        )
    )
    layer = trainer.model.blocks[1].mlp
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *a, **k: seen.append(layer.capacity_factor) or forward(*a, **k))
    trainer.fit()
    assert seen == [4, 4, 2.5, 1, 1]
    assert layer.expert_threshold.all(), "thresholds moved with every step"
    assert trainer.averages["ema"].module.blocks[1].mlp.expert_threshold.all()


def test_blocks_are_compiled_one_by_one(tmp_path, monkeypatch):
    """As they are timed; what is saved, copied and averaged knows nothing of it."""
    compiled, compile = [], nn.Module.compile

    def note(self, dynamic):
        compiled.append(self)
        compile(self, backend="aot_eager", dynamic=dynamic)

    monkeypatch.setattr(nn.Module, "compile", note)
    trainer = Trainer(tiny(tmp_path / "run", steps=2, compile=True))
    assert compiled == list(trainer.model.blocks)
    trainer.fit()
    plain = Trainer(tiny(tmp_path / "plain", steps=2))
    assert trainer.model.state_dict().keys() == plain.model.state_dict().keys()
    plain.fit()
    losses = [[record["loss"] for record in read_metrics(tmp_path / name)] for name in ("run", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert copy.deepcopy(trainer.model).state_dict().keys() == trainer.model.state_dict().keys()
    assert pickle.loads(pickle.dumps(trainer.averages["ema"].module)).config == trainer.model.config
    with pytest.warns(UserWarning, match="compile True -> False"):
        resumed = Trainer(tiny(tmp_path / "run", steps=3), resume=True)
    assert resumed.fit().step == 3 and len(compiled) == len(trainer.model.blocks)


class Calls(TorchDispatchMode):
    """How often each operator is called."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("grad_clip", "passes"), [(None, 0), (0.5, 1), (1e9, 1)])
def test_gradients_are_multiplied_only_where_they_are_clipped(grad_clip, passes, tmp_path):
    """Of a billion parameters a pass is 8 GB, 2 ms of a step."""
    trainer = Trainer(tiny(tmp_path / "run", grad_clip=grad_clip))
    batches = iter(trainer._batches())
    with Calls() as calls:
        stats = trainer.train_step(*next(batches))
    assert calls.count[torch.ops.aten._foreach_mul_.Tensor] == passes and stats.grad_norm > 0.5


@pytest.mark.parametrize(
    ("every", "read_at"),
    [({}, [1, 3, 4, 5, 6, 6]), ({"log_every": 4}, [1, 3, 4, 4, 6, 6]), ({"checkpoint_every": 3}, [1, 3, 3, 5, 6, 6])],
)
def test_a_step_is_launched_before_the_figures_of_the_last_are_read(every, read_at, tmp_path, monkeypatch):
    """So that a GPU has work meanwhile; records and checkpoints have the figures of their own step."""
    read, stats = {}, LaunchedStep.stats
    monkeypatch.setattr(LaunchedStep, "stats", lambda self: read.update({self.step: trainer.step}) or stats(self))
    trainer = Trainer(tiny(tmp_path / "run", steps=6, **{"log_every": 100, **every}))
    trainer.fit()
    assert [read[step] for step in range(1, 7)] == read_at
    assert not trainer.launched and [record["step"] for record in read_metrics(trainer.run)][-1] == 6


@pytest.mark.parametrize("every", ["sample_every", "checkpoint_every", "log_every"])
def test_a_loss_that_is_not_finite_is_told_as_such(every, tmp_path):
    """Before the samples, a checkpoint or a record of a step, though it is read after the next one's launch."""
    rates = {"warmup_steps": 0, "learning_rate": 1e30, "grad_clip": None}
    trainer = Trainer(tiny(tmp_path / "run", steps=8, **{"log_every": 100, every: 2}, **rates))
    with pytest.raises(NonFiniteError, match="step 2: the loss is .* there is no checkpoint yet"):
        trainer.fit()
    assert not (trainer.run / "samples").exists() and not list_checkpoints(trainer.run)
    assert [record["step"] for record in read_metrics(trainer.run)] == [1]


@pytest.mark.parametrize("name", ["DSMoE-digits", "DiffMoE-digits"])
def test_a_moving_average_is_the_library_s(name):
    """Bit for bit; each update is one call for all weights and a copy of each saved buffer, and moves nothing to
    another device, for which the host would wait."""
    model = create_model(name, depth=4)
    ours, library = MovingAverage(model, 0.9), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    aten, num_buffers = torch.ops.aten, len(model.state_dict()) - len([*model.parameters()])
    for update in range(3):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(torch.randn_like(tensor))
        with Calls() as calls:
            ours.update_parameters(model)
        assert calls.count[aten._foreach_lerp_.Scalar] == (update > 0)
        assert calls.count[aten.copy_.default] == num_buffers >= 2 and not calls.count[aten._to_copy.default]
        library.update_parameters(model)
        assert ours.n_averaged == library.n_averaged
        expected = library.module.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in ours.module.state_dict().items())
    assert not ours.module.training and not any(one.requires_grad for one in ours.parameters())


def test_blocks_are_compiled_once_their_capacity_is_final(tmp_path, monkeypatch):
    """Else each step of a schedule would be compiled anew, up to torch.compile's limit."""
    compiled_at: list[int] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compiled_at.append(trainer.step))
    sizes = {"hidden_size": 16, "depth": 2, "num_heads": 2, "capacity_schedule": [1, 3]}
    config = TrainConfig("DiffMoE-digits", output=str(tmp_path / "run"), model_options=sizes, steps=5, compile=True)
    trainer = Trainer(config)
    trainer.fit()
    assert compiled_at == [3, 3]
    trainer = Trainer(replace(config, steps=6), resume=True)
    trainer.fit()
    assert compiled_at == [3, 3, 5, 5]
