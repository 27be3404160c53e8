"""Tables and plots of a run: ``python -m benchmarks.report results.json`` writes ``report.md`` and a PNG a group.

A group is an op or layer in one direction: its cases, and for each the providers from the fastest to the slowest.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.files import MARK, MARKED, load, marked, time_each
from models.markdown import markdown_table

HEAD = ["case", "provider", "median ms", "20th to 80th percentile", "x the ceiling", "rate"]
HEAD += ["images", "images/s", "kept MiB", "peak MiB", "in all MiB", "optimizer ms"]
LEGEND = """Times are of one run: the median, and what the middle 60 % of the measurements span. A ceiling (in italics)
is another function of the same cost: a dense network of the same floating-point operations without any routing, or
attention without the rotation. "x the ceiling" is a time over that of the case's fastest ceiling with weights of the
same type. The rate is the larger share of the two limits that this machine showed in the same run: of its copy
bandwidth, for the least bytes that must be moved, or of its matrix product, for the operations that must be done.
Kept: by autograd for the backward, parameters aside. Peak: what the allocator held at most in a run, beyond what it
held before. Of whole models: in all, with weights, optimizer and average; optimizer, what AdamW and the average
take of a training step. The largest batch is the largest power of two that fits, and the share of the product's rate is
the model FLOP utilisation."""


@dataclass(frozen=True)
class Row:
    """What one provider took for one case.

    Attributes:
        case, provider: their names.
        ms, low, high: median, and 20th and 80th percentile.
        ceiling: whether it is one.
        ratio: to the case's ceiling, where there is one.
        rate: such as "412 TFLOP/s, 58 %".
        kept_mib, peak_mib: where measured.
        images, allocated_mib, optimizer_ms: of a whole model.
    """

    case: str
    provider: str
    ms: float
    low: float
    high: float
    ceiling: bool
    ratio: float | None
    rate: str
    kept_mib: float | None
    peak_mib: float | None
    images: int | None
    allocated_mib: float | None
    optimizer_ms: float | None

    @property
    def cells(self) -> list[str]:
        provider = f"*{self.provider}*" if self.ceiling else self.provider
        spread = f"{digits(self.low)} to {digits(self.high)}"
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        images = ["", ""] if self.images is None else [str(self.images), f"{self.images / self.ms * 1e3:.0f}"]
        memory = ["" if one is None else f"{one:.1f}" for one in (self.kept_mib, self.peak_mib, self.allocated_mib)]
        optimizer = "" if self.optimizer_ms is None else digits(self.optimizer_ms)
        return [self.case, provider, digits(self.ms), spread, ratio, self.rate, *images, *memory, optimizer]


def digits(ms: float) -> str:
    """Three significant ones."""
    return f"{ms:.{max(0, 3 - len(str(int(ms))))}f}" if ms >= 1 else f"{ms:#.3g}" if ms >= 1e-4 else f"{ms:.4f}"


def groups(data: Mapping[str, Any]) -> dict[str, list[Row]]:
    """By the group's name its rows, each case's from fast to slow; of a pair that is there twice the later counts."""
    limits = data.get("run", {}).get("ceilings", {})
    found: dict[str, dict[str, dict[str, tuple[float, Mapping[str, Any]]]]] = defaultdict(lambda: defaultdict(dict))
    for one in data["benchmarks"]:
        record = one["extra_info"]
        if "provider" not in record:  # of another suite
            continue
        case = found[f"{record['op']}, {record['direction']}"][record["name"]]
        case[record["provider"]] = one["stats"]["median"] * 1e3, record
    return {name: [row for case in cases.values() for row in _rows(case, limits)] for name, cases in found.items()}


def _rows(case: Mapping[str, tuple[float, Mapping[str, Any]]], limits: Mapping[str, float]) -> Iterator[Row]:
    ceilings: dict[str, float] = {}  # by the weights' type
    for ms, record in case.values():
        if record["ceiling"]:
            kind = record["weights_dtype"]
            ceilings[kind] = min(ms, ceilings.get(kind, ms))
    for ms, record in sorted(case.values(), key=lambda one: time_each(*one)):
        ceiling = ceilings.get(record["weights_dtype"])
        yield Row(
            case=record["name"],
            provider=marked(record["provider"], record),
            ms=ms,
            low=record["p20_ms"],
            high=record["p80_ms"],
            ceiling=record["ceiling"],
            ratio=ms / ceiling if ceiling else None,
            rate=_rate(ms, record, limits),
            kept_mib=record.get("saved_mib"),
            peak_mib=record.get("peak_mib"),
            images=record.get("images"),
            allocated_mib=record.get("allocated_mib"),
            optimizer_ms=record.get("optimizer_ms"),
        )


def _rate(ms: float, record: Mapping[str, Any], limits: Mapping[str, float]) -> str:
    """Operations or bytes a second, whichever is nearer to what the machine can do; nothing where neither counts."""
    if not ms:  # shorter than can be told
        return ""
    rates = {
        "FLOP/s": (record["flops"] / ms * 1e3, limits.get("product_flops_per_second")),
        "B/s": (record["least_bytes"] / ms * 1e3, limits.get("copy_bytes_per_second")),
    }
    shares = {unit: rate / limit for unit, (rate, limit) in rates.items() if limit and rate}
    if not shares:
        return ""
    unit = max(shares, key=shares.__getitem__)
    value, prefix = rates[unit][0] / 1e9, "G"
    if value >= 1e3:
        value, prefix = value / 1e3, "T"
    return f"{value:.3g} {prefix}{unit}, {shares[unit]:.0%}"


def table(rows: list[Row]) -> str:
    """Markdown, its columns aligned, those that no row fills left out, and a case named in its first row alone."""
    cells = [row.cells for row in rows]
    for above, below in zip(reversed(rows[:-1]), reversed(cells), strict=False):
        if above.case == below[0]:
            below[0] = ""
    columns = [column for column in zip(HEAD, *cells, strict=True) if any(column[1:])]
    heading, *lines = zip(*columns, strict=True)
    return markdown_table(heading, lines, right=set(HEAD) - {"case", "provider", "rate"})


def origin(data: Mapping[str, Any]) -> str:
    """Where, when and with what it was measured, in sentences."""
    run = data.get("run", {})
    known = [f"{key} {run[key]}" for key in ("driver", "torch", "triton", "commit") if run.get(key)]
    date = f" on {data['datetime'][:16].replace('T', ' at ')}" if data.get("datetime") else ""
    lines = [f"Measured on {run.get('device', 'an unknown machine')}{date}; {', '.join(known)}."]
    if run.get("command"):
        lines.append(f"Command: `{run['command']}`.")
    if not run.get("compute_capability"):
        lines.append("**Without a GPU, at small sizes in float32: it shows that all runs and is right, and no speed.**")
    if run.get("changed_files"):
        lines.append("The checkout had changes that the commit does not hold.")
    if limits := run.get("ceilings"):
        copy, product = limits["copy_bytes_per_second"] / 1e9, limits["product_flops_per_second"] / 1e12
        lines.append(f"Limits of the machine in the same run: copy {copy:.0f} GB/s, product {product:.3g} TFLOP/s.")
    return "\n".join(lines)


def not_run(data: Mapping[str, Any]) -> str:
    """What has no time and why: first each failure, then the skipped, those of one reason in one line."""
    failed = [one for one in data.get("not_run", []) if one["outcome"] == "failed"]
    lines = [f"- **failed**: {_name(one)}: {one['reason']}" for one in failed]
    skipped: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for one in data.get("not_run", []):
        if one["outcome"] != "failed":
            skipped[one["reason"]].append(one)
    for reason, those in skipped.items():
        providers = "; ".join(dict.fromkeys(str(one.get("provider", one["test"])) for one in those))
        lines.append(f"- {reason}: {len(those)} benchmark{'s' * (len(those) > 1)}, of {providers}")
    return "\n".join(["Not timed:", *lines]) if lines else ""


def _name(one: Mapping[str, Any]) -> str:
    parts = [str(one[key]) for key in ("op", "name", "direction", "provider") if key in one]
    return ", ".join(parts) or str(one["test"])


def tables(data: Mapping[str, Any], heading: str = "## ") -> str:
    """All of a run in Markdown."""
    parts = [f"{heading}{name}\n\n{table(rows)}" for name, rows in groups(data).items()]
    launched = f"{MARKED}." if any(MARK in part for part in parts) else ""
    return "\n\n".join(part for part in (origin(data), *parts, not_run(data), LEGEND, launched) if part)


def machine(data: Mapping[str, Any]) -> str:
    """Its name, and of one without a GPU that cases are small there."""
    run = data.get("run", {})
    small = "" if run.get("compute_capability") else ": small sizes, not those of the models named here, and no speed"
    return run.get("device", "an unknown machine") + small


def write(data: Mapping[str, Any], folder: Path) -> list[Path]:
    """`report.md` and a PNG for each group, in a folder that is made where there is none; returns their paths.

    Raises:
        ImportError: without matplotlib; the tables are written before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "report.md"]
    written[0].write_text(f"# Benchmarks\n\n{tables(data)}\n")
    from benchmarks.plots import bars

    for name, rows in groups(data).items():
        written.append(folder / f"{name.replace('+', '-and-').replace(', ', '-').replace(' ', '-')}.png")
        bars(written[-1], name, machine(data), rows)
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Tables and plots of a run.")
    parser.add_argument("results", type=Path, nargs="+", help="what pytest benchmarks --benchmark-json=FILE wrote")
    parser.add_argument("--output", type=Path, help="folder to write; by default the first file's name without .json")
    options = parser.parse_args(arguments)
    try:
        data = load(options.results)
        for path in write(data, options.output or options.results[0].with_suffix("")):
            print(path)
    except (ImportError, OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
