"""Files written whole or not at all, and by one process at a time."""

import os
import secrets
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Create or replace `path` by what `write` puts into a file; a crash leaves the old one or the new, whole.

    Several processes may write one file: the last one's is there in the end. One that is killed leaves a hidden
    ``.<name>.*.tmp``.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a disk may be full
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


class FileLock:
    """A hold on a file, which is made where there is none, until `close` or until nothing refers to this any more.

    Nobody else can hold it meanwhile: no other process, nor another of these. Without effect where the system knows no
    `flock`, and with a warning where only the file system does not.

    Args:
        path: the file.
        busy: what the error says where another holds it.

    Raises:
        ValueError: another holds it.
    """

    def __init__(self, path: Path, busy: str) -> None:
        self.path, self.busy = path, busy
        self.take()
        if hasattr(os, "register_at_fork"):
            own = weakref.ref(self)
            # A forked process would hold it on, and may outlive this one.
            os.register_at_fork(after_in_child=lambda: (lock := own()) and lock.close())

    def take(self) -> None:
        """Hold it again after `close`."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        self._close = weakref.finalize(self, os.close, file)
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            return
        except BlockingIOError as error:
            self.close()
            raise ValueError(self.busy) from error
        except OSError as error:
            warnings.warn(f"{self.path} can't be locked ({error}): let no other process write there", stacklevel=2)

    def close(self) -> None:
        """Let go of it; once more does nothing."""
        self._close()

    def __enter__(self) -> "FileLock":
        if not self._close.alive:
            self.take()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
