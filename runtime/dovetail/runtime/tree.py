"""Token trees: what the drafter proposes and the target verifies.

Axes: N nodes, node 0 is the root: the last known token, not yet in the target's KV cache.
Nodes are in verification order: the principal chain (the most probable child at each step) first,
so that accepting it needs no move of KV rows; parents always precede children.
While it grows, a tree is in draft order instead: rows of the drafter's buffers, in order of expansion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from heapq import heappush, heapreplace
from itertools import accumulate
from math import exp
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .lookup import Repeat

_NEVER = float("-inf")


@dataclass(frozen=True)
class TreeLimits:
    """How far a tree may grow. Source: EAGLE-2's top-k expansion, the paper's total / depth / top-k.

    width: nodes verified in one pass, root included; 1 drafts nothing.
    depth: levels below the root.
    top_k: children considered per node, and nodes expanded per level; 1 gives a chain.
    lookup: tokens of repeated text that may join the tree as a path below the root (see lookup.py); 0 is off.
    """

    width: int = 10
    depth: int = 5
    top_k: int = 3
    lookup: int = field(default=12, metadata={"may_be_missing": True})  # in manifests that are older than it

    def __post_init__(self) -> None:
        for name, low in (("width", 1), ("depth", 0), ("top_k", 1), ("lookup", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise InputError(f"tree {name} {value!r} is out of range: give a whole number, {low} or more")


@dataclass(frozen=True, eq=False)
class DraftTree:
    """A token tree in verification order.

    tokens: [N] int64, target vocabulary.
    parents: [N] int64, parents[0] = -1, 0 <= parents[i] < i.
    logprobs: [N] float32, the drafter's cumulative path log-probability, 0 for the root.
    """

    tokens: NDArray[np.int64]
    parents: NDArray[np.int64]
    logprobs: NDArray[np.float32]

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
        """The tree of plain decoding: the known token alone."""
        return cls(np.array([token], np.int64), np.array([-1], np.int64), np.zeros(1, np.float32))

    def __len__(self) -> int:
        """Nodes, root included."""
        return len(self.tokens)

    @cached_property
    def expected_lengths(self) -> list[float]:
        """Tokens that verifying its best 1, 2, ... N nodes is expected to give, if the log-probabilities are true."""
        return list(accumulate(sorted(map(exp, self.logprobs.tolist()), reverse=True)))

    @cached_property
    def path_counts(self) -> list[int]:
        """Paths from the root to a leaf that its best 1, 2, ... N nodes have."""
        parents, inner, counts, paths = self.parents.tolist(), set[int](), list[int](), 1
        for node in sorted(range(len(parents)), key=lambda node: -self.logprobs[node]):
            paths += parents[node] in inner  # its parent is no leaf any more
            inner.add(parents[node])
            counts.append(paths)
        return counts

    @property
    def expected_length(self) -> float:
        """Tokens that verifying it is expected to give."""
        return self.expected_lengths[-1]

    @cached_property
    def _children(self) -> dict[tuple[int, int], int]:
        """(parent, token) -> node; of siblings with one token the first."""
        edges = list(zip(self.parents.tolist(), self.tokens.tolist(), strict=True))
        return {edges[node]: node for node in range(len(edges) - 1, 0, -1)}

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` that carries `token`, if there is one."""
        return self._children.get((node, token))

    def paths(self) -> list[NDArray[np.int64]]:
        """From the root to each leaf, the nodes of that path, int64; first the path of the lowest nodes."""
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
        """[N] int64, levels below the root: node i has position (root's position) + depths[i]."""
        depths = [0]
        for parent in self.parents.tolist()[1:]:
            depths.append(depths[parent] + 1)
        return np.array(depths, np.int64)


@dataclass(frozen=True, eq=False)
class Candidates:
    """Children that the drafter offers: the K best next tokens of each of n nodes.

    logprobs: [n, K] float32, log-probability given the node; -inf or nan is no candidate.
    ids: [n, K] integers, target vocabulary.
    """

    logprobs: NDArray[np.float32]
    ids: NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class Level:
    """Nodes of one depth that the drafter runs next, in draft order: row 0 is the root, which is never among them.

    depth: levels below the root, from 1.
    rows: [n] int64, the buffer row of each node: 1, 2, 3, ... over the levels of one tree.
    parent_rows: [n] int64, 0 for children of the root.
    tokens: [n] int64, target vocabulary.
    attend: [n, slots] bool, the rows a node attends to: itself and its ancestors below the root.
    """

    depth: int
    rows: NDArray[np.int64]
    parent_rows: NDArray[np.int64]
    tokens: NDArray[np.int64]
    attend: NDArray[np.bool_]


Expand = Callable[[Level], Candidates]


class Judge(Protocol):
    """Somebody who knows what a drafter's word is worth and what its calls cost."""

    def believe(self, depth: int, logprobs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Log-probabilities [n, K] of candidates at `depth`, given the path, as they deserve; in the same order."""
        ...

    def pays(self, depth: int, frontier: Sequence[float]) -> bool:
        """Whether to expand nodes of `depth`, given their cumulative log-probabilities."""
        ...


def grow_tree(
    root_token: int,
    first: Candidates,
    expand: Expand,
    limits: TreeLimits,
    *,
    slots: int = 64,
    judge: Judge | None = None,
) -> DraftTree:
    """Grow the tree of the `width - 1` nodes with the best cumulative log-probability.

    first: [1, K], the root's children. expand: called at most depth - 1 times, level by level, with at most
    top_k nodes; not called for nodes whose children could not be among the best any more.
    slots: buffer rows of the drafter, root's included; what would not fit is not expanded.
    judge: corrects the log-probabilities and may end the growth; None takes the drafter at its word.
    Source: EAGLE-2's expansion and reranking, without sampling: the tree depends on the candidates alone.
    """
    growth = _Growth(root_token, limits, slots)

    def add(nodes: list[int], found: Candidates, depth: int) -> list[int]:
        if judge:
            found = Candidates(judge.believe(depth, found.logprobs[:, : limits.top_k]), found.ids)
        return growth.add(nodes, found)

    frontier = add([0], first, 1) if limits.width > 1 and limits.depth > 0 else []
    for depth in range(1, limits.depth):
        frontier = growth.expandable(frontier)
        if not frontier or (judge and not judge.pays(depth, [growth.logprobs[node] for node in frontier])):
            break
        frontier = add(frontier, expand(growth.level(frontier, depth)), depth + 1)
    return growth.tree()


class _Growth:
    """The nodes found so far, in order of discovery: parents before children, so ties keep ancestors first.

    Plain lists: a few dozen nodes a round are cheaper in Python than in many small numpy calls.
    """

    def __init__(self, root_token: int, limits: TreeLimits, slots: int) -> None:
        self.limits, self.slots = limits, slots
        self.budget = limits.width - 1
        self.tokens, self.parents, self.logprobs = [root_token], [-1], [0.0]
        self.best: list[float] = []  # min-heap: log-probabilities of the best `budget` nodes
        self.rows: dict[int, int] = {0: 0}  # node -> draft row, for nodes that were expanded
        self.lineage: dict[int, list[int]] = {0: []}  # node -> rows it attends to

    def add(self, nodes: list[int], found: Candidates) -> list[int]:
        """Append the children of `nodes` that are among the best so far; returns them."""
        best, budget, top_k, start = self.best, self.budget, self.limits.top_k, len(self.tokens)
        for node, row, ids in zip(nodes, found.logprobs.tolist(), found.ids.tolist(), strict=True):
            above = self.logprobs[node]
            for logprob, token in zip(row[:top_k], ids[:top_k], strict=True):
                total = above + min(logprob, 0.0)  # rounding must not lift a child over its parent
                if not total > _NEVER:
                    continue
                if len(best) < budget:
                    heappush(best, total)
                elif total > best[0]:
                    heapreplace(best, total)
                else:
                    continue  # neither it nor its descendants can be kept
                self.tokens.append(token)
                self.parents.append(node)
                self.logprobs.append(total)
        return list(range(start, len(self.tokens)))

    def expandable(self, frontier: list[int]) -> list[int]:
        """The best top_k of `frontier` whose children may still be kept, as far as there are rows."""
        if len(self.best) == self.budget:
            frontier = [node for node in frontier if self.logprobs[node] > self.best[0]]
        count = min(self.limits.top_k, self.slots - len(self.rows))
        return self.ranked(frontier)[:count]

    def level(self, nodes: list[int], depth: int) -> Level:
        """Give `nodes` their draft rows and describe them to the drafter."""
        attend = np.zeros((len(nodes), self.slots), np.bool_)
        for index, node in enumerate(nodes):
            row = self.rows[node] = len(self.rows)
            self.lineage[node] = [*self.lineage[self.parents[node]], row]
            attend[index, self.lineage[node]] = True
        return Level(
            depth=depth,
            rows=np.array([self.rows[node] for node in nodes], np.int64),
            parent_rows=np.array([self.rows[self.parents[node]] for node in nodes], np.int64),
            tokens=np.array([self.tokens[node] for node in nodes], np.int64),
            attend=attend,
        )

    def ranked(self, nodes: Iterable[int]) -> list[int]:
        """Best first; ties in order of discovery."""
        logprobs = self.logprobs
        return sorted(nodes, key=lambda node: -logprobs[node])

    def tree(self) -> DraftTree:
        """The best nodes in verification order."""
        return best_tree(self.tokens, self.parents, self.logprobs, self.budget)


def best_tree(tokens: list[int], parents: list[int], logprobs: list[float], budget: int) -> DraftTree:
    """The root and the `budget` best nodes, in verification order: principal chain, then the rest by rank.

    Node 0 is the root; parents come before their children and are at least as probable.  Ties keep the earlier node.
    """
    kept = sorted(range(1, len(tokens)), key=lambda node: -logprobs[node])[:budget]
    order, tip = [0], 0
    for node in kept:  # by rank: the first child of the tip met here is its best, and its own children follow
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


def without_branches(tree: DraftTree, least: float) -> DraftTree:
    """`tree` without the branches that are expected to give fewer than `least` tokens, each beside its best sibling.

    A path costs attention over the whole context, whatever its length.  Source: dynamic programming from the leaves.
    """
    parents = tree.parents.tolist()
    worth = [exp(logprob) for logprob in tree.logprobs.tolist()]
    children: list[list[int]] = [[] for _ in parents]
    for node in range(len(parents) - 1, -1, -1):
        ranked = sorted(children[node], key=lambda child: -worth[child])
        children[node] = ranked[:1] + [child for child in ranked[1:] if worth[child] > least]
        worth[node] += sum(worth[child] for child in children[node]) - least * max(len(children[node]) - 1, 0)
        if node:
            children[parents[node]].append(node)
    kept, pending = list[int](), [0]
    while pending:
        kept.append(node := pending.pop())
        pending += children[node]
    if len(kept) == len(tree):
        return tree
    kept.sort()
    place = {node: index for index, node in enumerate(kept)}
    return best_tree(
        tree.tokens[kept].tolist(),
        [place.get(parents[node], -1) for node in kept],
        tree.logprobs[kept].tolist(),
        len(kept) - 1,
    )


def graft(tree: DraftTree, paths: Iterable[Repeat], width: int) -> DraftTree:
    """Put paths of tokens below the root, as far as they are not there yet, and keep the best `width` nodes of all.

    A node that several propose has the best of their log-probabilities.
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
