"""What runs leave to read: `metrics.jsonl`, TensorBoard scalars, loss curves, and what they came from."""

import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from models.files import write_atomically

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Appends records of scalars to `metrics.jsonl` and to TensorBoard files in a run directory.

    Args:
        folder: the run directory.
        start_step: records after this step are dropped, because a resumed run writes them again, such as the one at its
            end, of fewer steps than the others.
    """

    def __init__(self, folder: Path, start_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / METRICS_FILE
        kept = [record for record in read_metrics(folder) if record["step"] <= start_step] if path.exists() else []
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(path, lambda file: file.write(lines.encode()))
        self._file = path.open("a")
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Record `scalars` at `step`, at once readable."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._writer.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run in order; a last line that a crash cut short is left out."""
    lines = (folder / METRICS_FILE).read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def late_error(records: Sequence[Mapping[str, Any]]) -> float:
    """`mse` over the last tenth of the steps, from the records of a run.

    It is the squared error of what the objective predicts: the velocity, or the noise for DDPM.
    """
    late = [record["mse"] for record in records if record["step"] > 0.9 * records[-1]["step"]]
    return sum(late) / len(late)


def save_loss_curves(path: Path, runs: dict[str, list[dict[str, Any]]]) -> None:
    """A PNG with one curve of loss over steps per run, smoothed over the raw records behind it.

    Args:
        path: file to write.
        runs: records as `read_metrics` gives them, by the name that the legend shows.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, records in runs.items():
        steps, losses = [record["step"] for record in records], [record["loss"] for record in records]
        (line,) = axes.plot(steps, _smoothed(losses), label=name)
        axes.plot(steps, losses, color=line.get_color(), alpha=0.25, linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def save_seed_curves(path: Path, panels: Mapping[str, Mapping[str, Sequence[list[dict[str, Any]]]]]) -> None:
    """A PNG of training errors, a panel per objective: the mean over seeds, and a band from the least to the greatest.

    The error is `mse`, without auxiliary losses. Values above twice a panel's last ones are cut off: every model starts
    there, and the rest would be flat.

    Args:
        path: file to write.
        panels: by the panel's title, by the name that the legend shows: for each seed its records, as `read_metrics`
            gives them. Of the seeds of one name, records at steps that not all have are left out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(panels), 4), dpi=120, layout="constrained")
    for axes, (title, models) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        last = []
        for name, seeds in models.items():
            curves = [{record["step"]: record["mse"] for record in records} for records in seeds]
            steps = sorted(set.intersection(*map(set, curves)))
            smooth = [_smoothed([curve[step] for step in steps]) for curve in curves]
            values = list(zip(*smooth, strict=True))
            (line,) = axes.plot(steps, [sum(seeds) / len(seeds) for seeds in values], label=name)
            if len(curves) > 1:
                axes.fill_between(
                    steps,
                    list(map(min, values)),
                    list(map(max, values)),
                    color=line.get_color(),
                    alpha=0.2,
                    linewidth=0,
                )
            last.append(values[-1])
        about = f": mean and range of {len(curves)} seeds" if len(curves) > 1 else ""
        axes.set(title=f"{title}{about}", xlabel="step", ylabel="mean squared error of the velocity")
        axes.set_ylim(0.9 * min(map(min, last)), 2 * max(map(max, last)))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


def machine(device: torch.device) -> str:
    """Processor, versions and date, to stand beside a figure."""
    name = f"{platform.machine()} CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{name}, {versions}, {datetime.date.today()}"


def _smoothed(values: list[float]) -> list[float]:
    """Mean over a window of a twentieth of all values around each, narrower at both ends."""
    reach = len(values) // 40
    smooth = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        smooth.append(sum(values[i - near : i + near + 1]) / (2 * near + 1))
    return smooth
