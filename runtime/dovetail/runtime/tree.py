"""Token trees: what the drafter proposes and the target verifies.

Axes: N nodes, node 0 is the root: the last known token, not yet in the target's KV cache.
Nodes are in verification order: the principal chain (the most probable child at each step) first,
so that accepting it needs no move of KV rows; parents always precede children.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import InputError


@dataclass(frozen=True)
class TreeLimits:
    """How far a tree may grow. Source: EAGLE-2's top-k expansion, the paper's total / depth / top-k.

    width: nodes verified in one pass, root included; 1 is plain decoding.
    depth: levels below the root.
    top_k: children considered per node, and nodes expanded per level; 1 gives a chain.
    """

    width: int = 12
    depth: int = 6
    top_k: int = 4

    def __post_init__(self) -> None:
        for name, low in (("width", 1), ("depth", 0), ("top_k", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise InputError(f"tree {name} {value!r} is out of range: give a whole number, {low} or more")


@dataclass(frozen=True)
class DraftTree:
    """A token tree in verification order.

    tokens: [N] int64, target vocabulary.
    parents: [N] int64, parents[0] = -1, parents[i] < i.
    logprobs: [N] float32, the drafter's cumulative path log-probability, 0 for the root.
    """

    tokens: NDArray[np.int64]
    parents: NDArray[np.int64]
    logprobs: NDArray[np.float32]

    @classmethod
    def root(cls, token: int) -> DraftTree:
        """The tree of plain decoding: the known token alone."""
        return cls(np.array([token], np.int64), np.array([-1], np.int64), np.zeros(1, np.float32))
