"""What happens within a training step: schedules, compiled blocks, clipping."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.training.config import TrainConfig
from models.training.logs import read_metrics
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
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self) or compile(self, backend="aot_eager"))
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


@pytest.mark.parametrize(("grad_clip", "passes"), [(None, 0), (0.5, 1), (1e9, 1)])
def test_gradients_are_multiplied_only_where_they_are_clipped(grad_clip, passes, tmp_path):
    """Of a billion parameters a pass is 8 GB, 2 ms of a step."""
    trainer = Trainer(tiny(tmp_path / "run", grad_clip=grad_clip))
    batches, count = iter(trainer._batches()), 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal count
            count += function is torch.ops.aten._foreach_mul_.Tensor
            return function(*args, **(kwargs or {}))

    with Count():
        stats = trainer.train_step(*next(batches))
    assert count == passes and stats.grad_norm > 0.5


def test_blocks_are_compiled_once_their_capacity_is_final(tmp_path, monkeypatch):
    """Else each step of a schedule would be compiled anew, up to torch.compile's limit."""
    compiled_at: list[int] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled_at.append(trainer.step))
    sizes = {"hidden_size": 16, "depth": 2, "num_heads": 2, "capacity_schedule": [1, 3]}
    config = TrainConfig("DiffMoE-digits", output=str(tmp_path / "run"), model_options=sizes, steps=5, compile=True)
    trainer = Trainer(config)
    trainer.fit()
    assert compiled_at == [3, 3]
    trainer = Trainer(replace(config, steps=6), resume=True)
    trainer.fit()
    assert compiled_at == [3, 3, 5, 5]
