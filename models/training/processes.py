"""The processes of a run: one, or one per GPU as torchrun starts them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.training.loading import pick_device

PIECE = 2**28  # bytes of gradients that are sent at once


@contextmanager
def process_group(device: str, patience: timedelta | None = None) -> Iterator[None]:
    """The group of the processes that torchrun started, each on a GPU of its own, until the end; of one alone, nothing.

    Args:
        device: "auto", "cpu" or "cuda".
        patience: how long one may keep the others waiting; torch's own limits by default.

    Raises:
        ValueError: a machine has more processes than GPUs, or `pick_device` refuses.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    on_gpu = pick_device(device).type == "cuda"
    if on_gpu:
        own, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if own >= count:
            raise ValueError(f"process {own} of this machine has no GPU, there are {count}: start {count} a machine")
        torch.cuda.set_device(own)
    # gloo for what Python asks the others, so that no GPU is waited for.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=patience)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Processes:
    """This process among those of the run, and what it does with the others.

    rank: 0 for the one that writes files.
    count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @staticmethod
    def current() -> Processes:
        """Those of torch's default process group; of one alone, where there is none.

        Raises:
            ValueError: torchrun started several, each of which would train for itself, into one directory.
        """
        if dist.is_available() and dist.is_initialized():
            return Processes(dist.get_rank(), dist.get_world_size())
        if (count := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise ValueError(
                f"WORLD_SIZE is {count}, but there is no process group: make one before, as `torchrun -m models.train` "
                "does, or start this without torchrun"
            )
        return Processes()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share_size(self, batch_size: int, parts: int) -> int:
        """How many images of a batch this process trains on.

        Raises:
            ValueError: the batch does not divide among the processes, or the shares not into as many parts.
        """
        size, rest = divmod(batch_size, self.count)
        if rest or size < parts:
            raise ValueError(
                f"batch_size is {batch_size}, but {self.count} processes need a multiple of {self.count}, and at least "
                f"{parts} images each for the parts of accumulation: correct --batch-size"
            )
        return size

    def share(self, batch: list[int]) -> list[int]:
        """The part of a batch of indices that this process trains on."""
        size = len(batch) // self.count
        return batch[self.rank * size : (self.rank + 1) * size]

    def replicate(self, model: nn.Module, *, average: bool = True) -> nn.Module:
        """The model, which starts from the first process's weights.

        Args:
            average: replace gradients by their means over the processes within each backward; else it is left to
                `average_`.
        """
        if self.count == 1:
            return model
        if not average:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)
            return model
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch < 2.13
        # Buffers change in `update_routing_state` alone, in all processes by the same numbers.
        return DistributedDataParallel(model, gradient_as_bucket_view=True, **{buffers: False})

    def combine(self, replica: nn.Module, *, last: bool) -> AbstractContextManager:
        """For a forward and backward pass, at whose end gradients are averaged if it is the last one of the step."""
        return nullcontext() if last or not isinstance(replica, DistributedDataParallel) else replica.no_sync()

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each by its mean over the processes, which have as many of the same shapes."""
        if self.count == 1:
            return
        piece: list[Tensor] = []
        for number, tensor in enumerate(tensors, 1):
            piece.append(tensor)
            if number == len(tensors) or sum(one.nbytes for one in piece) >= PIECE:
                means = self.mean(torch.cat([one.flatten() for one in piece])).split([one.numel() for one in piece])
                torch._foreach_copy_(piece, [mean.view_as(one) for mean, one in zip(means, piece, strict=True)])
                piece = []

    def mean(self, values: Tensor) -> Tensor:
        """Their mean over the processes."""
        if self.count > 1:
            dist.all_reduce(values)
            values /= self.count
        return values

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag whether it is set in any process; all of them wait for each other."""
        if self.count == 1:
            return list(flags)
        sums = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(sums)
        return sums.bool().tolist()

    def gather(self, value: Any) -> list[Any]:
        """What each process passes, by rank."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all are here."""
        self.any(False)
