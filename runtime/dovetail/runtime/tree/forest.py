"""The trees of all texts that share a pass of the target.

Axes: N nodes of all trees, t texts. A forest of one tree is the common case: one text alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import exp

from dovetail.runtime.tree.draft_tree import DraftTree, best_tree


@dataclass(frozen=True, eq=False)
class Forest:
    """One tree for each text, in the order of the texts."""

    trees: tuple[DraftTree, ...]

    def __len__(self) -> int:
        """Return N."""
        return sum(map(len, self.trees))

    @cached_property
    def expected_lengths(self) -> list[float]:
        """Expected tokens of all texts from verifying the best 1, 2, ... N nodes, roots first."""
        if len(self.trees) == 1:
            return self.trees[0].expected_lengths
        return list(accumulate(exp(logprob) for logprob, _, _ in self._ranked))

    @property
    def expected_length(self) -> float:
        """Expected tokens of all texts from verifying every node."""
        return self.expected_lengths[-1]

    @cached_property
    def _ranked(self) -> list[tuple[float, int, int]]:
        """(log-probability, text, node), the best first; parents precede their children."""
        every = (
            (logprob, text, node)
            for text, tree in enumerate(self.trees)
            for node, logprob in enumerate(tree.logprobs.tolist())
        )
        return sorted(every, key=lambda each: (-each[0], each[2] > 0))

    def best(self, count: int) -> Forest:
        """Return the best `count` nodes, but each text's root in any case."""
        if count >= len(self):
            return self
        kept = [0] * len(self.trees)
        for _, text, node in self._ranked[: max(count, len(self.trees))]:
            kept[text] += node > 0
        return Forest(tuple(_pruned(tree, budget) for tree, budget in zip(self.trees, kept, strict=True)))


def _pruned(tree: DraftTree, budget: int) -> DraftTree:
    """Return the root and the `budget` best nodes of a tree."""
    if budget >= len(tree) - 1:
        return tree
    return best_tree(tree.tokens.tolist(), tree.parents.tolist(), tree.logprobs.tolist(), budget)
