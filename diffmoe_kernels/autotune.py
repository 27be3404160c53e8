"""Opt-in search for the best tiles of the grouped products and of attention, with its results on disk.

Off by default: kernels take what their op's `tiles.py` picks. With ``DIFFMOE_AUTOTUNE=1`` in the environment the first
call of each kernel at a new shape class compiles the candidates, on all cores that the process may use, times them on
the data at hand and notes the fastest in ``tiles.json``, which later calls and later processes read. What stands there
first holds: all processes that can write the file, ranks that search at the same time too, take the same tile for a
key, and with it the same order of summation. It lies in ``DIFFMOE_CACHE_DIR``, or ``diffmoe-kernels`` in the user's
cache directory. Nothing is searched while a CUDA graph is captured: run a step before.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch

from diffmoe_kernels.triton_support import HAS_TRITON, INTERPRETED, device_name
from diffmoe_kernels.version import __version__

if HAS_TRITON:
    import triton
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

TileT = TypeVar("TileT")  # a dataclass of plain numbers, one for each kind of kernel
_read: dict[Path, dict[str, dict]] = {}  # what this process knows of each file: fields of tiles


def is_on() -> bool:
    """Whether ``DIFFMOE_AUTOTUNE`` asks for the search.

    Raises:
        ValueError: a value other than 0, 1 or nothing.
    """
    value = os.environ.get("DIFFMOE_AUTOTUNE", "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"DIFFMOE_AUTOTUNE: expected 0 or 1, got {value!r}")
    return value == "1"


def cache_file() -> Path:
    """Where the tiles that were found are kept."""
    folder = os.environ.get("DIFFMOE_CACHE_DIR")
    if not folder:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffmoe-kernels"
    return Path(folder) / "tiles.json"


def best_tile(
    kernel: str, shape_class: tuple, default: TileT, candidates: Iterable[TileT], launch: Callable[[TileT], object]
) -> TileT:
    """The tile for a launch where the search `is_on`: the fastest of the candidates and the default.

    Args:
        kernel: its name.
        shape_class: what else decides which tile is best: sizes, dtype, options; of plain numbers and strings.
        default: tried first, and taken while a CUDA graph is captured.
        candidates: tried once per shape class, device and versions; those that do not fit are passed over.
        launch: runs the kernel with a tile on the data at hand; called many times, from other threads too, so it must
            not change its inputs.
    """
    file = cache_file()
    versions = f"diffmoe_kernels {__version__}, triton {triton.__version__}"
    key = " | ".join(map(str, (device_name(), versions, kernel, *shape_class)))
    if key not in _read.get(file, ()):
        _read[file] = _load(file) | _read.get(file, {})
    if key not in _read[file]:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return default
        times = {tile: _time(launch, tile) for tile in _that_run(launch, [*dict.fromkeys((default, *candidates))])}
        if not times:
            launch(default)  # raises what is wrong with it
        _note(file, key, min(times, key=times.get))
    try:
        return type(default)(**_read[file][key])
    except TypeError as error:
        raise _broken(file, error) from error


def _that_run(launch: Callable[[TileT], object], tiles: list[TileT]) -> list[TileT]:
    """Those that the device and the compiler can take, launched once.

    Nine tenths of compiling are the compiler's own code and ptxas, beside which other threads of Python run.
    """
    stream = torch.cuda.current_stream() if torch.cuda.is_available() else None  # a thread begins on another, recording

    def runs(tile: TileT) -> bool:
        try:
            with torch.no_grad(), torch.cuda.stream(stream):
                launch(tile)
        except (OutOfResources, CompilationError, PTXASError, RuntimeError):  # the last: a pass of the compiler failed
            return False
        return True

    first, *others = tiles
    first_runs = runs(first)  # alone: what Triton keeps for a kernel is made by its first launch
    # The interpreter runs a kernel by patching the language, for all threads.
    cores = 1 if INTERPRETED else len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as pool:
        return [tile for tile, can in zip(tiles, (first_runs, *pool.map(runs, others)), strict=True) if can]


def _time(launch: Callable[[TileT], object], tile: TileT) -> float:
    """Median milliseconds of a launch."""
    return triton.testing.do_bench(lambda: launch(tile), warmup=5, rep=20, return_mode="median")


def _load(file: Path) -> dict[str, dict]:
    try:
        text = file.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        warnings.warn(f"the tiles of earlier searches can't be read: {error}", stacklevel=2)
        return {}
    try:
        return {key: dict(tile.items()) for key, tile in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        raise _broken(file, error) from error


def _broken(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file}: expected the tiles of an earlier search, got {error}; delete the file")


def _note(file: Path, key: str, tile: TileT) -> None:
    """Adds a tile to the file unless another process, one at a time, was there first; readers see whole files only."""
    import fcntl  # POSIX alone has it; without a search the package runs elsewhere too

    _read[file] = {key: asdict(tile)} | _read[file]
    temporary = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file.with_suffix(".lock"), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
            _read[file] |= _load(file)
            temporary.write_text(json.dumps(_read[file], indent=1, sort_keys=True))
            os.replace(temporary, file)
    except OSError as error:
        warnings.warn(f"the tiles that were found are not kept: {error}; set DIFFMOE_CACHE_DIR", stacklevel=2)
