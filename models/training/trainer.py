"""The training loop: one optimizer step at a time, with everything that is needed to stop and go on bit for bit."""

import dataclasses
import math
import time
import warnings
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from models.cuda_graphs import Captured
from models.data import check_labels, load_dataset
from models.files import FileLock, write_atomically
from models.objectives import objective_for
from models.options import read_yaml, to_yaml
from models.progress import progress_bar
from models.sampling import check_decodable
from models.training.batches import ShuffledBatches, load_batches
from models.training.checkpoints import checkpoint_path, list_checkpoints, load_newest, save_checkpoint
from models.training.config import TrainConfig
from models.training.gradients import Gradients
from models.training.interrupt import StopOnSignal
from models.training.loading import (
    check_forward,
    check_model_config,
    compile_blocks,
    load_weights,
    model_overrides,
    pick_device,
    trainable_model,
)
from models.training.lock import run_lock
from models.training.logs import RunLog, read_metrics, save_loss_curves
from models.training.outcome import LaunchedStep, NonFiniteError, StepStats, TrainResult
from models.training.processes import Processes
from models.training.samples import save_samples
from models.training.state import MovingAverage, environment, random_state, restore_random_state, seed_process

CONFIG_FILE = "config.yaml"


class Trainer:
    """A training run in a directory of its own.

    The directory holds `config.yaml`, `checkpoints/`, `samples/`, `metrics.jsonl`, `loss.png` and `tensorboard/`.
    Training draws from torch's global generators, which the constructor seeds, or restores.

    Where torch has a process group, every process makes a trainer and calls the same methods. Each trains on its share
    of a batch, gradients and routing state are combined, the first process writes the files.

    Args:
        config: the options.
        resume: continue the run in `config.output` from its newest readable checkpoint, or from the start if it was
            stopped before the first one. On the same machine, device, thread count and versions the result is the
            same, bit for bit, as without the stop (with more than two processes but for the order in which gradients
            are added). Another learning rate, gradient clip or precision is taken with a warning: by the same ones a
            run would meet the same NaN again; so is another number of processes.

    Raises:
        ValueError: another run trains into the directory; several processes without a group, or whose number does not
            divide the batch; a CUDA graph without a GPU; options, data and model do not fit together;
            without `resume`, the directory holds a run; with it, the directory holds none, or one of another model or
            other options.
    """

    def __init__(self, config: TrainConfig, *, resume: bool = False) -> None:
        self.processes = Processes.current()
        self.config, self.run = config, Path(config.output)
        share = self.processes.share_size(config.batch_size, config.accumulation)
        before = self._found()
        saved = self._find_saved(resume)
        self.device = pick_device(config.device)
        if config.cuda_graph:
            Captured.check_device(self.device)
        self.data = load_dataset(
            config.data, image_size=config.image_size, flip=config.flip, autoencoder=config.autoencoder
        )
        self.model_overrides = model_overrides(config.model_options, self.data)

        check_forward(config.model, self.model_overrides, share // config.accumulation)
        torch.manual_seed(config.seed)
        self.model = trainable_model(config.model, self.model_overrides).to(self.device).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        decays = {"ema": config.ema_decay, "ema2": config.ema_decay2}
        self.averages = {name: MovingAverage(self.model, decay) for name, decay in decays.items() if decay is not None}
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            config.learning_rate,
            (0.9, config.beta2),
            weight_decay=config.weight_decay,
            fused=self.device.type == "cuda" or None,  # on a CPU torch's choice
        )
        self.objective = objective_for(self.model, config.objective, **config.objective_options)
        # What samples can't be drawn by is refused now, not when the first are due.
        self.objective.pick_method(config.sample_method, config.sample_steps)
        check_decodable(self.model, self.data.autoencoder)
        self.step, self.checkpoint, self.sampled = 0, None, None
        self.window: list[StepStats] = []  # of the steps since the last record
        self.launched: list[LaunchedStep] = []  # and not yet in the window
        self.times: list[float] = []  # seconds that those of them took that this process has done
        if self.processes.rank:
            seed_process(config.seed, self.processes.rank)
        if saved:
            self._restore(*saved)
        # What is called in training. A graph does not hold what goes from process to process.
        replica = self.processes.replicate(self.model, average=not config.cuda_graph)
        self.gradients = Gradients(replica, self.objective, self.processes, config.precision, config.accumulation)
        self.prepared = False
        self._prepare()

        self.processes.wait()  # until all have looked into the directory
        self.lock = self._take(before) if self.processes.is_first else nullcontext()

    def fit(self) -> TrainResult:
        """Train until the steps are done, the time is up or a signal asks to stop; then write a checkpoint and,
        unless it was a signal, a record of the last steps, a sample grid and the loss curve.

        Raises:
            NonFiniteError: the loss, a gradient or a weight is NaN or infinite; no checkpoint has any of that step.
            OSError, ValueError: an image can't be read; a checkpoint of the step before is left.
        """
        config, start = self.config, self.step
        total = config.steps if config.max_minutes is None else None  # with a time limit nobody knows
        deadline = math.inf if config.max_minutes is None else time.monotonic() + 60 * config.max_minutes
        seconds = 0.0
        with (
            self.lock,
            StopOnSignal() as stop,
            self._open_log() as log,
            progress_bar(total=total, initial=start, desc=config.model, unit="step", disable=log is None) as bar,
            closing(self._batches()) as batches,
        ):
            while not (ended_by := self._reason_to_end(stop, deadline)):
                started = time.perf_counter()
                self.launched.append(self.launch_step(*self._next(batches)))
                logs = self.step == 1 or self.step % config.log_every == 0
                self._collect(all_but=not logs)  # the GPU has the last one to do meanwhile
                self.times.append(time.perf_counter() - started)
                seconds += self.times[-1]
                if self.window:
                    bar.set_postfix_str(f"loss {self.window[-1].loss:.4f}, {self._speed():.0f} images/s", refresh=False)
                bar.update()
                if logs:
                    self._log(log)
                if self.step % config.checkpoint_every == 0:
                    self.save()
                if self.step % config.sample_every == 0:
                    self.save_samples()
            self.save()
            if ended_by != "signal":
                if self.window:  # after the checkpoint, by which a longer run writes this record anew
                    self._log(log)
                self.save_samples()
                if log:
                    save_loss_curves(self.run / "loss.png", {config.model: read_metrics(self.run)})
            self.processes.wait()
        speed = (self.step - start) * config.batch_size / seconds if seconds else 0.0
        return TrainResult(self.step, speed, self.checkpoint, ended_by)

    def train_step(self, images: Tensor, labels: Tensor) -> StepStats:
        """`launch_step`, and what it came to.

        Raises:
            NonFiniteError: the loss or a gradient is NaN or infinite, and with it the weights.
        """
        return self._stats(self.launch_step(images, labels))

    def launch_step(self, images: Tensor, labels: Tensor) -> LaunchedStep:
        """One optimizer step on a batch of `data.train`: (N, ...) images and (N,) int64 labels, this process's share.

        Flips, latents, times and noise are drawn for all of them: cutting them into parts does not change them. A GPU
        is not waited for.
        """
        if hasattr(self.model, "set_training_step"):  # a capacity schedule
            self.model.set_training_step(self.step)
            self._prepare()
        check_labels(labels, self.model.num_classes)  # before they are on a GPU, where that is harder to read
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        images = images if self.data.draw is None else self.data.draw(images)
        t, noise = self.objective.draw_times(len(images), self.device), torch.randn_like(images)
        totals, auxes = self.gradients(images, labels, t, noise)
        gradients = [one.grad for one in self.parameters if one.grad is not None]
        if self.config.cuda_graph:
            self.processes.average_(gradients)
        grad_norm = get_total_norm(gradients)
        if self.config.grad_clip is not None:  # else a pass over all gradients would multiply them by 1
            clip_grads_with_norm_(self.parameters, self.config.grad_clip, grad_norm)
        launched = LaunchedStep(self.step + 1, torch.stack([*self.processes.mean(totals), grad_norm]))

        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_of(self.step + 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.update_routing_state(auxes)
        for ema in self.averages.values():
            ema.update_parameters(self.model)
        self.step += 1
        return launched

    def save(self) -> None:
        """Write a checkpoint of this step, if there is none yet.

        Raises:
            NonFiniteError: the loss, a gradient or a weight is NaN or infinite; nothing is written.
        """
        if self.checkpoint == checkpoint_path(self.run, self.step):
            return
        state = self.state_dict()
        for name in ("model", *self.averages):
            for key, value in state[name].items():
                if not value.isfinite().all():
                    raise self._non_finite(f"{key} of the {name} weights holds NaN or infinity", self.step)
        self.checkpoint = checkpoint_path(self.run, self.step)
        if self.processes.is_first:
            save_checkpoint(self.run, state, keep=self.config.keep_checkpoints)

    def save_samples(self) -> None:
        """Write a grid of samples of the averaged weights, a column per class, if the first process has not yet.

        Raises: as `save` does.
        """
        self._collect()  # else a loss that is not finite would be told as that of images
        if self.sampled == self.step or not self.processes.is_first:
            return
        self.sampled = self.step
        path = self.run / "samples" / f"step-{self.step:08d}.png"
        save_samples(path, self.averages["ema"].module, self.objective, self.config, self.data)

    def state_dict(self) -> dict[str, Any]:
        """All that the run's future depends on, in tensors and plain values; each process must ask for it."""
        self._collect()
        rng, *further_rng = self.processes.gather(random_state(self.device))
        return {
            "step": self.step,
            "model_name": self.config.model,
            "model_overrides": self.model_overrides,
            "model_config": dataclasses.asdict(self.model.config),
            "train_config": dataclasses.asdict(self.config),
            "model": self.model.state_dict(),
            **{name: ema.module.state_dict() for name, ema in self.averages.items()},
            "autoencoder": self.data.autoencoder,
            "class_names": list(self.data.class_names),
            "optimizer": self.optimizer.state_dict(),
            "rng": rng,
            "further_rng": further_rng,
            "window": [dataclasses.astuple(stats) for stats in self.window],
            "environment": self._environment(),
        }

    def _collect(self, all_but: int = 0) -> None:
        """Waits for the launched steps' figures, but for those of so many of the last."""
        while len(self.launched) > all_but:
            self.window.append(self._stats(self.launched.pop(0)))

    def _stats(self, launched: LaunchedStep) -> StepStats:
        stats = launched.stats()
        if not (math.isfinite(stats.loss) and math.isfinite(stats.grad_norm)):
            raise self._non_finite(f"the loss is {stats.loss} and the gradient's norm {stats.grad_norm}", launched.step)
        return stats

    def _prepare(self) -> None:
        """Compiles and captures, if that is asked for, once a scheduled capacity, a constant to both, is final."""
        schedule = getattr(self.model.config, "capacity_schedule", None)
        if self.prepared or schedule and self.step < schedule[1]:
            return
        self.prepared = True
        if self.config.compile:
            if self.processes.count > 1:  # else cut further, to exchange gradients within a block
                torch._dynamo.config.optimize_ddp = False
            compile_blocks(self.model)
        if self.config.cuda_graph:
            self.gradients = Captured(self.gradients, self.device, self.parameters)

    def _found(self) -> tuple[bool, list[Path]]:
        """Whether the directory holds a run's options, and its checkpoints."""
        return (self.run / CONFIG_FILE).exists(), list_checkpoints(self.run)

    def _take(self, before: tuple[bool, list[Path]]) -> FileLock:
        """A hold on the directory, until `fit` ends or until this is gone; `before` is what it held at first."""
        self.run.mkdir(parents=True, exist_ok=True)
        lock = run_lock(self.run)
        if self._found() != before:
            raise ValueError(
                f"another process has trained into {self.run} meanwhile: resume, or choose another --output"
            )
        write_atomically(self.run / CONFIG_FILE, lambda file: file.write(to_yaml(self.config).encode()))
        return lock

    def _open_log(self) -> AbstractContextManager[RunLog | None]:
        """The first process's, which has the records up to the last one written before this step."""
        if not self.processes.is_first:
            return nullcontext()
        return closing(RunLog(self.run, self.step - len(self.window)))

    def _find_saved(self, resume: bool) -> tuple[Path, dict[str, Any]] | None:
        config_file = self.run / CONFIG_FILE
        holds_run = any(self._found())
        if holds_run and not resume:
            raise ValueError(f"{self.run} holds another run: continue it with --resume, or choose another --output")
        if resume and not holds_run:
            raise ValueError(f"{self.run} holds no run to resume: leave --resume out, or correct --output")
        found = load_newest(self.run)
        if found:
            self.config.check_resumable_from(found[1]["train_config"], found[0])
        elif resume:
            self.config.check_resumable_from(read_yaml(config_file), config_file)
        return found

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        check_model_config(self.model, state, path)
        was, now = state.get("class_names", []), list(self.data.class_names)
        if was != now:
            raise ValueError(
                f"{self.data.name} has other classes than {path} was trained on, {sorted({*was} ^ {*now})[:5]} among "
                "them: labels would change their meaning; restore the folder, or start a new run"
            )
        load_weights(self.model, state["model"], path)
        for name, ema in self.averages.items():
            load_weights(ema.module, state[name], path)
            ema.n_averaged.fill_(state["step"])
        for group in state["optimizer"]["param_groups"]:  # which would take the place of this device's
            group["fused"] = self.optimizer.defaults["fused"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.window = [StepStats(*stats) for stats in state.get("window", [])]
        self.checkpoint = path
        rank, states = self.processes.rank, [state["rng"], *state.get("further_rng", [])]
        if rank < len(states):
            restore_random_state(states[rank], self.device)
        else:
            seed_process(self.config.seed, rank, self.step)
        was, now = {"processes": 1, **state["environment"]}, self._environment()
        changed = self.config.changes_since(state["train_config"])
        changed += [f"{name} {was[name]} -> {now[name]}" for name in now if was.get(name, now[name]) != now[name]]
        if changed:
            warnings.warn(f"resumed, but not bit for bit: {', '.join(changed)} since {path} was written", stacklevel=3)

    def _environment(self) -> dict[str, Any]:
        how = {"training images": len(self.data.train), "compile": self.config.compile}
        return {**environment(self.device), **how, "processes": self.processes.count}

    def _batches(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        """From this step on."""
        config, pin_memory = self.config, self.device.type == "cuda"
        order = ShuffledBatches(len(self.data.train), config.batch_size, config.seed, start=self.step)
        shares = map(self.processes.share, order)
        return load_batches(self.data.train, shares, workers=config.workers, pin_memory=pin_memory)

    def _reason_to_end(self, stop: StopOnSignal, deadline: float) -> str | None:
        stopped, late = self.processes.any(stop.requested, time.monotonic() >= deadline)
        if stopped:
            return "signal"
        if self.step >= self.config.steps:
            return "steps"
        return "time" if late else None

    def _next(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """A batch; where an image or a disk fails, in any process, a checkpoint is left before that is raised."""
        try:
            batch, error = next(batches), None
        except Exception as caught:  # between two steps any of them leaves a state to go on from
            batch, error = None, caught
        if self.processes.any(error is not None)[0]:
            self.save()
            raise error or OSError("another process could not load its images, it says why")
        return batch

    def _speed(self) -> float:
        """Images per second since the last record."""
        return len(self.times) * self.config.batch_size / sum(self.times)

    def _log(self, log: RunLog | None) -> None:
        """Record the means, and the speed, since the last record."""
        means = {
            field.name: sum(getattr(stats, field.name) for stats in self.window) / len(self.window)
            for field in dataclasses.fields(StepStats)
        }
        progress = {
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "epoch": self.step * self.config.batch_size / len(self.data.train),
        }
        if self.times:  # else an earlier process did these steps
            progress["images_per_second"] = self._speed()
        self.window, self.times = [], []
        if log:
            log.write(self.step, {**means, **progress})

    def _non_finite(self, what: str, step: int) -> NonFiniteError:
        good = "there is no checkpoint yet: resume, which starts over,"
        if self.checkpoint:
            good = f"the last good checkpoint is {self.checkpoint}: resume from it"
        return NonFiniteError(
            f"step {step}: {what}; training stopped, {good} "
            "with a lower --learning-rate, a smaller --grad-clip or --precision float32"
        )
