"""Writes what "auto" takes: ``python -m benchmarks.prefer results.json`` turns a run on a GPU into a table.

The table is ``diffmoe_kernels/measured.json``; rows of the same op, chip and shape class are replaced, others stay. A
backend is fastest in a class where the geometric mean of its times over the class's cases is the least; a class without
PyTorch's time in each case has no row. Each other has two, for calls in eager mode and for those that torch.compile
traces, where PyTorch's way counts with its fastest compiled time; an op that was not timed compiled has the same times
in both. Where an op has no path of PyTorch but its definition, that is called "torch", as
`diffmoe_kernels.backend.plain` does.
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.files import load
from benchmarks.registry import BOTH
from diffmoe_kernels import measured

TOKENS = (
    *("router_topk", "routing_from_topk", "token_choice_drop", "token_drop", "token_drop_predicted"),
    *("capacity_loss", "capacity_quantile"),
)
MOVEMENT = ("permute", "unpermute", "adaln", "gated_residual", "gated_residual_adaln")


def shape_class(record: Mapping[str, Any]) -> str | None:
    """The class that a case belongs to, or None where "auto" does not choose by it."""
    op, training, dtype = record["op"], record["direction"] == BOTH, getattr(torch, record["dtype"])
    if op in TOKENS:
        return measured.tokens_class(record["T"])
    if op in MOVEMENT:
        return measured.movement_class(record["T"], dtype)
    if op == "experts":
        return measured.experts_class(record["T"] * record["K"], record["E"], record["I"], dtype, training)
    if op == "grouped_gemm":
        narrower = min(record["I"], record["D"])
        return measured.experts_class(record["T"] * record["K"], record["E"], narrower, dtype, training)
    if op == "rope_attention":
        prepared = record["rope"] is not None, record["norm"] is not None
        return measured.attention_class(record["N"], record["d"], *prepared, dtype, training)
    return None


def rows(data: Mapping[str, Any], source: str) -> list[dict[str, Any]]:
    """The table's rows of one run.

    Args:
        data: what ``pytest benchmarks --benchmark-json`` wrote on a GPU.
        source: the name of its file, or files, which every row carries.

    Raises:
        ValueError: a run without a GPU.
    """
    capability = data.get("run", {}).get("compute_capability")
    if not capability:
        raise ValueError(f"{source}: expected a run on a GPU, got one on {data.get('run', {}).get('device')}")
    # By op, class and whether under torch.compile; by case; by backend: the times by whether that is how it was timed.
    times: dict[tuple[str, str, bool], Any] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    )
    for one in data["benchmarks"]:
        record = one["extra_info"]
        if not record.get("backend") or not record["published_size"] or not one["stats"]["median"]:
            continue  # a median of 0 is shorter than can be told
        if record["weights_dtype"] != record["dtype"] or (found := shape_class(record)) is None:
            continue
        backend = "torch" if record["backend"] == "reference" else record["backend"]
        case = f"{record['name']}, {record['direction']}"
        for compiled in {record["compiled"], True}:
            times[record["op"], found, compiled][case][backend][record["compiled"]].append(one["stats"]["median"] * 1e3)
    table = []
    for (op, found, compiled), timed in sorted(times.items()):
        cases = {
            case: {backend: round(min(by[True] or by[False]), 5) for backend, by in backends.items()}
            for case, backends in timed.items()
        }
        common = set.intersection(*(set(case) for case in cases.values()))
        if len(common) < 2 or "torch" not in common:
            continue  # nothing to compare with, or not with what users have
        means = {name: math.prod(case[name] for case in cases.values()) ** (1 / len(cases)) for name in common}
        shown = [{"name": name, "ms": {key: ms[key] for key in sorted(common)}} for name, ms in sorted(cases.items())]
        table.append(
            {
                "op": op,
                "capability": capability,
                "shape_class": found,
                "compiled": compiled,
                "fastest": min(means, key=means.__getitem__),
                "cases": shown,
                "source": source,
            }
        )
    return table


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The old rows, but for those that the new ones replace, and the new, in order."""
    key = operator.itemgetter(*measured.KEYS)
    return sorted({**{key(row): row for row in old}, **{key(row): row for row in new}}.values(), key=key)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefer", description='What "auto" takes, from a run.')
    about = "what pytest benchmarks --benchmark-json=FILE wrote on a GPU"
    parser.add_argument("results", type=Path, nargs="+", help=about)
    parser.add_argument("--table", type=Path, default=measured.FILE, help="the file to update")
    options = parser.parse_args(arguments)
    try:
        new = rows(load(options.results), ", ".join(path.name for path in options.results))
        old = []
        if options.table.exists():
            measured.load(options.table)  # raises for what is no table
            old = json.loads(options.table.read_text())
        options.table.write_text(json.dumps(merged(old, new), indent=1) + "\n")
    except (OSError, ValueError) as error:
        print(f"benchmarks.prefer: {error}", file=sys.stderr)
        return 2
    for row in new:
        print(f"{row['op']}, {row['shape_class']}{', compiled' * row['compiled']}: {row['fastest']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
