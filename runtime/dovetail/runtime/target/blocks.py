"""The owners of a model's KV blocks, and block memory that stays unused until the first write."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import numpy as np
from numpy.typing import NDArray

BlockIds = NDArray[np.int32]

_FREE, _SHARED = 0, -1
_MAP_NORESERVE = 0x4000  # Linux's value; Python has the name from 3.13 on


class BlockPool:
    """The owner of each KV block of a model: `owners[b]` is a number, or 0 if block b is free.

    Several owners may share a block, which then nobody writes to. An interrupted `take` leaves
    blocks without a use. The owner's next `keep` frees them.
    """

    def __init__(self) -> None:
        self.owners = np.zeros(0, np.int32)
        self._sharers = np.zeros(0, np.int32)  # of a shared block
        self._count = 0

    @property
    def free(self) -> int:
        return int(np.count_nonzero(self.owners == _FREE))

    def new_owner(self) -> int:
        self._count += 1
        return self._count

    def follow(self, other: BlockPool) -> None:
        """Number new owners after those of another pool, which may then own blocks here by the same numbers."""
        self._count = max(self._count, other._count)

    def grow(self, blocks: int) -> None:
        """Grow the pool to `blocks` blocks in all."""
        new = np.zeros(blocks - len(self.owners), np.int32)
        self.owners, self._sharers = np.concatenate([self.owners, new]), np.concatenate([self._sharers, new])

    def take(self, owner: int, count: int) -> BlockIds:
        """Give the owner the first `count` free blocks, which must exist, and return them."""
        taken = np.flatnonzero(self.owners == _FREE)[:count].astype(np.int32)
        assert len(taken) == count
        self.owners[taken] = owner
        return taken

    def keep(self, owner: int, blocks: BlockIds) -> None:
        """Free all blocks of the owner except `blocks`."""
        dropped = self.owners == owner
        dropped[blocks] = False
        self.owners[dropped] = _FREE

    def share(self, blocks: BlockIds) -> None:
        """Let one more owner have `blocks`."""
        owned = blocks[self.owners[blocks] != _SHARED]
        self._sharers[owned] = 1
        self.owners[owned] = _SHARED
        self._sharers[blocks] += 1

    def release(self, blocks: BlockIds) -> None:
        """Let one owner less have the shared `blocks`; the last owner frees them."""
        self._sharers[blocks] -= 1
        self.owners[blocks[self._sharers[blocks] == 0]] = _FREE


def untouched_zeros(shape: Sequence[int]) -> NDArray[np.uint8]:
    """Return zeros of `shape`, uint8. Linux provides each page of memory at its first write.

    numpy asks Linux for pages of 2 MiB, which would take memory for blocks that no text needs.
    Raises OSError if the process may not have a range of addresses of this size.
    """
    size = prod(shape)
    if size == 0 or sys.platform != "linux":
        return np.zeros(shape, np.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8).reshape(shape)
