"""Reading what ``pytest benchmarks --benchmark-json=FILE`` wrote, in one file or in a file of each part."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CAPTURE_FAILED = "the capture of a CUDA graph failed before it in this process"
MARK = "\N{DAGGER}"
MARKED = (
    f"{MARK}: launched from Python (where captured, in part), its waits for the device included; "
    "all else is replayed as a CUDA graph"
)
SAME = ("device", "compute_capability", "driver", "torch", "cuda", "triton", "commit")


def load(paths: Sequence[Path]) -> dict[str, Any]:
    """The files as one. Of a pair that two of them time the later counts, of each ceiling the higher; what any file
    timed is not among what was not run, where of two reasons the later counts.

    Raises:
        OSError: a file that can't be read.
        ValueError: a file without results, or of another GPU, version or commit than the first.
    """
    parts = [_read(path) for path in paths]
    first = parts[0].get("run", {})
    for path, part in zip(paths, parts, strict=True):
        for key in SAME:
            found = part.get("run", {}).get(key)
            if found != first.get(key):
                raise ValueError(f"{path}: {key}: expected {first.get(key)} as in {paths[0]}, got {found}")
    merged: dict[str, Any] = {}
    for part in reversed(parts):  # one that timed nothing has no date
        merged |= part
    for key in ("benchmarks", "not_run"):
        merged[key] = [one for part in parts for one in part.get(key, [])]
    merged["not_run"] = list({one["test"]: one for one in merged["not_run"]}.values())
    timed = {_case(one.get("extra_info", {})) for one in merged["benchmarks"]}
    merged["not_run"] = [one for one in merged["not_run"] if "provider" not in one or _case(one) not in timed]
    ceilings = [part.get("run", {}).get("ceilings", {}) for part in parts]
    best = {name: max(one[name] for one in ceilings if name in one) for name in set().union(*ceilings)}
    runs = [part.get("run", {}) for part in parts]
    merged["run"] = {**first, "ceilings": best}
    for key, separator in (("command", "; "), ("changed_files", "\n")):
        if found := dict.fromkeys(run[key] for run in runs if run.get(key)):
            merged["run"][key] = separator.join(found)
    return merged


def kept_from_running(data: Mapping[str, Any]) -> set[str]:
    """The tests that were skipped since a capture had failed in their process."""
    return {one["test"] for one in data.get("not_run", []) if one["reason"] == CAPTURE_FAILED}


def time_each(ms: float, record: Mapping[str, Any]) -> float:
    """Of an image where it is a whole model's step, which providers may run with different numbers of images."""
    return ms / (record.get("images") or 1)


def marked(provider: str, record: Mapping[str, Any]) -> str:
    """Its name, with a mark if its times on a GPU hold the host's work too."""
    launched = record.get("compute_capability") and not record.get("captured", True)
    return f"{provider} {MARK}" if launched else provider


def _case(facts: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(facts.get(key) for key in ("op", "name", "direction", "provider"))


def _read(path: Path) -> dict[str, Any]:
    text = path.read_text()
    if not text:
        raise ValueError(f"{path} has no results: nothing was timed")
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(found, dict) or "benchmarks" not in found:
        raise ValueError(f"{path}: expected what pytest-benchmark writes, got something else")
    return found
