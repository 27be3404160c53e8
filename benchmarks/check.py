"""``make gpu-check``: the tests that need a GPU, then the benchmarks, then the table of goals, tables and plots.

Every file of tests and every part of the benchmarks has a process of its own: one bad address takes the GPU from its
process for good, and not from the others. The tests run side by side, and beside them the benchmarks untimed, so that
what is compiled is in the caches of Triton and torch.compile when times count. Then one process runs at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from pathlib import Path

from benchmarks.files import kept_from_running, load
from benchmarks.goals import report
from benchmarks.parts import ALONE, PARTS
from benchmarks.report import write

ROOT = Path(__file__).parents[1]
TESTS, WARM_UP = 0.5, 0.4  # of the budget, when they are stopped
GRACE = 15.0  # seconds to write down what there is
SIDE_BY_SIDE = 6  # processes
LONG = ("attention", "parity", "kernels", "cuda")  # files of tests, which begin first
COMPILE_THREADS = "TORCHINDUCTOR_COMPILE_THREADS"
STOPPED = "stopped"
ONE_MODEL = 45.0  # seconds that a whole model may take from its start to its time


def gpu_tests(root: Path = ROOT) -> list[str]:
    """The files that hold tests for a GPU alone, those that take longest first."""
    found = [path for path in sorted(root.glob("tests/**/test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    found.sort(key=lambda path: not path.stem.endswith(LONG))
    return [str(path.relative_to(root)) for path in found]


def pytest_of(*words: object) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "--tb=short", *map(str, words)]


def run(command: list[str], seconds: float, grace: float = GRACE, **environment: str) -> tuple[int, str]:
    """Exit status and output. After its seconds it is interrupted, on which pytest writes its results, then killed."""
    start = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **start) as process:
        for end, wait in ((signal.SIGINT, max(seconds, 0)), (signal.SIGKILL, grace)):
            try:
                output, _ = process.communicate(timeout=wait)
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, end)  # what it started too
        else:
            output, _ = process.communicate()
        late = "" if end == signal.SIGINT else f"\n{STOPPED} after {seconds:.0f} s"
        return process.returncode, output.strip() + late


def build() -> tuple[int, str]:
    """The CUDA extension beside the package, anew where its sources are; without nvcc `setup.py` leaves it out."""
    built = ROOT / "diffmoe_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [ROOT / "CMakeLists.txt", *ROOT.glob("csrc/*")]
    if not built.exists() or any(path.stat().st_mtime > built.stat().st_mtime for path in sources):
        status, told = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], 180)
        if status or not built.exists():
            return status, told
    return run([sys.executable, "-c", "from diffmoe_kernels.cuda_support import status; print(status())"], 60)


def named_after_the_gpu() -> Path:
    """benchmarks/results/<gpu>-<date>.json, such as nvidia-h200-2026-11-22.json."""
    # In another process: a context of this one would take memory from what is timed.
    told = run([sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"], 60)
    last = (told[1].splitlines() or ["its process told nothing"])[-1]
    if told[0]:
        raise OSError(f"no GPU to name the results after: {last}")
    gpu = re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")
    return ROOT / "benchmarks" / "results" / f"{gpu}-{date.today()}.json"


def check(results: Path, budget: float, tests: Sequence[str], parts: Sequence[str] = PARTS) -> int:
    """Runs it all; `results` is written anew after each part, and `benchmarks.report` into a folder of its name.

    Returns 0, or 1 where anything failed.

    Args:
        results: the JSON file of all parts.
        budget: seconds after which nothing more is started.
        tests: files, relative to the repository.
        parts: of the benchmarks.
    """
    start = time.monotonic()

    def left(share: float = 1.0) -> float:
        return budget * share - (time.monotonic() - start)

    failed = []

    def tell(name: str, done: tuple[int, str]) -> None:
        print(f"== {name}, {time.monotonic() - start:.0f} s\n{done[1]}", flush=True)
        if done[1].rpartition("\n")[2].startswith(f"{STOPPED} after"):
            name = f"{name} ({STOPPED} by time)"
        if done[0] and name not in failed:
            failed.append(name)

    tell("CUDA extension", build())
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        later = {
            pool.submit(lambda file=file: run(pytest_of(file, "-m", "gpu", "--durations=3"), left(TESTS))): file
            for file in tests
        }
        for part in parts:
            if part in ALONE:
                continue
            pool.submit(
                lambda part=part: run(pytest_of("benchmarks", f"--part={part}", "--benchmark-disable"), left(WARM_UP))
            )
        for done in as_completed(later):
            tell(later[done], done.result())

    results.parent.mkdir(parents=True, exist_ok=True)
    results.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        written = []
        for part in parts:
            needed, rest, number = ONE_MODEL if part in ALONE else 0, [], 0
            if left() <= needed:
                tell(part, (0, f"not begun: the budget of {budget:g} s is spent"))
            # What was compiled before needs none, and a pool that starts as its process ends holds Python 3.12.1 up.
            threads = {} if part in ALONE else {COMPILE_THREADS: "1"}
            while left() > needed:
                file = Path(folder, f"{part}-{number}.json")
                options = f"--part={part}", f"--budget={left() - needed:.0f}", f"--benchmark-json={file}", *rest
                tell(part, run(pytest_of("benchmarks", *options), left() + GRACE, **threads))
                if not file.exists() or not file.stat().st_size:
                    break
                written.append(file)
                results.write_text(json.dumps(load(written), indent=1) + "\n")
                if not kept_from_running(load([file])):
                    break
                rest, number = [f"--rest-of={file}"], number + 1  # in a process that is not spoiled
    if not written:
        tell("goals", (1, "nothing was timed"))
    else:
        data = json.loads(results.read_text())
        print(report(data))
        try:
            print("written:", *write(data, results.with_suffix("")), sep="\n")
        except ImportError as error:
            print(f"no plots: {error}; python -m benchmarks.report {results} makes them where matplotlib is")
    print(f"== {time.monotonic() - start:.0f} s; " + (f"failed: {', '.join(failed)}" if failed else "all passed"))
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description="Tests and times on a GPU.")
    parser.add_argument(
        "results", type=Path, nargs="?", help="the JSON file to write; benchmarks/results/<gpu>-<date>.json by default"
    )
    parser.add_argument("--budget", type=float, default=500, help="seconds after which nothing more is started")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of the benchmarks; all by default")
    parser.add_argument("--no-tests", action="store_true", help="only time, for the parts that an earlier run left")
    options = parser.parse_args(arguments)
    os.environ.setdefault(COMPILE_THREADS, "4")  # of each process
    try:
        results = options.results or named_after_the_gpu()
    except OSError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    tests = [] if options.no_tests else gpu_tests()
    return check(results, options.budget, tests, [part for part in PARTS if part in options.parts])


if __name__ == "__main__":
    sys.exit(main())
