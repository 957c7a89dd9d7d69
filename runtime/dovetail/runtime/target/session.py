"""The target's protocol: a model that holds the KV of texts and verifies token trees.

Axes: N nodes of a tree, T new tokens, V target vocabulary, D feature size.

Positions, the same for target and drafter: the target has committed tokens x[0..L-1] and with them
features f[0..L-1]. The next token x[L] is known (sampled) but not committed. x[L] is the root of
the next tree. The drafter pairs feature f[t] with token x[t+1]. After L committed tokens and a
known x[L] it holds L pairs, or fewer if pairs are passed later. t counts from the first pair that
the drafter was given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.system.arrays import FloatArray, SequenceId, TokenArray
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.limits import LargestTree

NO_PROMPTS: Mapping[SequenceId, TokenArray] = MappingProxyType({})


@dataclass(frozen=True)
class TargetPass:
    """The result of a pass. Its arrays are valid until the target's next call for any sequence."""

    logits: FloatArray  # [rows, V] prefill: one row, the last token's; verify: one row per node
    features: FloatArray  # [T or N, D] row i belongs to new token or node i


@runtime_checkable
class Target(Protocol):
    """The target LLM with the KV of several texts, each a sequence that `open` numbers."""

    max_context: int  # tokens of a sequence

    @property
    def device(self) -> str:
        """Return where the target runs now, e.g. "CPU"."""

    @property
    def bus_bytes(self) -> int:
        """Return the bytes moved so far between host and a device of first layers, both ways; 0 without them."""

    @property
    def largest_tree(self) -> LargestTree | None:
        """Return the largest tree that passes take now, None for any."""

    def open(self) -> SequenceId:
        """Return the number of a new, empty sequence."""

    def fork(self, seq: SequenceId, keep: int) -> SequenceId:
        """Return the number of a new sequence that begins as another does, after at most `keep` tokens."""

    @property
    def room(self) -> int:
        """Tokens that all sequences together may still take, if each stays below `max_context`."""

    def length(self, seq: SequenceId) -> int:
        """Return how many tokens of the sequence are committed to the KV cache."""

    def prefill(self, seq: SequenceId, tokens: TokenArray) -> TargetPass:
        """Append and commit one chunk of prompt tokens. Return logits of the last token only."""

    def verify(
        self,
        offers: Mapping[SequenceId, DraftTree],
        prompts: Mapping[SequenceId, TokenArray] = NO_PROMPTS,
        *,
        rows: int = 0,
    ) -> Mapping[SequenceId, TargetPass]:
        """Run all trees in one pass. A node attends to its sequence's tokens and its ancestors.

        prompts: prompt tokens of other sequences, as in `prefill`; they share the pass. rows: that
        the pass computes at least, because passes of few sizes are quicker.
        """

    def commit(self, seq: SequenceId, path: NDArray[np.int64]) -> None:
        """Keep the KV rows of `path` (nodes of the verified tree, root first), drop the rest."""

    def rewind(self, seq: SequenceId, keep: int) -> None:
        """Forget everything after the first `keep` committed tokens, and any uncommitted tree."""

    def close(self, seq: SequenceId) -> None:
        """Forget the sequence and its number; one that is not open is no error."""


@contextmanager
def opened(target: Target) -> Iterator[SequenceId]:
    """Open a sequence for a `with` block, and close it after the block."""
    seq = target.open()
    try:
        yield seq
    finally:
        target.close(seq)
