"""Token trees: the drafter proposes a tree, the target verifies the tree.

Axes: N nodes. Node 0 is the root: the last known token, which is not yet in the target's KV cache.
Nodes are in verification order: first the principal chain (the most probable child at each step),
then the others. Accepting the principal chain therefore moves no KV rows. A parent always precedes
its children. A growing tree is in draft order instead: rows of the drafter's buffers, in order of
expansion.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import exp

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.errors import InputError
from dovetail.runtime.tree.repeats import Repeat


@dataclass(frozen=True, eq=False)
class DraftTree:
    """A token tree in verification order."""

    tokens: NDArray[np.int64]  # [N] target vocabulary
    parents: NDArray[np.int64]  # [N] parents[0] = -1, 0 <= parents[i] < i
    logprobs: NDArray[np.float32]  # [N] the drafter's cumulative path log-probability, 0 for the root

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 or not self.tokens.shape == self.parents.shape == self.logprobs.shape:
            shapes = self.tokens.shape, self.parents.shape, self.logprobs.shape
            raise InputError(f"tree arrays of shapes {shapes} do not match: give tokens, parents and logprobs [N]")
        parents: list[int] = self.parents.tolist()
        if parents[:1] != [-1] or not all(0 <= parent < node for node, parent in enumerate(parents[1:], 1)):
            raise InputError(
                f"tree parents {parents} are out of order: give -1 for the root, then parents before children"
            )

    @classmethod
    def root(cls, token: int) -> DraftTree:
        """Return the tree of plain decoding: the known token alone."""
        return cls.chain(np.array([token], np.int64))

    @classmethod
    def chain(cls, tokens: NDArray[np.int64]) -> DraftTree:
        """Return a tree of one path, with log-probabilities of 0."""
        return cls(tokens, np.arange(-1, len(tokens) - 1), np.zeros(len(tokens), np.float32))

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def expected_lengths(self) -> list[float]:
        """Expected tokens from verifying the best 1, 2, ... N nodes, if `logprobs` are right."""
        return list(accumulate(sorted(map(exp, self.logprobs.tolist()), reverse=True)))

    @property
    def expected_length(self) -> float:
        """Expected number of tokens from verifying the whole tree."""
        return self.expected_lengths[-1]

    @cached_property
    def _children(self) -> dict[tuple[int, int], int]:
        """Map (parent, token) -> node. Among siblings with the same token the first node wins."""
        edges = list(zip(self.parents.tolist(), self.tokens.tolist(), strict=True))
        return {edges[node]: node for node in range(len(edges) - 1, 0, -1)}

    def child(self, node: int, token: int) -> int | None:
        """Return the child of `node` that carries `token`, or None."""
        return self._children.get((node, token))

    def paths(self) -> list[NDArray[np.int64]]:
        """Return the nodes of each path from root to leaf, int64, the lowest nodes' path first."""
        parents: list[int] = self.parents.tolist()
        paths = []
        for leaf in sorted({*range(len(parents))} - {*parents}):
            path, node = list[int](), leaf
            while node >= 0:
                path.append(node)
                node = parents[node]
            paths.append(path[::-1])
        return [np.array(path, np.int64) for path in sorted(paths)]

    def depths(self) -> NDArray[np.int64]:
        """Return [N] int64, levels below the root. Node i is depths[i] positions after the root."""
        depths = [0]
        for parent in self.parents.tolist()[1:]:
            depths.append(depths[parent] + 1)
        return np.array(depths, np.int64)


def best_tree(tokens: list[int], parents: list[int], logprobs: list[float], budget: int) -> DraftTree:
    """Return the root and the `budget` best nodes, in verification order.

    Node 0 is the root. Parents come first and are at least as probable. Ties keep the earlier node.
    """
    kept = sorted(range(1, len(tokens)), key=lambda node: -logprobs[node])[:budget]
    order, tip = [0], 0
    for node in kept:  # by rank: the tip's first child here is its best child, and that child's children follow
        if parents[node] == tip:
            order.append(node)
            tip = node
    chain = set(order)
    order += [node for node in kept if node not in chain]
    place = {node: index for index, node in enumerate(order)}
    return DraftTree(
        tokens=np.array([tokens[node] for node in order], np.int64),
        parents=np.array([-1, *(place[parents[node]] for node in order[1:])], np.int64),
        logprobs=np.array([logprobs[node] for node in order], np.float32),
    )


def graft(tree: DraftTree, paths: Iterable[Repeat], width: int) -> DraftTree:
    """Add the repeated `paths` below the root and return the best `width` nodes of the result.

    A node that several paths share gets the best of their log-probabilities.
    """
    tokens, parents, logprobs = tree.tokens.tolist(), tree.parents.tolist(), tree.logprobs.tolist()
    children = dict(tree._children)
    for path in paths:
        tip = 0
        for token, logprob in zip(path.tokens, path.logprobs, strict=True):
            child = children.get((tip, token))
            if child is None:
                child = children[tip, token] = len(tokens)
                tokens.append(token)
                parents.append(tip)
                logprobs.append(logprob)
            else:
                logprobs[child] = max(logprobs[child], logprob)
            tip = child
    return best_tree(tokens, parents, logprobs, width - 1)
