"""Memory as a kernel sees it, with what a sanitizer would say of its accesses."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from tests.kernels.ptx.values import UNSIGNED


class Fault(Exception):
    """After which a launch cannot go on."""


class GlobalMemory:
    """The storages that a launch may use. Races between blocks go unseen."""

    def __init__(self) -> None:
        self.regions: dict[int, np.ndarray] = {}  # bytes, by where they begin

    def add(self, pointer: int, size: int) -> None:
        if size and pointer not in self.regions:
            view = np.frombuffer((ctypes.c_uint8 * size).from_address(pointer), np.uint8)
            self.regions = dict(sorted({**self.regions, pointer: view}.items()))
            self.starts = np.array(list(self.regions), np.uint64)
            self.ends = self.starts + np.array([len(one) for one in self.regions.values()], np.uint64)

    def load(self, addresses: np.ndarray, width: int, count: int, alignment: int | None = None) -> np.ndarray:
        """``count`` numbers of ``width`` bytes from each address: (n, count)."""
        out = np.empty((len(addresses), count), UNSIGNED[width])
        for mine, at, data in self._locate(addresses, width, count, alignment or width * count):
            out[mine] = data[at]
        return out

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        width, count = values.itemsize, values.shape[1]
        for mine, at, data in self._locate(addresses, width, count, width * count):
            data[at] = values[mine]

    def _locate(self, addresses: np.ndarray, width: int, count: int, alignment: int):
        """For each region that is used: by which threads, at which of its numbers, and those numbers."""
        if (addresses % np.uint64(alignment)).any():
            raise Fault("misaligned access of global memory")
        if not self.regions:
            raise Fault("access outside of the arguments")
        which = np.searchsorted(self.starts, addresses, "right").astype(np.int64) - 1
        ends = self.ends[which]
        if ((which < 0) | (addresses >= ends) | (ends - addresses < width * count)).any():
            raise Fault("access outside of the arguments")
        views = list(self.regions.values())
        for i in np.unique(which):
            mine = which == i
            at = ((addresses[mine] - self.starts[i]) // np.uint64(width)).astype(np.int64)
            data = views[i][: len(views[i]) // width * width].view(UNSIGNED[width])
            yield mine, at[:, None] + np.arange(count), data


# Who wrote a granule last, where that is no warp: nobody, a copy still under way, the bulk copy engine, atomics.
NOBODY, IN_FLIGHT, ENGINE, ATOMIC = -1, -2, -3, -4
MANY = -5  # who read it last


class SharedMemory:
    """Of several blocks, one after another.

    Its shadow says of each granule who wrote and who read it last, and when. That is held against the block's last
    barrier: what another warp did since then may not have happened yet. Threads of one warp count as in step.
    """

    def __init__(self, blocks: int, warps: int, size: int, granule: int, fault: Callable[[str, int], None]) -> None:
        self.limit, self.size = size, -(-size // 1024) * 1024  # so that swizzles, which take bits of addresses, hold
        self.granule, self.fault = granule, fault
        self.data = np.full(blocks * self.size, 0xCB, np.uint8)
        n = blocks * self.size // granule
        self.writer, self.reader = np.full(n, NOBODY, np.int8), np.full(n, NOBODY, np.int8)
        self.written, self.read_at = np.full(n, -1, np.int32), np.full(n, -1, np.int32)
        self.barrier = np.zeros(blocks, np.int32)
        self.fence = np.zeros((blocks, warps), np.int32)  # for the asynchronous proxy

    def locate(self, block: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
        """Of accesses of ``size`` bytes in the memories of their blocks."""
        if (addresses % size).any():
            raise Fault("misaligned access of shared memory")
        if (addresses < 0).any() or (addresses + size > self.limit).any():
            raise Fault("access outside of shared memory")
        return block.astype(np.int64) * self.size + addresses

    def granules(self, flat: np.ndarray, size: int) -> np.ndarray:
        return flat[:, None] // self.granule + np.arange(max(size // self.granule, 1))

    def load(self, block, warp, addresses, width: int, count: int, now: int) -> np.ndarray:
        flat = self.locate(block, addresses, width * count)
        self.note_read(block, warp, flat, width * count, now)
        return self.data.view(UNSIGNED[width])[(flat // width)[:, None] + np.arange(count)]

    def store(self, block, warp, addresses, values: np.ndarray, now: int) -> None:
        width, count = values.itemsize, values.shape[1]
        flat = self.locate(block, addresses, width * count)
        self.note_write(block, warp, flat, width * count, now)
        data, at = self.data.view(UNSIGNED[width]), (flat // width)[:, None] + np.arange(count)
        data[at] = values
        self.expect(data[at] == values, "different values written to one place at once")

    def expect(self, good: np.ndarray, text: str) -> None:
        if not good.all():
            self.fault(text, int(good.size - good.sum()))

    def note_read(self, block, warp, flat, size: int, now: int) -> None:
        g, warp, barrier = self.granules(flat, size), warp[:, None], self.barrier[block][:, None]
        writer, recent = self.writer[g], self.written[g] > barrier
        self.expect(writer != NOBODY, "read of what nobody wrote")
        self.expect(writer != IN_FLIGHT, "read of a copy in flight")
        others = (writer >= 0) & (writer != warp) | (writer == ATOMIC)
        self.expect(~(others & recent), "read after write without a barrier")
        again = (self.reader[g] != warp) & (self.read_at[g] > barrier)
        self.reader[g] = np.where(again, MANY, warp)
        self.read_at[g] = now
        several = self.reader[g] != warp  # in this very instruction
        self.reader[g[several]] = MANY

    def note_write(self, block, warp, flat, size: int, now: int, writer: int | None = None) -> None:
        """writer: that is to be noted, if not the warp."""
        g, warp, barrier = self.granules(flat, size), warp[:, None], self.barrier[block][:, None]
        old, recent = self.writer[g], self.written[g] > barrier
        self.expect(old != IN_FLIGHT, "write over a copy in flight")
        others = (old >= 0) & (old != warp) | (old == ATOMIC) & (writer != ATOMIC)
        self.expect(~(others & recent), "write after write without a barrier")
        read = (self.read_at[g] > barrier) & (self.reader[g] != warp)
        self.expect(~read, "write after read without a barrier")
        self.writer[g] = warp if writer is None else writer
        self.written[g] = now

    def note_arrival(self, flat, size: int, writer: np.ndarray | int, now: int) -> None:
        """Of what a copy brings."""
        g = self.granules(flat, size)
        self.writer[g], self.written[g] = writer, now

    def note_product(self, flat: np.ndarray, now: int) -> None:
        """A warp group starts a product of what is there: it reads through the asynchronous proxy.

        A fence of that proxy counts if the warp that wrote had it after that, or all warps of the block.
        """
        g = np.unique(flat // self.granule)
        block = g * self.granule // self.size
        writer, written = self.writer[g], self.written[g]
        self.expect(writer != NOBODY, "product of what nobody wrote")
        self.expect(writer != IN_FLIGHT, "product of a copy in flight")
        by_threads = (writer >= 0) | (writer == ATOMIC)
        self.expect(
            ~by_threads | (written <= self.barrier[block]), "product of what was written since the last barrier"
        )
        fence = self.fence.min(1)[block]
        fence = np.where(writer >= 0, np.maximum(fence, self.fence[block, np.maximum(writer, 0)]), fence)
        self.expect(~by_threads | (written <= fence), "product of what was written since the last proxy fence")
        self.reader[g], self.read_at[g] = MANY, now

    def note_operand(self, flat: np.ndarray, start: int, now: int) -> None:
        """A product that started then is over, and has read until now."""
        g = np.unique(flat // self.granule)
        self.expect(self.written[g] <= start, "operand overwritten while the product was under way")
        self.reader[g], self.read_at[g] = MANY, now


def wavefronts(flat: np.ndarray, size: int) -> tuple[int, int]:
    """Cycles that one warp's access of ``size`` bytes a thread takes of the 32 banks, and the fewest that it could."""
    words = [
        np.unique((part[:, None] + np.arange(0, max(size, 4), 4)) // 4)
        for part in np.split(flat, range(0, len(flat), 32 if size <= 4 else 128 // size)[1:])
    ]
    fewest = -(-len(np.unique(np.concatenate(words))) // 32)
    return sum(int(np.bincount(one % 32).max()) for one in words), fewest
