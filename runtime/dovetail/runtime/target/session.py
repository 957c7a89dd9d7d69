"""The target's protocol: a session that verifies trees.

Axes: N nodes of a tree, T new tokens, V target vocabulary, D feature size.

Positions, the same for target and drafter: the target has committed tokens x[0..L-1] and with them
features f[0..L-1]. The next token x[L] is known (sampled) but not committed. x[L] is the root of
the next tree. The drafter pairs feature f[t] with token x[t+1]. After L committed tokens and a
known x[L] it holds L pairs, or fewer if pairs are passed later. t counts from the first pair that
the drafter was given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.system.arrays import FloatArray, TokenArray
from dovetail.runtime.tree.draft_tree import DraftTree


@dataclass(frozen=True)
class TargetPass:
    """The result of one forward pass of the target.

    logits: [rows, V] float32; prefill: one row, the last token's; verify: one row per node.
    features: [T or N, D] float32, row i belongs to new token or node i.
    The arrays may be views of engine memory: valid until the session's next call.
    """

    logits: FloatArray
    features: FloatArray


@runtime_checkable
class TargetSession(Protocol):
    """The target LLM with the KV of one conversation."""

    device: str  # e.g. "CPU"
    max_context: int  # tokens

    @property
    def length(self) -> int:
        """Tokens committed to the KV cache."""
        ...

    def prefill(self, tokens: TokenArray) -> TargetPass:
        """Append and commit one chunk of prompt tokens. Return logits of the last token only."""
        ...

    def verify(self, tree: DraftTree) -> TargetPass:
        """Run all nodes in one pass, each attending to the committed tokens and its ancestors."""
        ...

    def commit(self, path: NDArray[np.int64]) -> None:
        """Keep the KV rows of `path` (nodes of the verified tree, root first), drop the rest."""
        ...

    def reset(self, keep: int = 0) -> None:
        """Forget everything after the first `keep` committed tokens, and any uncommitted tree."""
        ...
