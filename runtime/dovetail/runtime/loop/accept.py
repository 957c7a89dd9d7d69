"""Acceptance by sample-and-match: keep the path that the target itself would have written.

Axes: N nodes, V target vocabulary, A accepted nodes below the root.
The target chooses its own token at each node, and the walk goes on where the tree has that token. What it chooses
depends on its logits and the position's noise alone, so every token comes from its processed distribution whatever the
tree proposes, and whatever the drafter knew of the noise: no draft probabilities are needed.
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
    """What the target made of a tree.

    path: [A + 1] int64, accepted nodes, root first.
    tokens: A + 1 token ids: those of the accepted nodes, then the target's own next token, which no node
    carried (recovered) or which follows a leaf (bonus).
    """

    path: NDArray[np.int64]
    tokens: tuple[int, ...]

    @property
    def accepted(self) -> int:
        """Drafted tokens that were right."""
        return len(self.tokens) - 1


def accept(
    tree: DraftTree, logits: NDArray[np.float32], sampler: Sampler, position: int, context: Sequence[int]
) -> Verdict:
    """Keep the longest path that the target itself would have produced.

    logits: [N, V] float32, row i belongs to node i. position: absolute, of the first token to be chosen.
    context: every token id before it, the root's included. Only visited rows are looked at.
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
