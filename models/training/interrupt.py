"""Ctrl-C and SIGTERM as a wish to stop at the next good moment."""

import signal
import threading
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
