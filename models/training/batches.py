"""The order in which training sees the data, as a pure function of seed, epoch and step, and its loading."""

import signal
from collections.abc import Generator, Iterable, Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from models.training.interrupt import StopOnSignal, hold_signals


class ShuffledBatches(Sampler[list[int]]):
    """Endless batches of shuffled indices: a new permutation each epoch, and batches that run on across its border.

    Every item comes once per epoch and every batch is full, also where `batch_size` exceeds `num_items`.

    Args:
        num_items: size of the dataset, at least 1.
        batch_size: indices per batch.
        seed: with the number of the epoch it gives the permutation.
        start: how many batches to skip, so that a resumed run goes on where it stopped.
    """

    def __init__(self, num_items: int, batch_size: int, seed: int, start: int = 0) -> None:
        if num_items < 1:
            raise ValueError(f"num_items must be at least 1, got {num_items}: the training split is empty")
        self.num_items, self.batch_size, self.seed, self.start = num_items, batch_size, seed, start

    def __iter__(self) -> Iterator[list[int]]:
        indices = self._indices()
        while True:
            yield list(islice(indices, self.batch_size))

    def _indices(self) -> Iterator[int]:
        epoch, skip = divmod(self.start * self.batch_size, self.num_items)
        while True:
            yield from np.random.default_rng([self.seed, epoch]).permutation(self.num_items)[skip:].tolist()
            epoch, skip = epoch + 1, 0


def load_batches(
    images: Dataset, order: Iterable[list[int]], *, workers: int, pin_memory: bool
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Batches of `images` in that order, loaded by as many processes of their own, which end when it is closed."""
    loader = DataLoader(
        images,
        batch_sampler=order,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else it would draw from the global one, once per process
        worker_init_fn=_ignore_signals,  # a start method other than fork lets go of what is held
    )
    with hold_signals():
        batches = iter(loader)
    processes = batches._workers if workers else []
    try:
        yield from batches
    finally:
        if processes:
            batches._shutdown_workers()  # an error's traceback would keep them
        for process in processes:
            if process.is_alive():
                process.kill()  # one that waits for a disk: it takes no SIGTERM


def _ignore_signals(worker: int) -> None:
    for number in StopOnSignal.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
