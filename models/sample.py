"""Sample images from a trained model: `python -m models.sample --checkpoint runs/train --output samples`."""

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.cuda_graphs import Captured, CapturedModel
from models.data import check_labels, image_shape, iterate_images, join_npz, save_grid, save_npz
from models.data.npz import load_origin
from models.data.samples import WHOLE, check_request, part_name
from models.objectives import Method, ObjectiveName, objective_for
from models.options import build_config, config_parser, option, require
from models.precision import Precision, weights_cast_once
from models.progress import progress_bar
from models.sampling import balanced_labels, check_decodable, sample_batches, to_images
from models.training.loading import (
    TrainedModel,
    Weights,
    compile_blocks,
    load_published,
    load_trained,
    pick_device,
)
from models.training.processes import Processes, process_group

GRID_COLUMNS, GRID_ROWS = 10, 10  # shown at most
PATIENCE = timedelta(days=1)  # with the other processes, some of which draw a part more


@dataclass(frozen=True)
class SamplerConfig:
    """The options of every command that draws images from a checkpoint.

    Raises:
        ValueError: a number out of its range, naming the option.
    """

    checkpoint: str = option("runs/train", "run directory, or a checkpoint file", alias="ckpt")
    output: str = option("output", "directory for what is written")
    official: str | None = option(
        None, "YAML file of the official model that --checkpoint is of: its target and params"
    )
    weights: Weights | None = option(
        None, "ema, ema2 or model (last step); default: ema of a run, the first there of --official"
    )
    num_samples: int = option(100, "how many images, as many of each class")
    classes: list[int] | None = option(None, "labels to sample, all by default", items=int)
    method: Method | None = option(None, "sampler: euler, heun (two calls a step), dopri5; for ddpm ancestral, ddim")
    steps: int | None = option(None, "sampler's steps; 50, and 250 for ancestral, by default")
    objective: ObjectiveName | None = option(None, "of an official model: ddpm where it was trained with that")
    objective_options: dict[str, Any] = option({}, "settings of the objective to change, such as '{noise_scale: 2.0}'")
    cfg_scale: float = option(1.5, "guidance towards the class, 1 for none")
    seed: int = option(0, "seed of the noise")
    batch_size: int = option(256, "images at a time; DiffMoE's official rule chooses among them", alias="batch")
    precision: Precision = option(
        "float32", "tf32 allows a GPU that, bfloat16 runs the model under autocast, with weights cast once"
    )
    compile: bool = option(False, "compile the model's blocks, for many samples")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto takes the GPU if there is one")

    def __post_init__(self) -> None:
        for name in ("num_samples", "steps", "batch_size"):
            require(self, name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        require(self, "seed", -(2**63) <= self.seed < 2**63, "an integer of 64 bits")
        require(self, "cfg_scale", math.isfinite(self.cfg_scale), "a finite number")
        require(self, "classes", self.classes is None or len(self.classes) > 0, "at least one label")
        fine = self.objective is None or self.official is not None
        require(self, "objective", fine, "left out without --official, a run has its own")

    def load(self, name: str | None = None) -> TrainedModel:
        """The model that the options name, on its device, and its objective.

        Args:
            name: the model's, where a checkpoint of any other shall be refused.

        Raises:
            OSError, ValueError: no usable checkpoint.
        """
        device, options = pick_device(self.device), self.objective_options
        if self.official is None:
            weights = self.weights or "ema"
            found = load_trained(self.checkpoint, weights=weights, name=name, objective_options=options, device=device)
        else:
            model = load_published(self.checkpoint, Path(self.official), weights=self.weights).to(device)
            found = TrainedModel(model, objective_for(model, self.objective or "auto", **options), None)
        if self.compile:
            compile_blocks(found.model)
        return found

    def draw(self, trained: TrainedModel, labels: Tensor, *, first: int = 0, **changes: Any) -> Iterator[Tensor]:
        """`sample_batches` of a model by these options, but for `changes`."""
        options: dict[str, Any] = {
            "objective": trained.objective,
            "seed": self.seed,
            "steps": self.steps,
            "method": self.method,
            "cfg_scale": self.cfg_scale,
            "batch_size": self.batch_size,
            "precision": self.precision,
        }
        return sample_batches(trained.model, labels, first=first, **{**options, **changes})


@dataclass(frozen=True)
class SampleConfig(SamplerConfig):
    """All options of `python -m models.sample`; see `SamplerConfig`."""

    output: str = option("samples", "directory for grid.png and samples.npz")
    model: str | None = option(None, "name of the model you expect; a checkpoint of another one is refused")
    first: int = option(0, "number of the first image, where this call draws a part of a larger run: of several GPUs")
    part_size: int | None = option(
        None,
        "images per file (a multiple of --batch-size is best); a call that was stopped goes on after the last file",
    )
    join: str | None = option(None, "with --part-size: .npz to write all files into, as the ADM evaluator takes it")
    unconditional: bool = option(False, "sample without a class, for models trained with label dropout, and unguided")
    autoencoder: str | None = option(None, "decoder of latents, where not the one that the model was trained with")
    cuda_graph: bool = option(False, "on a GPU: call the model from CUDA graphs, for small models or batches")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "part_size", self.part_size is None or self.part_size >= 1, "at least 1")
        require(self, "first", self.first >= 0, "at least 0")
        fine = self.join is None or self.part_size is not None
        require(self, "join", fine, "left out without --part-size, since all is in one file already")
        reason = "left out with --first: when all are there, the command for all of them with --join joins them"
        require(self, "join", self.join is None or self.first == 0, reason)
        require(self, "join", self.join is None or not Path(self.join).is_dir(), "the path of a file")
        fine = self.model is None or self.official is None
        require(self, "model", fine, "left out with --official")
        require(self, "classes", self.classes is None or not self.unconditional, "left out with --unconditional")


def sample_to_files(config: SampleConfig) -> tuple[Path, list[Path]]:
    """Sample as `config` says; returns the paths of the grid and of the `.npz` files, whose `labels` are the classes.

    The files are one `samples.npz`; or, with `first` or `part_size`, parts named by the number of their first image.
    All parts of a run together hold what one call writes into one file. With `part_size`, those that are there stay,
    and where torch has a process group, the processes share what is missing; all of them call this.

    Raises:
        TypeError, ValueError: no usable checkpoint, labels out of range, or a request that the model can't meet; a part
            that is there, but was sampled otherwise.
    """
    processes = Processes.current()
    if processes.count > 1 and config.part_size is None:
        raise ValueError(f"{processes.count} processes share the parts of a run: pass --part-size")
    trained = config.load(config.model)
    model, decoder = trained.model, config.autoencoder or trained.autoencoder
    if config.cuda_graph:
        Captured.check_device(next(model.parameters()).device)
    check_decodable(model, decoder)
    _check_parts(config, model)
    end = config.first + config.num_samples
    if config.unconditional:
        # Without a null label this is the label that would be it, which the sampler refuses by its reason.
        classes, labels, cfg_scale = [], torch.full((end,), model.num_classes), 1.0
    else:
        classes = list(range(model.num_classes)) if config.classes is None else config.classes
        check_labels(torch.tensor(classes), model.num_classes)
        labels, cfg_scale = balanced_labels(end, classes), config.cfg_scale

    output, in_parts = Path(config.output), config.first > 0 or config.part_size is not None
    request = _request(config, trained, decoder) if in_parts else None
    size = config.part_size or config.num_samples
    parts = {start: output / (part_name(start) if in_parts else WHOLE) for start in range(config.first, end, size)}
    # Before the work: where nothing can be written is told at once.
    output.mkdir(parents=True, exist_ok=True)
    if config.join is not None:
        Path(config.join).parent.mkdir(parents=True, exist_ok=True)
    missing = []
    for start, archive in parts.items():
        if config.part_size is not None and archive.exists():
            _check_part(archive, min(size, end - start), request)
        else:
            missing.append(start)
    processes.wait()  # until all have seen what is missing
    own = {start: labels[start : min(start + size, end)] for start in missing[processes.rank :: processes.count]}
    total, silent = sum(map(len, own.values())), not processes.is_first
    with (
        weights_cast_once(model, config.precision),
        progress_bar(total=total, desc="sample", unit="image", disable=silent) as bar,
    ):
        drawn = dataclasses.replace(trained, model=CapturedModel(model)) if config.cuda_graph else trained
        for start, part in own.items():
            images = []
            for batch in config.draw(drawn, part, first=start, cfg_scale=cfg_scale):
                images.append(to_images(batch, decoder))
                bar.update(len(batch))
            origin = {"first": start, "request": request} if in_parts else None
            save_npz(parts[start], torch.cat(images), None if config.unconditional else part, origin=origin)
    processes.wait()
    grid, archives = output / (f"grid-{config.first:06d}.png" if config.first else "grid.png"), [*parts.values()]
    if processes.is_first:
        _save_grid(grid, archives[0], labels[config.first :], classes)
        if config.join is not None:
            join_npz(archives, config.join)
    return grid, archives


def _depends_on_batch(config: SampleConfig, model: nn.Module) -> bool:
    return getattr(model, "mixes_samples", False) or config.method == "dopri5"


def _check_parts(config: SampleConfig, model: nn.Module) -> None:
    """Refuse parts that would not be what one call draws, since each begins a batch anew."""
    sizes = (config.first, config.part_size or config.batch_size)
    if _depends_on_batch(config, model) and any(size % config.batch_size for size in sizes):
        raise ValueError(
            f"--first and --part-size must be multiples of --batch-size, {config.batch_size}, got {sizes[0]} and "
            f"{sizes[1]}: these samples depend on their batch (dopri5, or experts that choose among all its tokens)"
        )


def _request(config: SampleConfig, trained: TrainedModel, decoder: str | None) -> dict[str, Any]:
    """All that images of one run have in common, defaults filled in, as JSON gives it back."""
    digest = hashlib.sha256()
    for name, value in trained.model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().flatten().view(torch.uint8).numpy())
    method, steps = trained.objective.pick_method(config.method, config.steps)
    request = {name: getattr(config, name) for name in ("seed", "cfg_scale", "precision", "unconditional")} | {
        "method": method,
        "steps": steps,
        "classes": list(range(trained.model.num_classes)) if config.classes is None else config.classes,
        "weights": digest.hexdigest(),
        "objective": [type(trained.objective).__name__, dataclasses.asdict(trained.objective)],
        "autoencoder": decoder,
        "model": {**dataclasses.asdict(trained.model.config), "backend": None},
    }
    if _depends_on_batch(config, trained.model):
        request["batch_size"] = config.batch_size
    return json.loads(json.dumps(request))


def _check_part(archive: Path, count: int, request: dict[str, Any]) -> None:
    """Refuse to take a file for a part of this run that is none."""
    origin = load_origin(archive)
    check_request(archive, origin["request"] if origin else {}, request, "this run is")
    if image_shape(archive)[0] != count:
        raise ValueError(
            f"{archive} holds {image_shape(archive)[0]} images, but {count} belong into it: "
            "keep --num-samples and --part-size as they were, or remove the file"
        )


def _save_grid(path: Path, archive: Path, labels: Tensor, classes: list[int]) -> None:
    """The first images of an archive, which have these labels, a column per class where there are not too many."""
    images = next(iterate_images([archive], GRID_COLUMNS * GRID_ROWS))
    columns = min(len(classes) or GRID_COLUMNS, len(images), GRID_COLUMNS)
    headings = [str(label) for label in labels[:columns].tolist()] if columns == len(classes) else []
    rows = min(len(images) // columns, GRID_ROWS)
    save_grid(path, images[: rows * columns], columns, column_labels=headings)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 2 where it asks for something impossible, 130 after an interrupt."""
    try:
        parser = config_parser(SampleConfig, prog="python -m models.sample", description="Sample from a trained model.")
        config = build_config(SampleConfig, parser.parse_args(arguments))
        with process_group(config.device, PATIENCE):
            grid, archives = sample_to_files(config)
            is_first = Processes.current().is_first
    except (ImportError, NotImplementedError, OSError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: with --part-size the same command goes on after the last file", file=sys.stderr)
        return 130
    files = archives[0] if len(archives) == 1 else f"{archives[0]} to {archives[-1].name}"
    if is_first:
        print(f"{config.num_samples} samples: {grid}, {files}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
