"""The pictures of an `ExpertUsage`, a PNG each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.analysis.usage import CONDITIONAL, UNCONDITIONAL, ExpertUsage, group_classes, layer_loads, ratio, shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

MOST_CLASSES = 40  # rows of a picture; more classes are grouped
MOST_COLUMNS = 5  # of the grid of layers
STRONGEST = 4.0  # times the uniform share that the colours tell apart
SMALL = 9  # font size within a panel


def save_experts_by_class(path: Path, usage: ExpertUsage, title: str) -> None:
    """A heat map per layer of classes by experts: how often a class's tokens go to an expert, over the uniform share.

    Args:
        path: file to write.
        usage: what to draw; of more than `MOST_CLASSES` classes neighbouring labels share a row.
        title: first line of the picture.
    """
    names, rows, _ = group_classes(usage, MOST_CLASSES)
    caption = f"share of a class's routed tokens that each expert takes; {_grouping(usage, names)}"
    panels = usage.num_experts * shares(rows)  # (L, G, E)
    figure, axes = _heat_maps(panels, usage, f"{title}\n{caption}", xlabel="expert", ylabel="class")
    for one in axes:
        _name(one.yaxis, names, _inches(len(names)))
    figure.savefig(path)


def save_experts_by_time(path: Path, usage: ExpertUsage, title: str, time_label: str) -> None:
    """A heat map per layer of experts by the sampler's times, as `save_experts_by_class` has it for classes.

    Args:
        path, usage, title: as there.
        time_label: what a time is, and which end is noise.
    """
    caption = "share of the tokens routed at a time that each expert takes; sampling runs from left to right"
    panels = usage.num_experts * shares(usage.rows_by_time[:, CONDITIONAL]).swapaxes(1, 2)  # (L, E, S)
    figure, axes = _heat_maps(panels, usage, f"{title}\n{caption}", xlabel=time_label, ylabel="expert")
    for one in axes:
        _name(one.xaxis, [f"{time:.3g}" for time in usage.times], _inches(len(usage.times)))
    figure.savefig(path)


def save_load(path: Path, usage: ExpertUsage, title: str) -> None:
    """Every layer's share of rows by expert with the uniform share marked, and how uneven the layers are.

    Args:
        path, usage, title: as `save_experts_by_class` has them.
    """
    uniform, loads = 100 / usage.num_experts, layer_loads(usage)
    experts = [str(expert) for expert in range(usage.num_experts)]
    caption = f"share of a layer's routed tokens that each expert takes; dashed: the uniform share, {uniform:.3g} %"
    figure, axes = _panels(len(loads) + 1, _inches(usage.num_experts), 2.2, f"{title}\n{caption}", share_y=False)
    top = 105 * np.nanmax(usage.load, initial=1 / usage.num_experts)
    for one, share, load in zip(axes, usage.load, loads, strict=False):
        one.bar(range(len(experts)), 100 * share, color="tab:blue")
        one.axhline(uniform, color="black", linestyle="--", linewidth=1)
        one.set(xlim=(-0.6, usage.num_experts - 0.4), ylim=(0, top))
        spread = f"CV {load.cv:.2f}, max/mean {load.max_over_mean:.2f}" if load.experts_per_token else "no rows"
        one.set_title(f"block {load.block}: {spread}", fontsize=SMALL)
        one.set_xlabel("expert", fontsize=SMALL)
        one.set_ylabel("share, %", fontsize=SMALL)
        _name(one.xaxis, experts, _inches(len(experts)))
    uneven = axes[-1]
    uneven.plot([load.block for load in loads], [load.max_over_mean for load in loads], "s-", label="max / mean")
    uneven.plot([load.block for load in loads], [load.cv for load in loads], "o-", label="CV")
    uneven.set_ylim(bottom=0)
    uneven.set_title("load by depth", fontsize=SMALL)
    uneven.set_xlabel("block", fontsize=SMALL)
    uneven.set_xticks(usage.blocks[:: math.ceil(len(usage.blocks) / 6)])
    uneven.legend(fontsize=SMALL - 1)
    uneven.grid(alpha=0.3)
    figure.savefig(path)


def save_capacity(path: Path, usage: ExpertUsage, title: str, time_label: str, training_capacity: float) -> None:
    """Experts per token over the times of sampling, by layer and in the mean, and by class.

    Classes differ by little: many images of each are needed before that is more than chance.

    Args:
        path, usage, title, time_label: as `save_experts_by_time` has them.
        training_capacity: experts per token in training, which a line marks.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    width = 6
    figure, (by_time, by_class) = _panels(2, width, 4, f"{title}\ncoloured lines are the blocks", share_y=False)
    capacity, guided = usage.capacity_by_time, usage.tokens_by_time[:, UNCONDITIONAL].any()
    depth = Normalize(usage.blocks[0], max(usage.blocks[-1], usage.blocks[0] + 1))
    for block, line in zip(usage.blocks, capacity[:, CONDITIONAL], strict=True):
        by_time.plot(usage.times, line, color=colormaps["viridis"](depth(block)), linewidth=1)
    for half, style, name in ((CONDITIONAL, "k.-", "mean of blocks"), (UNCONDITIONAL, "k:", "mean, unconditional")):
        if half == CONDITIONAL or guided:
            by_time.plot(usage.times, capacity[:, half].mean(0), style, linewidth=2, label=name)
    names, rows, tokens = group_classes(usage, MOST_CLASSES)
    by_class.plot(ratio(rows.sum(-1), tokens).mean(0), "ko", label="mean of blocks and times")
    for one, xlabel in ((by_time, time_label), (by_class, f"class ({_grouping(usage, names, 'point')})")):
        one.axhline(training_capacity, color="tab:red", linestyle="--", label=f"in training, {training_capacity:g}")
        one.set(xlabel=xlabel, ylabel="experts per token")
        one.grid(alpha=0.3)
        one.legend(fontsize=SMALL)
    if usage.times[0] > usage.times[-1]:
        by_time.invert_xaxis()
    _name(by_class.xaxis, names, width)
    if len(usage.blocks) > 1:
        figure.colorbar(ScalarMappable(depth, "viridis"), ax=by_time, label="block", ticks=usage.blocks)
    figure.savefig(path)


def _heat_maps(
    panels: np.ndarray, usage: ExpertUsage, title: str, *, xlabel: str, ylabel: str
) -> tuple[Figure, Sequence[Axes]]:
    """Panels (L, rows, columns) of shares over the uniform one: white is uniform, red above, blue below, grey no rows.

    The experts lie along one side and are numbered here; the caller names the other.
    """
    from matplotlib import colormaps
    from matplotlib.colors import TwoSlopeNorm

    _, rows, columns = panels.shape
    experts = [str(expert) for expert in range(usage.num_experts)]
    figure, axes = _panels(len(panels), _inches(columns), _inches(rows), title)
    strongest = np.nanmax(panels, initial=0)
    norm = TwoSlopeNorm(1, vmin=0, vmax=min(max(strongest, 2.0), STRONGEST))
    colors = colormaps["RdBu_r"].with_extremes(bad="0.6")
    for one, panel, block in zip(axes, panels, usage.blocks, strict=True):
        image = one.imshow(panel, cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
        one.set_title(f"block {block}", fontsize=SMALL)
        _name(one.xaxis if xlabel == "expert" else one.yaxis, experts, _inches(len(experts)))
    figure.supxlabel(xlabel, fontsize=SMALL + 1)
    figure.supylabel(ylabel, fontsize=SMALL + 1)
    label = f"share over the uniform share of 1/{usage.num_experts}"
    extend = "max" if strongest > STRONGEST else "neither"
    bar = figure.colorbar(image, ax=axes, label=label, extend=extend, fraction=0.03, aspect=8 * figure.get_figheight())
    bar.ax.tick_params(labelsize=SMALL - 1)
    return figure, axes


def _panels(count: int, width: float, height: float, title: str, share_y: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels of so many inches, in rows of at most `MOST_COLUMNS`."""
    from matplotlib.figure import Figure

    rows = math.ceil(count / MOST_COLUMNS)
    columns = math.ceil(count / rows)
    size = (max(columns * width + 1.4, 7), rows * (height + 0.4) + 1)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=SMALL + 1)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=share_y).flatten().tolist()
    for unused in axes[count:]:
        unused.remove()
    for one in axes[:count]:
        one.tick_params(labelsize=SMALL - 2)
    return figure, axes[:count]


def _inches(count: int) -> float:
    """Of a panel's side with so many cells."""
    return min(max(0.14 * count, 2.4), 3.6)


def _name(axis: Axis, names: Sequence[str], inches: float) -> None:
    """Names places 0, 1, ... of an axis of that length, as many in even distances as there is room for."""
    needed = 0.06 * (max(map(len, names)) + 1.5) if axis.axis_name == "x" else 0.16
    places = range(0, len(names), math.ceil(len(names) * needed / inches))
    axis.set_ticks(places, [names[place] for place in places])


def _grouping(usage: ExpertUsage, names: Sequence[str], what: str = "row") -> str:
    if len(names) == len(usage.classes):
        return f"a {what} per class"
    mean = len(usage.classes) / len(names)
    return f"{len(usage.classes)} classes in the order of their labels, {mean:.3g} to a {what} on average"
