"""What a run of the benchmarks leaves behind besides times: the machine, its ceilings, and what was not run and why."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import timing
from benchmarks.files import CAPTURE_FAILED, kept_from_running, load
from benchmarks.parts import PARTS

_TIMED: list[dict[str, Any]] = []
_NOT_RUN: list[dict[str, Any]] = []
_CEILINGS: dict[str, float] = {}
_START = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    about = "start no benchmark later than this; the most telling come first"
    parser.addoption("--budget", type=float, metavar="SECONDS", help=about)
    parser.addoption("--part", choices=PARTS, help="run one part alone")
    about = "run alone what that file says a failed capture of a graph kept from being run"
    parser.addoption("--rest-of", type=Path, metavar="FILE", help=about)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "part(name): the part of the benchmarks that it belongs to")
    if not torch.cuda.is_available():
        torch.set_num_threads(
            1
        )  # more threads than free cores wait for each other, a thousand times as long as they work
    config.option.benchmark_quiet = True  # the tables at the end say more than pytest-benchmark's


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if part := config.getoption("part"):
        items[:] = [item for item in items if (own := item.get_closest_marker("part")) and own.args[0] == part]
    if file := config.getoption("rest_of"):
        rest = kept_from_running(load([file]))
        items[:] = [item for item in items if item.nodeid in rest]


@pytest.fixture
def spent(request: pytest.FixtureRequest) -> str | None:
    """Why nothing more is to be started, or None."""
    if timing.BROKEN:
        return CAPTURE_FAILED
    budget = request.config.getoption("budget")
    late = budget is not None and time.monotonic() - _START > budget
    return f"the budget of {budget:g} s is spent" if late else None


@pytest.fixture(scope="session")
def ceilings() -> dict[str, float]:
    """The machine's copy bandwidth and its rate of products, measured once."""
    from benchmarks.registry import CPU, GPU

    _CEILINGS.update(timing.ceilings(GPU if torch.cuda.is_available() else CPU))
    return _CEILINGS


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    told = dict(report.user_properties)
    if report.passed:
        if report.when == "call" and "stats" in told:
            _TIMED.append({"extra_info": told["facts"], "stats": told["stats"]})
        return
    if isinstance(report.longrepr, tuple):  # skipped: file, line, reason
        reason = report.longrepr[2].removeprefix("Skipped: ")
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash else str(report.longrepr)
        reason = next(iter(message.strip().splitlines()), "no message")
    _NOT_RUN.append({"test": report.nodeid, **told.get("facts", {}), "outcome": report.outcome, "reason": reason})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _TIMED:
        return
    from benchmarks.report import tables

    terminalreporter.section("benchmarks")
    terminalreporter.write_line(tables({"benchmarks": _TIMED, **_about_the_run()}))


def pytest_report_header() -> str:
    return f"benchmarks on {_device()}" + ("" if torch.cuda.is_available() else ": small shapes, no claim about speed")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["device"] = _device()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict[str, Any]) -> None:
    output_json |= _about_the_run()


@pytest.hookimpl(tryfirst=True)
def pytest_keyboard_interrupt(excinfo: pytest.ExceptionInfo[BaseException]) -> None:
    """The results are written next: of a step that is being compiled pytest would first read every frame's source."""
    excinfo.traceback = excinfo.traceback[-1:]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where nothing was timed pytest-benchmark writes nothing; why it was not is told all the same."""
    option = session.config.getoption("benchmark_json")  # a path, or with older versions of the plugin an open file
    if not option or not _NOT_RUN:
        return
    path = Path(option.name if hasattr(option, "write") else option)
    if not path.exists() or not path.stat().st_size:
        path.write_text(json.dumps({"benchmarks": [], **_about_the_run()}))


def _about_the_run() -> dict[str, Any]:
    run = {
        "device": _device(),
        "compute_capability": _capability(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _triton_version(),
        "python": sys.version.split()[0],
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed_files": _output("git", "status", "--porcelain", "--untracked-files=no"),
        "command": shlex.join(["pytest", *sys.argv[1:]]),
        "seconds": round(time.monotonic() - _START, 1),
        "ceilings": _CEILINGS,
    }
    return {"run": run, "not_run": _NOT_RUN}


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"a CPU, {torch.get_num_threads()} thread(s)"


def _capability() -> str | None:
    return ".".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else None


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _output(*command: str) -> str | None:
    """The first GPU's or the checkout's answer; None where there is no such program or it fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
