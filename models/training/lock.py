"""One process at a time in a run directory."""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from models.files import FileLock

LOCK_FILE = ".lock"


def run_lock(run: Path) -> FileLock:
    """A hold on a run directory.

    Raises:
        ValueError: another trainer holds it.
    """
    return FileLock(
        run / LOCK_FILE, f"another process trains into {run}: wait for it to end, or choose another --output"
    )


def remove_runs(runs: Sequence[Path]) -> None:
    """Delete run directories.

    Raises:
        ValueError: a trainer holds one of them; none is deleted.
    """
    with ExitStack() as locks:
        for run in runs:
            locks.enter_context(run_lock(run))
        for run in runs:
            shutil.rmtree(run)
