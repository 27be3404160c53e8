"""The runs of a comparison, one per model and seed: trained and sampled, several side by side, stopped and gone on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from models.options import read_yaml
from models.sample import SampleConfig, sample_to_files
from models.training.config import TrainConfig
from models.training.interrupt import StopOnSignal
from models.training.logs import read_metrics
from models.training.trainer import CONFIG_FILE, Trainer

LOG_FILE = "log.txt"  # of a run in a process of its own
STOPPED = 3  # exit status of a process that a signal stopped


class RunError(RuntimeError):
    """A run in a process of its own failed, which has printed why."""


@dataclass(frozen=True)
class Run:
    """One model and seed: what is trained and what is then drawn from it, in parts that are joined."""

    train: TrainConfig
    sample: SampleConfig

    @property
    def folder(self) -> Path:
        return Path(self.train.output)

    @property
    def title(self) -> str:
        return f"{self.train.model}, seed {self.train.seed}"

    @property
    def archive(self) -> Path:
        """All samples in one file, written last and whole; which ones is told by the name of their folder."""
        return Path(self.sample.join)

    @property
    def options_file(self) -> Path:
        """It is there as soon as the run was begun."""
        return self.folder / CONFIG_FILE

    def check(self) -> None:
        """Refuse a run directory that was begun with options that give other weights.

        Raises:
            ValueError: naming the option.
        """
        if self.options_file.exists():
            self.train.check_resumable_from(read_yaml(self.options_file), self.options_file, exactly=True)

    def records(self) -> list[dict[str, Any]]:
        """The records of training up to the step that was sampled."""
        return [record for record in read_metrics(self.folder) if record["step"] <= self.train.steps]


def carry_out_all(runs: Sequence[Run], jobs: int) -> bool:
    """Train and sample what is not there yet; False where a signal stopped it, and another call goes on from there.

    Args:
        runs: in the order in which they start.
        jobs: runs side by side, each in a process of one thread that writes what it prints to the run's log.txt, with
            GPUs by turns; 1 carries them out in this process, with its threads.

    Raises:
        ValueError: a run directory holds a run of other options, or one that is trained further.
        NonFiniteError: as `Trainer.fit`, where jobs is 1.
        RunError: a run in a process of its own failed; the others are stopped, with checkpoints.
    """
    for run in runs:
        run.check()
    missing, start = [run for run in runs if not run.archive.exists()], time.monotonic()
    done = len(runs) - len(missing)
    with contextlib.closing(_side_by_side(missing, jobs) if jobs > 1 else _one_by_one(missing)) as finished:
        for run in finished:
            done += 1
            minutes = (time.monotonic() - start) / 60
            print(f"{run.title} is done, {done} of {len(runs)} after {minutes:.1f} minutes", flush=True)
    return done == len(runs)


def carry_out(run: Run) -> bool:
    """Train and sample; False where a signal stopped the training, with a checkpoint.

    Raises:
        ValueError: the run is trained further than it should be.
        NonFiniteError: as `Trainer.fit`.
    """
    result = Trainer(run.train, resume=run.options_file.exists()).fit()
    if result.ended_by == "signal":
        return False
    if result.step != run.train.steps:
        raise ValueError(
            f"{run.folder} is trained for {result.step} steps, but steps is {run.train.steps}: "
            "raise --steps to that, or choose another --output"
        )
    sample_to_files(run.sample)
    return True


def _one_by_one(runs: Sequence[Run]) -> Generator[Run]:
    """Each run as it is finished, until a signal asks to stop."""
    for run in runs:
        if not carry_out(run):
            return
        yield run


def _side_by_side(runs: Sequence[Run], jobs: int) -> Generator[Run]:
    """The same with `jobs` processes."""
    context = multiprocessing.get_context("spawn")  # a fork would share the threads of this process
    waiting, going, free = deque(runs), dict[int, tuple[BaseProcess, Run, int]](), list(range(jobs))
    with StopOnSignal() as stop:
        try:
            while (going or waiting) and not stop.requested:
                while waiting and free:
                    run, place = waiting.popleft(), free.pop(0)
                    process = context.Process(target=_carry_out_alone, args=(run, place))
                    process.start()
                    going[process.sentinel] = process, run, place
                for sentinel in wait(going, timeout=0.5):
                    process, run, place = going.pop(sentinel)
                    process.join()
                    free.append(place)
                    if process.exitcode == STOPPED:
                        return
                    if process.exitcode != 0:
                        raise RunError(
                            f"{run.title} failed with exit status {process.exitcode}, for the reason above; "
                            f"what it printed before is in {run.folder / LOG_FILE}"
                        )
                    yield run
        finally:
            for process, *_ in going.values():
                process.terminate()  # on which one that trains writes a checkpoint
            for process, *_ in going.values():
                process.join()


def _carry_out_alone(run: Run, place: int) -> None:
    """What a process of its own does, the `place`-th; it hears of Ctrl-C from its parent alone, by one signal."""
    os.setsid()
    torch.set_num_threads(1)
    if run.train.device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())
    run.folder.mkdir(parents=True, exist_ok=True)
    with (
        open(run.folder / LOG_FILE, "a", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        ended = carry_out(run)
    sys.exit(0 if ended else STOPPED)
