"""Checkpoint files: written whole or not at all, read without running code from them."""

import re
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import torch

from models.files import write_atomically

FORMAT = "diffmoe-kernels training checkpoint 1"


class CheckpointError(ValueError):
    """A file that is no usable checkpoint; the message names it and says what to do."""


def checkpoint_path(run: Path, step: int) -> Path:
    """Where a run directory keeps the checkpoint of `step`."""
    return run / "checkpoints" / f"step-{step:08d}.pt"


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run directory, newest first. Files of other names, such as copies, are the user's own."""
    found = (path for path in checkpoint_path(run, 0).parent.glob("step-*.pt") if _step_of(path) is not None)
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int | None:
    name = re.fullmatch(r"step-(\d{8,})\.pt", path.name)
    return int(name[1]) if name else None


def save_checkpoint(run: Path, state: dict[str, Any], *, keep: int) -> Path:
    """Write `state` as the checkpoint of `state["step"]`, then delete older ones so that `keep` remain.

    Raises:
        OSError: it can't be written.
    """
    path = checkpoint_path(run, state["step"])
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(file: BinaryIO) -> None:
        try:
            torch.save({"format": FORMAT, **state}, file)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(f"{path} can't be written: {error}") from error

    write_atomically(path, write)
    older = [other for other in list_checkpoints(run) if _step_of(other) < state["step"]]  # newer ones were unreadable
    for superseded in [*older[keep - 1 :], *path.parent.glob(".*.tmp")]:
        superseded.unlink()
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read one checkpoint file; tensors and plain values only, so that a file from elsewhere can't run code.

    Raises:
        CheckpointError: no such file, a truncated or damaged one, or a file of another kind.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: pass a run directory or one of its checkpoints/step-*.pt files")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises nearly all there are
        raise CheckpointError(
            f"{path} can't be read as a checkpoint ({type(error).__name__}): it is truncated, damaged or another kind "
            "of file. Pass another checkpoint of the run, or its directory for the newest readable one"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a checkpoint of models.train: pass a file written by it. Official checkpoints are read "
            "by models.checkpoint.load_official"
        )
    return state


def load_newest(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest readable checkpoint of a run, warning about unreadable newer ones; None where it has none at all.

    Raises:
        CheckpointError: there are checkpoints, and none can be read.
    """
    paths = list_checkpoints(run)
    for path in paths:
        try:
            return path, load_checkpoint(path)
        except CheckpointError as error:
            warnings.warn(f"skipped: {error}", stacklevel=2)
    if paths:
        raise CheckpointError(f"none of the {len(paths)} checkpoints of {run} can be read: start a new run")
    return None
