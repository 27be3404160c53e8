"""Groups of work that a block starts, and waits for later: nothing of it is done before."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Work = Callable[[np.ndarray], None]  # does it for some blocks


class Queue:
    """Of several blocks, each with groups of its own. The arrays of bool say which blocks."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.open: list[tuple[np.ndarray, Work]] = []  # in no group yet
        self.groups: list[tuple[np.ndarray, list[tuple[np.ndarray, Work]]]] = []

    @property
    def busy(self) -> bool:
        return bool(self.open or any(works for _, works in self.groups))

    def start(self, blocks: np.ndarray, work: Work) -> None:
        self.open.append((blocks, work))

    def commit(self, blocks: np.ndarray) -> None:
        """What those blocks have started is a group."""
        self.groups.append((blocks, [(of & blocks, work) for of, work in self.open if (of & blocks).any()]))
        self.open = [(of & ~blocks, work) for of, work in self.open if (of & ~blocks).any()]

    def wait(self, blocks: np.ndarray, left: int) -> None:
        """Until those blocks have at most so many groups under way: the last ones."""
        later, still = np.zeros(self.num_blocks, np.int64), []
        due = []
        for of, works in reversed(self.groups):
            now = of & blocks & (later >= left)
            due.append([(here & now, work) for here, work in works if (here & now).any()])
            if (of & ~now).any():
                still.append((of & ~now, [(here & ~now, work) for here, work in works if (here & ~now).any()]))
            later += of
        self.groups = still[::-1]
        for works in reversed(due):
            for here, work in works:
                work(here)
