"""Running a script under NVIDIA's compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def sanitized(tool: str, script: str, *words: str, kernels: str) -> subprocess.CompletedProcess[str]:
    """Runs Python's ``script``; skips the test where that can't be.

    Args:
        tool: "memcheck" or "racecheck". What it finds makes the exit status 9.
        words: the script's arguments.
        kernels: what the names of those looked at hold; PyTorch's own take most of the time.
    """
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer")
    only = f"--kernel-name=kernel_substring={kernels}"
    command = [sanitizer, f"--tool={tool}", "--error-exitcode=9", only, sys.executable, "-c", script, *words]
    # Each tensor by itself, so that what lies past it is nobody's.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this machine")
    return done
