"""The first Ctrl-C or SIGTERM as a request to stop after the current step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopOnSignal:
    """While entered, the first SIGINT or SIGTERM only sets `requested`; a second one acts as usual.

    Signals reach Python in the main thread alone, so elsewhere this never asks to stop.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "StopOnSignal":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._request) for number in self.SIGNALS}
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@contextmanager
def hold_signals() -> Iterator[None]:
    """Processes forked within never get SIGINT or SIGTERM; this one gets at the end what came meanwhile.

    Ctrl-C reaches all processes of a terminal, `timeout` and batch systems send SIGTERM to all of a group: those that
    load images go on until the trainer ends them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopOnSignal.SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
