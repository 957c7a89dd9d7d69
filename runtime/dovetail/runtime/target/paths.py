"""The KV blocks that paths of a tree need, and the sizes of passes that read prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.target.paged import BLOCK

# OpenVINO prepares its kernels for each size of a pass and keeps them. Prompts therefore use few
# sizes.
_SMALL_PROMPTS = (2, 4, 8)
_STEP, _LARGE, _LARGE_STEP = 8, 64, 16  # multiples of 8 up to 64, then of 16 (docs/results/memory.md)


class Paths:
    """The paths of a tree, or the single path of a prompt, after a text of `length` tokens."""

    def __init__(self, rows: Sequence[NDArray[np.int64]], length: int) -> None:
        self.rows = rows  # of each path
        self.ends: list[slice] = []  # each path's own part of the text's blocks, from the text's last block on
        full, part = divmod(length, BLOCK)
        at = full
        for path in self.rows:
            begin, at = at, at + blocks_for(part + len(path))
            self.ends.append(slice(begin, at))

    def find(self, path: NDArray[np.int64]) -> slice | None:
        """Return the blocks of a path that begins with `path`, or None."""
        if not len(path):
            return None
        for rows, blocks in zip(self.rows, self.ends, strict=True):
            if np.array_equal(rows[: len(path)], path):
                return blocks
        return None


def blocks_for(tokens: int) -> int:
    """Return the number of KV blocks that `tokens` tokens fill, the last one in part."""
    return -(-tokens // BLOCK)


def prompt_rows(count: int) -> int:
    """Return the rows of the pass that reads `count` tokens of a prompt."""
    if count <= _SMALL_PROMPTS[-1]:
        return next(rows for rows in _SMALL_PROMPTS if rows >= count)
    step = _STEP if count <= _LARGE else _LARGE_STEP
    return -(-count // step) * step
