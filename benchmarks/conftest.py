"""What a run of the benchmarks leaves behind besides times: the machine, its ceilings, and what was not run and why."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from diffmoe_kernels.triton_support import HAS_TRITON

_NOT_RUN: list[dict[str, Any]] = []
_CEILINGS: dict[str, float] = {}
_START = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    about = "start no benchmark later than this; the most telling come first"
    parser.addoption("--budget", type=float, metavar="SECONDS", help=about)


@pytest.fixture
def spent(request: pytest.FixtureRequest) -> str | None:
    """Why nothing more is to be started, or None."""
    budget = request.config.getoption("budget")
    late = budget is not None and time.monotonic() - _START > budget
    return f"the budget of {budget:g} s is spent" if late else None


@pytest.fixture(scope="session")
def ceilings() -> dict[str, float]:
    """The machine's copy bandwidth and its rate of products, measured once."""
    from benchmarks.measure import ceilings
    from benchmarks.registry import CPU, GPU

    _CEILINGS.update(ceilings(GPU if torch.cuda.is_available() else CPU))
    return _CEILINGS


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.passed:
        return
    if isinstance(report.longrepr, tuple):  # skipped: file, line, reason
        reason = report.longrepr[2].removeprefix("Skipped: ")
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = (crash.message if crash else str(report.longrepr)).strip().splitlines()[0]
    facts = dict(report.user_properties).get("facts", {})
    _NOT_RUN.append({"test": report.nodeid, **facts, "outcome": report.outcome, "reason": reason})


def pytest_report_header() -> str:
    return f"benchmarks on {_device()}" + ("" if torch.cuda.is_available() else ": small shapes, no claim about speed")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["device"] = _device()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict[str, Any]) -> None:
    output_json["run"] = {
        "device": _device(),
        "compute_capability": _capability(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _triton_version(),
        "python": sys.version.split()[0],
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed_files": _output("git", "status", "--porcelain", "--untracked-files=no"),
        "command": " ".join(sys.argv),
        "seconds": round(time.monotonic() - _START, 1),
        "ceilings": _CEILINGS,
    }
    output_json["not_run"] = _NOT_RUN


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"a CPU, {torch.get_num_threads()} thread(s)"


def _capability() -> str | None:
    return ".".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else None


def _triton_version() -> str | None:
    if not HAS_TRITON:
        return None
    import triton

    return triton.__version__


def _output(*command: str) -> str | None:
    """The first GPU's or the checkout's answer; None where there is no such program or it fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
