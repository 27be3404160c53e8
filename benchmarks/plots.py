"""Plots of benchmarks, made with matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.files import MARK, MARKED

if TYPE_CHECKING:
    from benchmarks.report import Row

PER_ROW, PER_PANEL = 0.24, 0.75  # inches


def bars(path: Path, title: str, where: str, rows: Sequence[Row]) -> None:
    """A panel for each case, a bar for each provider with its 20th and 80th percentile, a dashed line at the ceiling.

    Args:
        path: the PNG to write.
        title, where: what was timed, and on which machine.
        rows: of a case one after another.
    """
    from matplotlib.figure import Figure

    cases = {case: list(those) for case, those in itertools.groupby(rows, key=lambda row: row.case)}
    heights = [len(those) * PER_ROW + PER_PANEL for those in cases.values()]
    figure = Figure(figsize=(8.5, sum(heights) + 0.7), dpi=130, layout="constrained")
    panels = figure.subplots(len(cases), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    names = list(dict.fromkeys(row.provider for row in rows))
    for axes, (case, those) in zip(panels, cases.items(), strict=True):
        places = range(len(those))
        parts = [row.images or 1 for row in those]  # rows of a whole model may hold different numbers of images
        times = [row.ms / n for row, n in zip(those, parts, strict=True)]
        below = [max(row.ms - row.low, 0) / n for row, n in zip(those, parts, strict=True)]
        above = [max(row.high - row.ms, 0) / n for row, n in zip(those, parts, strict=True)]
        colors = [f"C{names.index(row.provider) % 10}" for row in those]
        hatches = ["////" if row.ceiling else "" for row in those]
        drawn = axes.barh(
            places,
            times,
            0.7,
            xerr=[below, above],
            color=colors,
            hatch=hatches,
            edgecolor="white",
            ecolor="0.25",
            capsize=2,
        )
        axes.bar_label(drawn, [f"{time:.3g}" for time in times], padding=4, fontsize=7.5)
        axes.set_yticks(places, [row.provider for row in those], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(case, fontsize=9.5, loc="left")
        axes.set_xlim(0, max(time + more for time, more in zip(times, above, strict=True)) * 1.15)
        axes.tick_params(axis="x", labelsize=7.5)
        axes.spines[["top", "right"]].set_visible(False)
        ceilings = [time for time, row in zip(times, those, strict=True) if row.ceiling]
        if ceilings:
            axes.axvline(min(ceilings), color="0.3", linestyle="--", linewidth=1, zorder=0)
    label = "ms an image" if any(row.images for row in rows) else "ms"
    label += ", median and 20th to 80th percentile; hatched and dashed: the ceiling"
    if any(MARK in row.provider for row in rows):
        label += f"\n{MARKED}"
    panels[-1].set_xlabel(label, fontsize=8)
    figure.suptitle(f"{title}\n{where}", fontsize=10.5)
    figure.savefig(path)
