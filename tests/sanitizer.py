"""Running a script under NVIDIA's compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def find_sanitizer() -> str | None:
    """The PATH's, or what lies beside an nvcc that is named or on the PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    compilers = os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", shutil.which("nvcc")
    folders = [str(Path(compiler).resolve().parent) for compiler in compilers if compiler]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def sanitized(tool: str, script: str, *words: str, kernels: str, seconds: float = 240) -> tuple[str, int]:
    """What Python's ``script`` printed under the tool, with the tool's report, and how many faults that found.

    Skips the test where there is no such tool. The exit status says little: it is the script's own where a fault ended
    that.

    Args:
        tool: "memcheck" or "racecheck".
        words: the script's arguments.
        kernels: what the names of those looked at hold; PyTorch's own take most of the time.
        seconds: after which all of it is killed.
    """
    sanitizer = find_sanitizer()
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer")
    options = [f"--tool={tool}", "--target-processes=application-only", f"--kernel-name=kernel_substring={kernels}"]
    if tool == "memcheck":
        options.append("--report-api-errors=no")  # libraries ask for what may not be there
    command = [sanitizer, *options, sys.executable, "-c", script, *words]
    # Each tensor by itself, so that what lies past it is nobody's.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **start) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except BaseException as stopped:  # by the user or `benchmarks.check` as well
            os.killpg(process.pid, signal.SIGKILL)  # the script too, which would go on using the GPU
            if not isinstance(stopped, subprocess.TimeoutExpired):
                raise
            output, _ = process.communicate()
            pytest.fail(f"{tool} took more than {seconds:g} s: {output[-3000:]}")
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this machine")
    found = re.search(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output)
    assert found, f"no summary of {tool}: {output[-3000:]}"
    return output, int(found[1] or found[2])
