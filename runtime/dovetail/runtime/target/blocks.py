"""Which KV blocks of a model are free, and memory for blocks that costs nothing until it is written."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import numpy as np
from numpy.typing import NDArray

BlockIds = NDArray[np.int32]

_FREE = 0
_MAP_NORESERVE = 0x4000  # Linux's; Python 3.13 is the first to name it


class BlockPool:
    """Who owns which of a model's KV blocks: `owners[b]` is the owner's number, from 1, or 0 where block b is free.

    An interrupted `take` leaves blocks that nobody uses; the owner's next `keep` frees them.
    """

    def __init__(self) -> None:
        self.owners = np.zeros(0, np.int32)
        self._count = 0

    def new_owner(self) -> int:
        """The number of another owner."""
        self._count += 1
        return self._count

    def grow(self, blocks: int) -> None:
        """Have `blocks` blocks in all."""
        self.owners = np.concatenate([self.owners, np.zeros(blocks - len(self.owners), np.int32)])

    def take(self, owner: int, count: int) -> BlockIds:
        """The first `count` free blocks, now the owner's; there must be so many."""
        taken = np.flatnonzero(self.owners == _FREE)[:count].astype(np.int32)
        assert len(taken) == count
        self.owners[taken] = owner
        return taken

    def keep(self, owner: int, blocks: BlockIds) -> None:
        """Free whatever the owner has beside `blocks`."""
        dropped = self.owners == owner
        dropped[blocks] = False
        self.owners[dropped] = _FREE


def untouched_zeros(shape: Sequence[int]) -> NDArray[np.uint16]:
    """Zeros of `shape`, uint16, whose memory Linux provides page by page when it is first written.

    numpy asks Linux for pages of 2 MiB, which would take memory for blocks that no text needs.
    Raises OSError where the process may not have such a range of addresses.
    """
    size = 2 * prod(shape)
    if size == 0 or sys.platform != "linux":
        return np.zeros(shape, np.uint16)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint16).reshape(shape)
