"""Mixtures of experts against dense models of their activated size, over seeds: `python -m benchmarks.fid_parity`.

By default on the digits on a CPU, by digits-FD; on ImageNet by FID-50K with `--data LATENTS --inception FILE
--reference FILE`. A stopped comparison goes on where it was, and more `--steps` or `--seeds` add to what is there.
"""

import dataclasses
import json
import math
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.parity.report import ModelResult, SeedResult, comparisons, format_report
from benchmarks.parity.runs import Run, RunError, carry_out_all
from benchmarks.parity.scoring import DigitsScorer, FidScorer, Scorer
from models import count_parameters, create_model, list_models
from models.data import DataSplits, load_dataset
from models.objectives import JiTFlow, Method, objective_for
from models.options import build_config, command_line, config_parser, option, require
from models.precision import Precision
from models.sample import SampleConfig
from models.training.config import TrainConfig
from models.training.loading import model_overrides, pick_device
from models.training.lock import remove_runs
from models.training.logs import late_error, machine, save_seed_curves
from models.training.trainer import NonFiniteError

# What an option is where it is not given: of the digits, and of anything larger.
DIGITS: dict[str, Any] = {
    "models": ["DiT-digits", "DSMoE-digits", "DiffMoE-digits", "JiT-digits", "JiTMoE-digits"],
    **{"steps": 1200, "batch_size": 64, "learning_rate": 1e-3, "ema_decay": 0.995},
    **{"checkpoint_every": 500, "num_samples": 500, "sample_method": "euler", "sample_steps": 50},
    "precision": "float32",
}
LARGE: dict[str, Any] = {  # as the latent models were trained whose FIDs are published, see `NOTES_OF_FID`
    "models": ["DiT-L/2", "DSMoE-L-E16", "DSMoE-L-E48", "DiffMoE-L-E16"],
    **{"steps": 700_000, "batch_size": 512, "learning_rate": 1e-4, "ema_decay": 0.9999},
    **{"checkpoint_every": 10_000, "num_samples": 50_000, "precision": "tf32"},
}
LARGE_TRAINING: dict[str, Any] = {"grad_clip": None, "warmup_steps": 0}
EULER_STEPS = 250  # of theirs
NOT_OF_RESULTS = ("output", "overwrite", "jobs", "workers", "device", "checkpoint_every")
RECORDS = 120  # of the loss, in a run
PART_SIZE = 5120  # samples that a stop loses at most; whole batches, since DiffMoE's samples depend on theirs


def _by_data(name: str, help: str, **more: Any) -> Any:
    """An option whose default depends on the data."""
    words = [" ".join(map(str, value)) if isinstance(value, list) else value for value in (DIGITS[name], LARGE[name])]
    return option(None, f"{help}; {words[0]} for the digits, else {words[1]}", **more)


@dataclass(frozen=True)
class ParityConfig:
    """All options of `python -m benchmarks.fid_parity`.

    Raises:
        ValueError: a number out of its range, options that do not go together, an unknown model, or a mixture of
            experts without its dense counterpart.
    """

    output: str = option("runs/fid_parity", "directory for the runs, the pictures, the table and the JSON file")
    data: str = option("digits", "digits, a folder of latents that models.encode wrote, or an image folder for JiT")
    models: list[str] | None = _by_data("models", "models, mixtures and their dense counterparts", items=str)
    seeds: int = option(3, "runs of each model, seeded 0, 1, ...; one has no spread, and no verdict")
    steps: int | None = _by_data("steps", "optimizer steps of every run")
    batch_size: int | None = _by_data("batch_size", "images per step", alias="batch")
    accumulation: int = option(1, "parts of a batch, one after another; DiffMoE's experts choose within a part")
    learning_rate: float | None = _by_data("learning_rate", "of all models")
    ema_decay: float | None = _by_data("ema_decay", "decay of the averaged weights, which samples come from")
    checkpoint_every: int | None = _by_data("checkpoint_every", "steps between checkpoints of a run")
    precision: Precision | None = _by_data("precision", "tf32 allows a GPU that, bfloat16 is autocast")
    compile: bool = option(False, "train and sample with torch.compile")
    cuda_graph: bool = option(False, "on a GPU: train and sample from CUDA graphs")
    num_samples: int | None = _by_data("num_samples", "samples of each run, as many of each class")
    sample_method: Method | None = option(None, "sampler; euler for the digits, else the objective's usual one")
    sample_steps: int | None = option(
        None, f"its steps; 50 for the digits, {EULER_STEPS} for latents by euler, else as usual for the sampler"
    )
    cfg_scale: float = option(1.0, "guidance of the samples, 1 for none")
    inception: str | None = option(None, "file of Inception's weights, for FID; it stays unmeasured without")
    reference: str | None = option(None, ".npz of the reference batch's statistics, as ADM ships it, for FID")
    jobs: int | None = option(
        None, "runs side by side, a thread each; by default one per GPU, on a CPU as many as threads"
    )
    workers: int = option(0, "processes of each run that load data")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto takes the GPU if there is one")
    overwrite: bool = option(False, "start anew: delete what --output holds of these models")

    def __post_init__(self) -> None:
        for name, value in self.defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("seeds", "steps", "num_samples"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        require(self, "cfg_scale", math.isfinite(self.cfg_scale), "a finite number")
        require(self, "jobs", self.jobs is None or self.jobs >= 1, "at least 1")
        if self.is_digits:
            require(self, "num_samples", self.num_samples == DIGITS["num_samples"], "500 for the digits")
            for name in ("inception", "reference"):
                require(self, name, getattr(self, name) is None, "left out for the digits, which have a distance")
        missing = "reference" if self.reference is None else "inception"
        require(self, missing, (self.inception is None) == (self.reference is None), "given, FID needs both files")
        with torch.device("meta"):
            for name in self.models:
                create_model(name)  # a wrong name is told before anything is trained
        for name in self.models:
            dense = dense_counterpart(name)
            require(
                self, "models", dense in (None, *self.models), f"complete: with {dense}, which {name} is compared to"
            )

    @property
    def is_digits(self) -> bool:
        return self.data == "digits"

    @property
    def defaults(self) -> dict[str, Any]:
        """Of the options that were not given."""
        return DIGITS if self.is_digits else LARGE

    def command(self) -> str:
        """The command line that gives the same results."""
        usual = [name for name, value in self.defaults.items() if getattr(self, name) == value]
        return command_line("benchmarks.fid_parity", self, {*NOT_OF_RESULTS, *usual})


def dense_counterpart(name: str) -> str | None:
    """The dense model that has a mixture's activated size: "DiT-L/2" of "DSMoE-L-E16". None for a dense model.

    Raises:
        ValueError: there is no such model.
    """
    family, size = re.match(r"(.*(?:DiT|JiT|MoE))-([^-]+)", name).groups()
    if family in ("DiT", "JiT"):
        return None
    dense = f"JiT-{size}" if family == "JiTMoE" else f"DiT-{size}" if size == "digits" else f"DiT-{size}/2"
    if dense not in list_models():
        raise ValueError(f"{name} has no dense counterpart of its activated size, {dense} does not exist: leave it out")
    return dense


def make_run(config: ParityConfig, model: str, seed: int) -> Run:
    """The run of a model and seed. Its samples' folder is named after all that they depend on besides the training."""
    folder = Path(config.output) / model.replace("/", "-") / f"seed-{seed}"
    sample_steps = config.sample_steps
    if sample_steps is None and config.sample_method in (None, "euler") and not _is_jit(model):
        sample_steps = EULER_STEPS
    sampler = f"{config.sample_method or 'usual'}-{sample_steps or 'usual'}"
    drawn = f"step-{config.steps}_{config.num_samples}_cfg-{config.cfg_scale:g}_{sampler}"
    train = TrainConfig(
        model=model,
        data=config.data,
        output=str(folder),
        seed=seed,
        steps=config.steps,
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        learning_rate=config.learning_rate,
        ema_decay=config.ema_decay,
        precision=config.precision,
        compile=config.compile,
        cuda_graph=config.cuda_graph,
        device=config.device,
        workers=config.workers,
        log_every=max(1, config.steps // RECORDS),
        checkpoint_every=config.checkpoint_every,
        sample_every=config.steps,
        sample_method=config.sample_method,
        sample_steps=sample_steps,
        **({} if config.is_digits else LARGE_TRAINING),
    )
    sample = SampleConfig(
        checkpoint=str(folder),
        output=str(folder / "samples" / drawn / "parts"),
        join=str(folder / "samples" / drawn / "samples.npz"),
        num_samples=config.num_samples,
        part_size=PART_SIZE,
        method=config.sample_method,
        steps=sample_steps,
        cfg_scale=config.cfg_scale,
        seed=seed,
        precision=config.precision,
        compile=config.compile,
        cuda_graph=config.cuda_graph,
        device=config.device,
    )
    return Run(train, sample)


def run_parity(config: ParityConfig) -> str | None:
    """Train, sample and score every model and seed; returns the report, or None where a signal stopped it.

    `config.output` gets `parity.md`, `parity.json`, `loss.png`, `samples.png` and a folder per model.

    Raises:
        OSError, ValueError: files that can't be read, options that do not fit the data or an earlier run in the output.
        NonFiniteError, RunError: a run failed.
    """
    data, device = load_dataset(config.data, flip=False), pick_device(config.device)
    fid = "FID-50K" if config.num_samples == 50_000 else f"FID of {config.num_samples} samples"
    files = config.inception, config.reference
    fid_scorer = None if config.is_digits else FidScorer(fid, data, config.num_samples, *files, device)
    runs = {name: [make_run(config, name, seed) for seed in range(config.seeds)] for name in config.models}
    if config.overwrite:
        folders = [runs[name][0].folder.parent for name in config.models]
        remove_runs([run for folder in folders for run in folder.glob("seed-*")])
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    by_seed = [run for runs_of_seed in zip(*runs.values(), strict=True) for run in runs_of_seed]
    jobs = config.jobs or (torch.get_num_threads() if device.type == "cpu" else torch.cuda.device_count())
    if not carry_out_all(by_seed, min(jobs, len(by_seed))):
        return None
    scorer = fid_scorer or DigitsScorer(data)
    results = [_result(name, runs[name], data, scorer) for name in config.models]
    return _write(config, device, runs, results, scorer, data)


def _is_jit(name: str) -> bool:
    """Whether a model is trained by JiT's objective."""
    with torch.device("meta"):
        return isinstance(objective_for(create_model(name)), JiTFlow)


def _result(name: str, runs: Sequence[Run], data: DataSplits, scorer: Scorer) -> ModelResult:
    seeds = []
    for run in runs:
        seeds.append(SeedResult(run.train.seed, late_error(run.records()), scorer.score(run.archive)))
    total, activated = count_parameters(_on_meta(name, data))
    return ModelResult(name, dense_counterpart(name), activated, total, runs[0].train.steps, tuple(seeds))


def _on_meta(name: str, data: DataSplits) -> torch.nn.Module:
    with torch.device("meta"):
        return create_model(name, **model_overrides({}, data))


def _write(
    config: ParityConfig,
    device: torch.device,
    runs: dict[str, list[Run]],
    results: Sequence[ModelResult],
    scorer: Scorer,
    data: DataSplits,
) -> str:
    output = Path(config.output)
    panels: dict[str, dict[str, list]] = {}
    for name in config.models:
        panel = panels.setdefault("JiT's objective" if _is_jit(name) else "rectified flow", {})
        panel[name] = [run.records() for run in runs[name]]
    save_seed_curves(output / "loss.png", panels)
    scorer.save_grid(output / "samples.png", {name: runs[name][0].archive for name in config.models})
    origin = f"`{config.command()}`, {machine(device)}"
    report = f"{format_report(results, scorer.name)}\n\n{origin}"
    (output / "parity.md").write_text(f"{report}\n")
    compared = {
        name: comparison and {**dataclasses.asdict(comparison), "verdict": comparison.verdict}
        for name, comparison in comparisons(results).items()
    }
    record = {
        "origin": origin,
        "config": dataclasses.asdict(config),
        "distance": scorer.name,
        "models": [dataclasses.asdict(result) for result in results],
        "comparisons": compared,
    }
    (output / "parity.json").write_text(json.dumps(record, indent=2) + "\n")
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 130 where Ctrl-C ended it, 1 where a run failed, 2 for bad options."""
    try:
        description = "Compare mixtures of experts with dense models."
        parser = config_parser(ParityConfig, prog="python -m benchmarks.fid_parity", description=description)
        config = build_config(ParityConfig, parser.parse_args(arguments))
        report = run_parity(config)
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (NonFiniteError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while it sampled or scored
        report = None
    if report is None:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    output = Path(config.output)
    print(f"\n{report}\n\nPictures: {output / 'loss.png'}, {output / 'samples.png'}; numbers: {output / 'parity.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
