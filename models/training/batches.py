"""The order in which training sees the data, as a pure function of seed, epoch and step."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
from torch.utils.data import Sampler


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
