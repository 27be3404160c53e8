"""`TrainConfig`: the one place where a training option is named, typed, defaulted and explained."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models.objectives import Method, ObjectiveName
from models.options import default_of, flag, option, plain, require
from models.precision import Precision


@dataclass(frozen=True)
class TrainConfig:
    """All options of a training run; a run directory's `config.yaml` holds one, ready for `--config`.

    Raises:
        ValueError: a number out of its range, naming the option.
    """

    model: str = option("DSMoE-digits", "name of the model, one of `python -m models.list`")
    model_options: dict[str, Any] = option({}, "fields of the model's config to override, such as '{depth: 4}'")
    objective: ObjectiveName = option("auto", "flow, jit or ddpm; auto is jit for JiT and JiTMoE, else flow")
    objective_options: dict[str, Any] = option({}, "settings of the objective, such as '{noise_scale: 2.0}' for jit")
    data: str = option(
        "digits",
        "digits, a folder of class folders of images, or one that models.encode wrote",
        change_on_resume="warn",
    )
    image_size: int | None = option(None, "of an image folder: side that images are cut and scaled to, 256 by default")
    flip: bool = option(True, "of an image folder: mirror images at random")
    autoencoder: str | None = option(None, "of an image folder: train on latents of this diffusers AutoencoderKL")
    output: str = option("runs/train", "run directory to create", change_on_resume=True)
    seed: int = option(0, "seed of the weights, of the data order and of the training noise")

    steps: int = option(2000, "optimizer steps to train for, counted from the start of the run", change_on_resume=True)
    max_minutes: float | None = option(None, "stop early after this time in this process", change_on_resume=True)
    batch_size: int = option(64, "images per optimizer step (512 of the published latent models)", alias="batch")
    accumulation: int = option(
        1,
        "parts a batch is cut into, each with its own backward pass, to save memory; DiffMoE's experts choose in each",
    )
    learning_rate: float = option(
        1e-3, "AdamW's learning rate after warm-up (1e-4 is usual for latent models)", change_on_resume="warn"
    )
    warmup_steps: int = option(100, "steps over which the learning rate rises linearly from 0")
    beta2: float = option(0.999, "AdamW's decay of the squared gradient")
    weight_decay: float = option(0.0, "AdamW's weight decay")
    grad_clip: float | None = option(
        1.0, "largest gradient norm, larger ones are scaled down; null for no limit", change_on_resume="warn"
    )
    ema_decay: float = option(0.995, "decay of the averaged weights, which samples come from (0.9999 for long runs)")
    ema_decay2: float | None = option(None, "decay of a second average (JiT keeps 0.9999 and 0.9996); null for none")
    precision: Precision = option(
        "float32", "tf32 allows a GPU that, bfloat16 runs the model under autocast", change_on_resume="warn"
    )

    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto takes the GPU if there is one", change_on_resume=True)
    compile: bool = option(False, "compile the model's blocks, after a capacity_schedule if any", change_on_resume=True)
    cuda_graph: bool = option(
        False,
        "on a GPU: launch forward and backward as one CUDA graph, for models or batches so small that the host is "
        "slower than the GPU; several processes then average gradients after the backward, not within it",
        change_on_resume=True,
    )
    workers: int = option(0, "processes that load data", change_on_resume=True)

    log_every: int = option(20, "steps between records of the mean loss", change_on_resume=True)
    checkpoint_every: int = option(500, "steps between checkpoints; one more at the end", change_on_resume=True)
    keep_checkpoints: int = option(3, "how many of the newest checkpoints are kept", change_on_resume=True)
    sample_every: int = option(500, "steps between sample grids; one more at the end", change_on_resume=True)
    sample_rows: int = option(4, "rows of the sample grid, a column per class", change_on_resume=True)
    sample_method: Method | None = option(None, "sampler, the objective's usual one by default", change_on_resume=True)
    sample_steps: int | None = option(
        None, "steps of the samples, as usual for the sampler by default", change_on_resume=True
    )
    sample_cfg_scale: float = option(
        1.5, "guidance of the samples, for models trained with label dropout; 1 for none", change_on_resume=True
    )

    def __post_init__(self) -> None:
        for name in ("model_options", "objective_options"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        counts = ("steps", "batch_size", "accumulation", "sample_rows", "keep_checkpoints")
        for name in (*counts, "log_every", "checkpoint_every", "sample_every"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        require(self, "image_size", self.image_size is None or self.image_size >= 1, "at least 1")
        require(self, "sample_steps", self.sample_steps is None or self.sample_steps >= 1, "at least 1")
        for name in ("warmup_steps", "weight_decay", "workers"):
            require(self, name, getattr(self, name) >= 0, "at least 0")
        require(self, "seed", 0 <= self.seed < 2**63, "from 0 to 2^63 - 1")
        require(self, "sample_cfg_scale", math.isfinite(self.sample_cfg_scale), "a finite number")
        require(self, "learning_rate", self.learning_rate > 0, "above 0")
        require(self, "beta2", 0 <= self.beta2 < 1, "in [0, 1)")
        require(self, "ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")
        require(self, "ema_decay2", self.ema_decay2 is None or 0 <= self.ema_decay2 < 1, "in [0, 1), or null for none")
        require(self, "grad_clip", self.grad_clip is None or self.grad_clip > 0, "above 0, or null for no limit")
        require(self, "max_minutes", self.max_minutes is None or self.max_minutes > 0, "above 0, or null for no limit")
        require(self, "accumulation", self.accumulation <= self.batch_size, f"at most batch_size, {self.batch_size}")

    def learning_rate_of(self, step: int) -> float:
        """That of a step, counted from 1: it rises linearly during warm-up."""
        return self.learning_rate * (min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0)

    def check_resumable_from(self, saved: dict[str, Any], source: Path, *, exactly: bool = False) -> None:
        """Refuse to continue a run under options that would make it another run.

        Args:
            saved: the options the run was started with, as `dataclasses.asdict` gives them.
            source: the checkpoint they were read from, for the message.
            exactly: refuse what changes the weights, too, and is allowed with a warning (see `changes_since`).

        Raises:
            ValueError: naming the first option that differs and must not, and both values.
        """
        for spec in dataclasses.fields(self):
            now = getattr(self, spec.name)
            was = saved.get(spec.name, default_of(spec))  # what a run had before there was the option
            allowed = spec.metadata["change_on_resume"]
            if was != now and (not allowed or exactly and allowed == "warn"):
                unsaved = f", or remove {source}: that run has no checkpoint yet" if source.suffix == ".yaml" else ""
                raise ValueError(
                    f"{spec.name} is {now!r}, but {source} was written by a run with {was!r}: leave "
                    f"--{flag(spec.name)} out to resume that run, or start a new one with another --output{unsaved}"
                )

    def changes_since(self, saved: dict[str, Any]) -> list[str]:
        """What a resumed run has otherwise, to get past a loss that is not finite, or because its data has moved."""
        names = [spec.name for spec in dataclasses.fields(self) if spec.metadata["change_on_resume"] == "warn"]
        return [
            f"{name} {saved[name]} -> {getattr(self, name)}"
            for name in names
            if name in saved and saved[name] != getattr(self, name)
        ]
