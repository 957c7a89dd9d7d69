"""The drafter's seam: a session that proposes token trees.

Axes: T new tokens, K candidates, D feature size. For positions see the target's seam, target/session.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.errors import DeviceError
from dovetail.runtime.system.arrays import FloatArray, SequenceId, TokenArray
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.growth import Judge
from dovetail.runtime.tree.limits import TreeLimits

# For sampled tokens: (depth, ids [K]) -> [K] float32, to be added to a drafter's logits of the tokens `ids` that
# may come `depth` levels below the last known token, so that its best are what the target draws (see Sampler.ahead).
DraftNoise = Callable[[int, NDArray[np.integer[Any]]], FloatArray]


@dataclass(frozen=True)
class DeviceReport:
    """Facts of the device that a drafter runs on.

    note: why it runs there. bus_bytes: moved so far between host and device, both ways; 0 on the CPU.
    """

    note: str = ""
    bus_bytes: int = 0


class Moved(DeviceError):
    """The drafter's device failed. It runs on another one now, holds no pair, and must be extended again."""


@runtime_checkable
class Drafter(Protocol):
    """The drafter with its own KV of the target's sequences.

    It holds a sequence from the first `extend` until a `rewind` to 0.
    """

    device: str  # where it runs: "CPU (int8)", "CUDA (fp16)"
    capacity: int  # (feature, token) pairs of a sequence

    @property
    def report(self) -> DeviceReport:
        """Facts of its device, for whoever runs the engine."""
        ...

    def length(self, seq: SequenceId) -> int:
        """Pairs that it has been extended with; 0 for a sequence that it does not know."""
        ...

    def extend(
        self, seq: SequenceId, tokens: TokenArray, features: FloatArray, noise: DraftNoise | None = None
    ) -> None:
        """Append pairs: features[i] = f[t], tokens[i] = x[t+1]. tokens: [T], features: [T, D].

        noise: of what follows the last token, None where nothing is drawn; a session may do without it.
        """
        ...

    def propose(
        self, seq: SequenceId, limits: TreeLimits, judge: Judge | None = None, noise: DraftNoise | None = None
    ) -> DraftTree:
        """Grow a tree below the last token of `extend`, the root; judge: see grow_tree. noise: see `extend`."""
        ...

    def rewind(self, seq: SequenceId, keep: int) -> None:
        """Forget everything after the first `keep` pairs."""
        ...

    def close(self) -> None:
        """Give the device's memory back; the drafter is not to be used any more."""
        ...
