"""Named cases on a chip that is not there: a module that has them is run by a process of its own, one a chip.

A case launches kernels on CPU tensors and returns errors against references, by name. Its module ends with

    if __name__ == "__main__":
        main(CASES)

and ``report("tests.kernels.that_module", 90)`` runs it: python -m tests.kernels.that_module 90 [case ...]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

ROOT = Path(__file__).parents[3]
Case = Callable[[], dict[str, float]]


def error(found: Tensor, wanted: Tensor) -> float:
    """Of the whole, relative."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def main(cases: dict[str, Case], multiprocessors: int | None = None) -> None:
    """Prints a JSON object per case and line: its errors, launches and seconds."""
    from tests.kernels.ptx.launch import emulated  # Triton compiles from here on

    capability, names = int(sys.argv[1]), sys.argv[2:] or list(cases)
    for name in names:
        start = time.perf_counter()
        with emulated(capability, multiprocessors=multiprocessors) as launches:
            errors = cases[name]()
        row = {"case": name, "errors": errors, "launches": [asdict(one) for one in launches]}
        print(json.dumps(row | {"seconds": time.perf_counter() - start}), flush=True)


def report(module: str, capability: int, *names: str) -> dict[str, dict]:
    """What ``main`` prints in such a module, by case: all, unless some are named."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, str(capability), *names]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    return {row["case"]: row for row in rows}
