"""Train models on digits on a CPU, by default DSMoE and dense DiT, sample and score them: `python -m models.demo`."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models import count_parameters, create_model
from models.data import collect, load_dataset, save_npz, to_uint8
from models.markdown import markdown_table
from models.metrics import Scores, score_samples, train_classifier
from models.metrics.typical import most_typical, save_typical_grid
from models.options import build_config, command_line, config_parser, option, require
from models.sampling import balanced_labels, sample_images
from models.training.config import TrainConfig
from models.training.loading import load_model
from models.training.lock import remove_runs
from models.training.logs import late_error, machine, read_metrics, save_loss_curves
from models.training.trainer import NonFiniteError, Trainer, TrainResult

MODELS = ["DSMoE-digits", "DiT-digits"]
NOTES = """digits-FD: distance of 500 samples to 500 held-out images, lower is better; floor: of 500 training images.
KID: kernel distance of the same features, with its s.d. between random subsets; 0 is best.
Losses of different objectives do not compare.
Nearer to training images: share of samples nearer to one than the median held-out image is; 50% is fresh.
grid.png: of each class the most typical of 50 samples; samples as they come are in each run's samples folder."""


@dataclass(frozen=True)
class DemoConfig:
    """All options of `python -m models.demo`.

    Raises:
        ValueError: a number out of its range, naming the option.
    """

    output: str = option("runs/demo", "directory for the runs, the pictures and the table")
    models: list[str] | None = option(None, f"models to train, {' '.join(MODELS)} by default", items=str)
    minutes: float = option(3.0, "time to train the first model for; the others take as many steps")
    minutes_each: bool = option(False, "train every model for --minutes, whatever steps it does")
    steps: int | None = option(None, "train all models for this many steps instead")
    learning_rate: float = option(1e-3, "of all models; 3e-3 gets further within a minute")
    ema_decay: float = option(0.995, "decay of the averaged weights; 0.99 for short runs")
    sample_steps: int = option(50, "steps of the samples")
    cfg_scale: float = option(1.5, "guidance of the samples, 1 for none")
    seed: int = option(0, "seed of training and of the samples")
    overwrite: bool = option(False, "replace an earlier demo in --output")

    @property
    def names(self) -> list[str]:
        return MODELS if self.models is None else list(dict.fromkeys(self.models))

    def __post_init__(self) -> None:
        with torch.device("meta"):
            for name in self.names:
                create_model(name)  # a wrong name is told before anything is trained
        require(self, "minutes", self.minutes > 0, "above 0")
        for name in ("steps", "sample_steps"):
            require(self, name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        _train_config(self.names[0], self, self.steps)  # so is what training refuses, before anything is deleted


@dataclass(frozen=True)
class Row:
    """A row of the table; `loss` is the mean squared error of the velocity over the last tenth of the steps."""

    model: str
    activated_parameters: int
    total_parameters: int
    steps: int
    images_per_second: float
    loss: float
    scores: Scores


def make_room(output: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """Delete an earlier demo's runs in `output`.

    Raises:
        ValueError: there are some, and `overwrite` is not set, or another process trains into one of them.
    """
    earlier = [output / name for name in names if (output / name).exists()]
    if earlier and not overwrite:
        raise ValueError(f"{output} holds an earlier demo: replace it with --overwrite, or choose another --output")
    remove_runs(earlier)


def run_demo(config: DemoConfig) -> list[Row] | None:
    """Train, sample and score every model and write pictures and tables; None where Ctrl-C ended the training.

    `config.output` gets `grid.png`, `loss.png`, `demo.md`, `demo.json`, and a folder per model with its run and
    `samples.npz`.
    """
    output, data = Path(config.output), load_dataset("digits")
    results: dict[str, TrainResult] = {}
    for name in config.names:
        # The first sets the number of steps, so that all see the same images equally often.
        same = None if config.minutes_each else next((result.step for result in results.values()), None)
        steps = config.steps or same
        results[name] = Trainer(_train_config(name, config, steps)).fit()
        if results[name].ended_by == "signal":
            return None

    labels = balanced_labels(len(data.holdout), range(data.num_classes))
    samples = {name: _sample(name, config, labels) for name in config.names}
    classifier = train_classifier(data)
    rows = []
    for name in config.names:
        total, activated = count_parameters(load_model(output / name))
        rows.append(
            Row(
                model=name,
                activated_parameters=activated,
                total_parameters=total,
                steps=results[name].step,
                images_per_second=results[name].images_per_second,
                loss=late_error(read_metrics(output / name)),
                scores=score_samples(samples[name], data, labels=labels, classifier=classifier),
            )
        )
    real, real_labels = collect(data.holdout)
    rows_of_grid = {"real": most_typical(to_uint8(real), real_labels, classifier)}
    rows_of_grid |= {name: most_typical(samples[name], labels, classifier) for name in config.names}
    _write(output, config, rows, rows_of_grid)
    return rows


def format_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, its columns aligned."""
    heading = ["model", "activated", "total", "steps", "images/s", "loss", "digits-FD", "floor", "KID"]
    heading.append("nearer to training images")
    cells = [
        [
            row.model,
            f"{row.activated_parameters / 1e6:.2f} M",
            f"{row.total_parameters / 1e6:.2f} M",
            f"{row.steps}",
            f"{row.images_per_second:.0f}",
            f"{row.loss:.4f}",
            f"{row.scores.digits_fd:.2f}",
            f"{row.scores.floor:.2f}",
            f"{row.scores.kid:.3f} (s.d. {row.scores.kid_error:.3f})",
            f"{row.scores.share_nearer_than_holdout:.0%}",
        ]
        for row in rows
    ]
    return markdown_table(heading, cells)


def _train_config(name: str, config: DemoConfig, steps: int | None) -> TrainConfig:
    return TrainConfig(
        model=name,
        output=str(Path(config.output) / name),
        seed=config.seed,
        steps=steps or 1_000_000,
        max_minutes=None if steps else config.minutes,
        learning_rate=config.learning_rate,
        ema_decay=config.ema_decay,
        log_every=10,
        sample_steps=config.sample_steps,
        sample_cfg_scale=config.cfg_scale,
    )


def _sample(name: str, config: DemoConfig, labels: Tensor) -> Tensor:
    """uint8 (N, H, W, C)."""
    print(f"{name}: drawing {len(labels)} samples", flush=True)
    folder = Path(config.output) / name
    model = load_model(folder)
    images = to_uint8(
        sample_images(model, labels, seed=config.seed, steps=config.sample_steps, cfg_scale=config.cfg_scale)
    )
    save_npz(folder / "samples.npz", images, labels)
    return images


def _write(output: Path, config: DemoConfig, rows: list[Row], rows_of_grid: dict[str, Tensor]) -> None:
    save_typical_grid(output / "grid.png", rows_of_grid)
    save_loss_curves(output / "loss.png", {row.model: read_metrics(output / row.model) for row in rows})
    command = command_line("models.demo", config, leave_out=("output", "overwrite"))
    origin = f"`{command}`, {torch.get_num_threads()} threads, {machine(torch.device('cpu'))}"
    (output / "demo.md").write_text(f"{format_table(rows)}\n\n{origin}\n\n{NOTES}\n")
    record = {
        "origin": origin,
        "config": dataclasses.asdict(config),
        "models": [dataclasses.asdict(row) for row in rows],
    }
    (output / "demo.json").write_text(json.dumps(record, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 130 where Ctrl-C ended it."""
    try:
        parser = config_parser(DemoConfig, prog="python -m models.demo", description=__doc__)
        config = build_config(DemoConfig, parser.parse_args(arguments))
        output = Path(config.output)
        make_room(output, config.names, overwrite=config.overwrite)
        rows = run_demo(config)
    except (ImportError, OSError, TypeError, ValueError, NonFiniteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if rows is None:
        print("stopped; start again with --overwrite", file=sys.stderr)
        return 130
    print(f"\n{format_table(rows)}\n")
    print(f"{NOTES}\n")
    print(
        f"Pictures: {output / 'grid.png'}, {output / 'loss.png'}; table: {output / 'demo.md'}, {output / 'demo.json'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
