"""What was aimed at and what a run reached: ``python -m benchmarks.goals results.json`` prints a Markdown table.

The file is what ``pytest benchmarks --benchmark-json=results.json`` wrote; several are read as one run. A goal bounds
ours against a baseline of the same run, or by itself; goals are set for an H200 in bfloat16.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.files import MARK, MARKED, load, marked, time_each
from benchmarks.launches import ON_HOST
from benchmarks.launches import OPS as OPS_ON_HOST
from models.markdown import markdown_table

FORWARD, BOTH = "forward", "forward+backward"
REASON = 80  # characters of why nothing was measured; failures are listed in full
Key = tuple[str, str, str, str]  # op, name, direction, provider
OURS = ("triton", "torch")  # as called, not compiled: what backend="auto" may take


@dataclass(frozen=True)
class Goal:
    """One bound.

    Attributes:
        op, name, direction: the case that shows it.
        limit: of ours over the baseline; of ours itself in "ms" and "MiB".
        unit: None, "ms", "MiB" (saved for the backward), or "images/s", of which ours has at least ``limit`` times the
            baseline's.
        ours: providers of this project; the fastest counts.
        baseline: providers that all must be there, the fastest counts; "copy" is a copy of the case's least bytes.
        today: the best that a user has without this project; nothing where none of the providers is that.
        baseline_op: the baselines' and today's case, where it is another op's.
        baseline_name: the baselines' case, where it is another model's.
    """

    op: str
    name: str
    direction: str
    limit: float | None
    unit: str | None = None
    ours: tuple[str, ...] = OURS
    baseline: tuple[str, ...] = ("dense",)
    today: tuple[str, ...] = ("grouped_mm",)
    baseline_op: str | None = None
    baseline_name: str | None = None

    @property
    def decisive(self) -> list[Key]:
        """What the verdict needs, if the case has such providers."""
        if self.limit is None:
            return []
        return self.of_ours + ([] if self.unit in ("ms", "MiB") else self.of_baseline)

    @property
    def shown(self) -> list[Key]:
        """All that the row shows."""
        return self.of_ours + self.of_baseline + self.of_today

    @property
    def of_ours(self) -> list[Key]:
        return [(self.op, self.name, self.direction, provider) for provider in self.ours]

    @property
    def of_baseline(self) -> list[Key]:
        op, name = self.baseline_op or self.op, self.baseline_name or self.name
        return [(op, name, self.direction, provider) for provider in self.baseline]

    @property
    def of_today(self) -> list[Key]:
        return [(self.baseline_op or self.op, self.name, self.direction, provider) for provider in self.today]

    @property
    def work(self) -> str:
        what = "saved for backward" if self.unit == "MiB" else self.direction
        masters = ", float32 masters" if "float32 masters" in self.ours[0] else ""
        cuda = ", CUDA" if self.ours == ("cuda",) else ""
        return f"{self.op} {self.name}, {what}{masters}{cuda}"

    @property
    def bound(self) -> str:
        if self.limit is None:
            return "none set"
        if self.unit == "images/s":
            return f">= {self.limit:g} x"
        if self.unit:
            return f"<= {self.limit:g} {self.unit}"
        return "ahead" if self.limit == 1 else f"<= {self.limit:g} x"


LIMITS = {"DSMoE-L-E16": (1.05, 320), "DSMoE-L-E48": (1.25, 220), "DSMoE-S-E48": (1.25, 260)}
SAMPLING = [f"{name}, sampling {count}" for name in ("DSMoE-L-E16", "DSMoE-L-E48") for count in (512, 2048)]
LAYER = {"op": "expert-choice layer", "name": "DiffMoE-L-E8", "baseline": ("dense + predictor",), "today": ("loop",)}
MASTERS = {"ours": ("triton, float32 masters",), "baseline": ("dense, float32 masters",), "today": ()}

# Milliseconds forward, and forward and backward.
ATTENTION = {
    "DSMoE-S": (0.085, 0.40),
    "DSMoE-L": (0.062, 0.30),
    "DSMoE-3B": (0.080, 0.36),
    "JiT-L": (0.080, 0.40),
    "512 px": (0.163, 0.65),
}
SDPA = dict.fromkeys(("baseline", "today"), ("compiled, cuDNN", "compiled, flash"))

# Each mixture and the dense model of about as many activated parameters, in millions.
EQUALS = {
    "DSMoE-L-E16": "DiT-L/2",  # 487 and 458
    "DSMoE-L-E48": "DiT-L/2",  # 457 and 458
    "DiffMoE-L-E8": "DiT-L/2",  # 471 and 458
    "JiTMoE-L/16-E16": "JiT-L/16",  # 489 and 459
}


def throughput(model: str, batch: str, share: float) -> Goal:
    """Of a mixture's training, compiled, at least that share of its dense model's in plain PyTorch, compiled too.

    Both are compiled block by block. Nobody else's DiffMoE is timed.
    """
    today = () if model.startswith("DiffMoE") else ("grouped_mm, compiled",)
    sides = {"ours": ("triton, compiled",), "baseline": ("torch, compiled",), "today": today}
    dense = f"{EQUALS[model]}, {batch}"
    return Goal("training step", f"{model}, {batch}", BOTH, share, "images/s", **sides, baseline_name=dense)


GOALS = [
    *(Goal("experts", name, BOTH, time) for name, (time, _) in LIMITS.items()),
    *(Goal("experts", name, BOTH, None, **MASTERS) for name in LIMITS),
    *(
        Goal("unpermute", name, FORWARD, 1.3, ours=("triton",), baseline=("copy",), today=("plain, compiled",))
        for name in ("DSMoE-L-E48", "DSMoE-S-E48")
    ),
    *(
        Goal(op, name, FORWARD, 1 / 0.85, ours=("cuda",), baseline=("copy",), today=(plain,))
        for op, plain in (("permute", "torch"), ("unpermute", "plain, compiled"))
        for name in ("DSMoE-L-E48", "DSMoE-S-E48")
    ),
    Goal(
        "router_topk",
        "DSMoE-S-E48",
        FORWARD,
        0.03,
        unit="ms",
        ours=("triton",),
        baseline=("argsort + bincount",),
        today=("argsort + bincount",),
        baseline_op="routing_from_topk",
    ),
    Goal(direction=BOTH, limit=1.15, **LAYER),
    Goal(direction=FORWARD, limit=0.57, unit="ms", **LAYER),
    *(
        Goal("experts", name, FORWARD, 1.0, ours=("triton",), baseline=("loop", "grouped_mm"), today=())
        for name in SAMPLING
    ),
    *(Goal("experts", name, BOTH, memory, unit="MiB") for name, (_, memory) in LIMITS.items()),
    *(
        Goal("rope_attention", name, direction, limit, unit="ms", ours=("triton",), **SDPA)
        for name, limits in ATTENTION.items()
        for direction, limit in zip((FORWARD, BOTH), limits, strict=True)
    ),
    *(throughput(name, f"batch {count}", share) for name in EQUALS for count, share in ((64, 0.85), (256, 0.95))),
    *(throughput(name, "largest batch", 1.0) for name in EQUALS),
    *(Goal(ON_HOST, op, FORWARD, 1.0, ours=("triton", "cuda"), baseline=("PyTorch",), today=()) for op in OPS_ON_HOST),
]


class Results:
    """A results file, by case and provider."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.run: Mapping[str, Any] = data.get("run", {})
        self.date: str = data.get("datetime", "")
        self.not_run: list[Mapping[str, Any]] = data.get("not_run", [])
        self.records = {
            self._key(**one["extra_info"]): {**one["extra_info"], "ms": one["stats"]["median"] * 1e3}
            for one in data["benchmarks"]
            if "provider" in one["extra_info"] and one["stats"]["median"]  # not shorter than can be told
        }
        self.reasons = {self._key(**one): one["reason"] for one in self.not_run if "provider" in one}

    @staticmethod
    def _key(op: str, name: str, direction: str, provider: str, **_: object) -> Key:
        return op, name, direction, provider

    def find(self, key: Key) -> dict[str, Any] | str:
        """The record, or why there is none."""
        if key not in self.records:
            return f"{key[3]}: {self.reasons.get(key, 'not in the file')}"
        record = self.records[key]
        return record if record["published_size"] else f"{key[3]}: not at the published size"

    def fastest(self, keys: Sequence[Key], need_all: bool) -> dict[str, Any] | str:
        """The record of the fastest, or why there is none."""
        found = [self.find(key) for key in keys]
        missing = [one for one in found if isinstance(one, str)]
        if not found or len(missing) == len(found) or (need_all and missing):
            return "; ".join(missing)
        return min((one for one in found if not isinstance(one, str)), key=lambda one: time_each(one["ms"], one))

    def baseline(self, goal: Goal, ours: Mapping[str, Any] | str) -> dict[str, Any] | str:
        if goal.baseline != ("copy",):
            return self.fastest(goal.of_baseline, need_all=True)
        bandwidth = self.run.get("ceilings", {}).get("copy_bytes_per_second")
        if isinstance(ours, str) or not bandwidth:
            return "no copy was timed" if not bandwidth else ours
        return {"provider": f"copy at {bandwidth / 1e12:.2f} TB/s", "ms": ours["least_bytes"] / bandwidth * 1e3}


def row(goal: Goal, results: Results) -> list[str]:
    """The table's cells: work, today's best, baseline, ours, ratio, goal, reached or not."""
    ours = results.fastest(goal.of_ours, need_all=False)
    baseline = results.baseline(goal, ours)
    today = results.fastest(goal.of_today, need_all=False)
    unit = goal.unit or "ms"
    measured = not isinstance(ours, str)
    ratio = _amount(ours, unit) / _amount(baseline, unit) if measured and not isinstance(baseline, str) else None
    value = ratio if goal.unit in (None, "images/s") else _amount(ours, unit) if measured else None
    if value is None:
        reason = ours if not measured else str(baseline)
        verdict = f"not measured: {textwrap.shorten(reason, REASON, placeholder='...')}"
    elif goal.limit is None:
        verdict = "-"
    elif goal.direction == FORWARD and goal.unit == "ms" and not ours["captured"]:
        verdict = "**no**: not in a CUDA graph"
    else:
        reached = value >= goal.limit if goal.unit == "images/s" else value <= goal.limit
        verdict = "yes" if reached else f"**no**, {value / goal.limit:.2f} x the goal"
    cells = [_cell(one, unit) for one in (today, baseline, ours)]
    return [goal.work, *cells, "" if ratio is None else f"{ratio:.2f}", goal.bound, verdict]


def _amount(record: Mapping[str, Any], unit: str) -> float:
    if unit == "images/s":
        return record["images"] / record["ms"] * 1e3
    return record["saved_mib" if unit == "MiB" else "ms"]


def _cell(record: Mapping[str, Any] | str, unit: str) -> str:
    if isinstance(record, str):
        return ""
    value = f"{_amount(record, unit):.{3 if unit == 'ms' else 0}f} {unit}"
    images = f", {record['images']} images" if unit == "images/s" else ""
    return f"{value} ({marked(record['provider'], record)}{images})"


def report(data: Mapping[str, Any], goals: list[Goal] | None = None) -> str:
    """Markdown: what ran where, then the table."""
    results = Results(data)
    run = results.run
    known = [key for key in ("device", "driver", "torch", "triton", "commit") if run.get(key)]
    machine = ", ".join(f"{key} {run[key]}" for key in known)
    lines = [f"Measured {results.date[:16]} on {machine or 'an unknown machine'}."]
    if run.get("changed_files"):
        lines.append("The checkout had changes that the commit does not hold.")
    if ceilings := run.get("ceilings"):
        copy, product = ceilings["copy_bytes_per_second"] / 1e12, ceilings["product_flops_per_second"] / 1e12
        lines.append(f"Ceilings in the same run: copy {copy:.2f} TB/s, product {product:.0f} TFLOP/s.")
    failed = [one for one in results.not_run if one["outcome"] == "failed"]
    skipped = len(results.not_run) - len(failed)
    lines.append(f"{len(results.records)} measured, {skipped} skipped, {len(failed)} failed.")
    lines += [f"- failed: {one['test']}: {one['reason']}" for one in failed]
    head = ["work", "today's best", "baseline", "ours", "ratio to the baseline", "goal", "reached"]
    rows = [row(goal, results) for goal in (GOALS if goals is None else goals)]
    told = [] if not any(MARK in cell for cells in rows for cell in cells) else ["", f"{MARKED}."]
    return "\n".join([*lines, "", markdown_table(head, rows), *told])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.goals", description="Goals, and what a run reached.")
    parser.add_argument("results", type=Path, nargs="+", help="what pytest benchmarks --benchmark-json=FILE wrote")
    try:
        print(report(load(parser.parse_args(arguments).results)))
    except (OSError, ValueError) as error:
        print(f"benchmarks.goals: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
