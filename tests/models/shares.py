"""What one of several processes does for `test_processes`; torchrun starts this module in each."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from contextlib import closing
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.training import processes
from models.training.config import TrainConfig
from models.training.processes import process_group
from models.training.trainer import Trainer
from tests.models.emulated_graphs import Graph, emulate
from tests.models.runs import tiny

SIZES = {"hidden_size": 16, "depth": 2, "num_heads": 2}
FAMILIES = {
    "DiT-digits": SIZES,
    "DSMoE-digits": {**SIZES, "num_experts": 4, "moe_intermediate_size": 8, "balance": "bias"},
    "DiffMoE-digits": {**SIZES, "num_experts": 4},
    "TC-DiT-digits": {**SIZES, "num_experts": 4},
    "EC-DiT-digits": {**SIZES, "num_experts": 4},
    "JiT-digits": {**SIZES, "context_start": 1},
    "JiTMoE-digits": {**SIZES, "num_experts": 4, "moe_intermediate_size": 8, "context_start": 1, "balance": "loss"},
}


def family_run(output: Path, name: str) -> TrainConfig:
    """A run of 16 images a step, of which each of two processes has 8, in parts of 3, 3 and 2."""
    options = {"batch_size": 16, "accumulation": 3, "grad_clip": None, "ema_decay2": 0.5}
    return TrainConfig(name, output=str(output / name), model_options=FAMILIES[name], **options)


def step_with_gradients(trainer: Trainer, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """A step from weights that are nowhere zero: its gradients, and what it recorded."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    gradients: dict[str, Tensor] = {}
    take_step = trainer.optimizer.step

    def note_and_step() -> None:
        gradients.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
        take_step()

    trainer.optimizer.step = note_and_step
    stats = trainer.train_step(images, labels)
    trainer.optimizer.step = take_step
    return {"gradients": gradients, "stats": asdict(stats)}


def train_family(output: Path, name: str) -> dict[str, Any]:
    trainer = Trainer(family_run(output, name))
    with closing(trainer._batches()) as batches:
        batch, random = next(batches), torch.get_rng_state()
        told = {"batch": batch, "random": random, **step_with_gradients(trainer, *batch)}
        trainer.train_step(*next(batches))  # in which DistributedDataParallel tells what had no gradient
    weights = {"model": trainer.model, **{name: average.module for name, average in trainer.averages.items()}}
    return {**told, "weights": {name: model.state_dict() for name, model in weights.items()}}


def stop_and_go_on(output: Path) -> None:
    """A run of six steps, and one that stops after three."""
    Trainer(tiny(output / "straight", steps=6)).fit()
    Trainer(tiny(output / "parts", steps=3, sample_every=1)).fit()
    torch.manual_seed(999)
    Trainer(tiny(output / "parts", steps=6), resume=True).fit()


def go_on_from_one(run: Path) -> list[str]:
    """A run that one process began; what resuming it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Trainer(tiny(run, steps=4), resume=True)
    trainer.fit()
    return [str(warning.message) for warning in caught if "bit for bit" in str(warning.message)]


def stop_one(output: Path, rank: int) -> str:
    """A signal that reaches the second process alone."""
    trainer = Trainer(tiny(output / "stopped", steps=100))
    launch = trainer.launch_step

    def step_and_signal(*batch: Tensor) -> Any:
        if rank == 1 and trainer.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return launch(*batch)

    trainer.launch_step = step_and_signal
    result = trainer.fit()
    return f"{result.ended_by} {result.step}"


class Damaged:
    """Images of which none can be read after the first 10."""

    def __init__(self, images: Any) -> None:
        self.images, self.read = images, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        self.read += 1
        if self.read > 10:
            raise OSError("the disk is gone")
        return self.images[index]


def fail_one(output: Path, rank: int) -> str:
    """Images that the second process alone can't read."""
    trainer = Trainer(tiny(output / "failed", steps=100))
    if rank == 1:
        trainer.data = replace(trainer.data, train=Damaged(trainer.data.train))
    try:
        trainer.fit()
    except OSError as error:
        return str(error)
    return "no error"


def train_captured(output: Path) -> bool:
    """Whether weights are the same bits where gradients are averaged after a CUDA graph, emulated here."""
    weights = []
    for cuda_graph in (False, True):
        if cuda_graph:
            emulate(setattr)
            processes.PIECE = 1000  # bytes, so that there are several
        trainer = Trainer(tiny(output / f"captured-{cuda_graph}", cuda_graph=cuda_graph, ema_decay=0.5, accumulation=2))
        with closing(trainer._batches()) as batches:
            for batch in islice(batches, 6):
                trainer.train_step(*batch)
        weights.append({**trainer.model.state_dict(), **trainer.averages["ema"].module.state_dict(prefix="average.")})
    return Graph.replays == 3 and all(torch.equal(one, weights[0][key]) for key, one in weights[1].items())


def start_from_the_first(rank: int) -> bool:
    """Whether a model that is not wrapped takes the first process's weights."""
    model = torch.nn.Linear(3, 3)
    with torch.no_grad():
        model.weight.fill_(rank)
    processes.Processes.current().replicate(model, average=False)
    return not model.weight.any()


def main(output: Path) -> None:
    torch.set_num_threads(1)
    with process_group("cpu"):
        rank = torch.distributed.get_rank()
        told: dict[str, Any] = {name: train_family(output, name) for name in FAMILIES}
        stop_and_go_on(output)
        told |= {"resumed": go_on_from_one(output / "one"), "stopped": stop_one(output, rank)}
        told |= {"failed": fail_one(output, rank), "captured": train_captured(output)}
        told["equal"] = start_from_the_first(rank)
        torch.save(told, output / f"rank-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
