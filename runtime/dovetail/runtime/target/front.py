"""The protocol of a front: the first layers of a target, run by another engine.

Axes: T rows of a text in a pass, H hidden size, D feature size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.system.arrays import SequenceId, TokenArray
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.limits import LargestTree

if TYPE_CHECKING:
    import openvino as ov

    from dovetail.runtime.target.features import FeatureMix


@dataclass(frozen=True)
class FrontPass:
    """The first layers' result for the rows of a text."""

    hidden: NDArray[np.float32]  # [T, H] behind these layers
    mixed: NDArray[np.float32] | None = None  # [T, D] their share of a drafter's features, if it reads them

    def at(self, rows: NDArray[np.int64]) -> FrontPass:
        return FrontPass(self.hidden[rows], None if self.mixed is None else self.mixed[rows])


class Front(Protocol):
    """The first layers with the keys and values of the target's sequences. A row depends on the tokens before it."""

    count: int  # layers
    device: str  # its name
    device_key: str  # "cuda", "webgpu" or "cpu"
    largest_tree: LargestTree

    @property
    def bus_bytes(self) -> int:
        """Return the bytes moved so far between host and device, both ways."""

    def open(self, seq: SequenceId) -> None:
        """Begin an empty sequence with a number of the target's."""

    def fork(self, seq: SequenceId, new: SequenceId, keep: int) -> None:
        """Begin the sequence `new` with the first `keep` tokens of another."""

    def read(self, seq: SequenceId, length: int, tokens: TokenArray) -> FrontPass:
        """Run tokens of a prompt after `length` tokens, and commit them. Raises DeviceError."""

    def verify(self, seq: SequenceId, length: int, tree: DraftTree) -> FrontPass:
        """Run a tree after `length` tokens. Raises InputError for one that is too large, DeviceError."""

    def commit(self, seq: SequenceId, path: NDArray[np.int64]) -> None:
        """Keep the nodes of a path of the verified tree."""

    def rewind(self, seq: SequenceId, keep: int) -> None:
        """Forget everything after the first `keep` tokens."""

    def close(self, seq: SequenceId) -> None:
        """Forget a sequence."""

    def pretend_length(self, seq: SequenceId, tokens: int) -> None:
        """Act as if `tokens` tokens were committed, for timing only."""

    def tokens(self, seq: SequenceId) -> TokenArray:
        """Return the committed tokens."""

    def release(self) -> None:
        """Free the device's memory."""


class Take(Protocol):
    """Takes the first layers out of a target's graph."""

    @property
    def count(self) -> int:
        """Return how many layers."""

    def outputs(self, model: ov.Model) -> list[ov.Output]:
        """Return the residual stream after each layer of a graph, before it is paged. Raises InputError."""

    def __call__(self, model: ov.Model, outputs: list[ov.Output], mix: FeatureMix | None) -> Front:
        """Return the first layers, cut off a paged graph. outputs: found before.

        mix: how a drafter's features are made. Raises InputError for a graph that cannot be cut, DeviceError.
        """
