"""Acceptance by sample-and-match: keep the path that the target itself would have written.

Axes: N nodes, V target vocabulary, A accepted nodes below the root. The target chooses a token at
each node, and the walk goes on where the tree has that token. The choice depends on the target's
logits and the position's noise alone. Every token therefore comes from the target's processed
distribution, whatever the tree proposes and whatever noise the drafter knew. Draft probabilities
are not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.tree.draft_tree import DraftTree


@dataclass(frozen=True, eq=False)
class Verdict:
    """The accepted path of a tree, and its tokens."""

    path: NDArray[np.int64]  # [A + 1] accepted nodes, root first
    tokens: tuple[int, ...]  # of the A accepted nodes, then the target's next, which no child of the last node has

    @property
    def accepted(self) -> int:
        """Number of drafted tokens that were right."""
        return len(self.tokens) - 1


def accept(
    tree: DraftTree, logits: NDArray[np.float32], sampler: Sampler, position: int, context: Sequence[int]
) -> Verdict:
    """Return the longest path that the target itself would have produced.

    logits: [N, V] float32, row i belongs to node i; only visited rows are read. position: absolute,
    of the first token to choose. context: every token id before it, the root's included.
    """
    path, tokens, seen = [0], list[int](), list(context)
    while True:
        node = path[-1]
        token = sampler.pick(logits[node], position + len(tokens), seen)
        tokens.append(token)
        seen.append(token)
        child = tree.child(node, token)
        if child is None:
            return Verdict(np.array(path, np.int64), tuple(tokens))
        path.append(child)
