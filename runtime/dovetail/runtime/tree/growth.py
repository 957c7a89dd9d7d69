"""Grow a draft tree, level by level, from the drafter's candidates.

Axes: n nodes of a level, K candidates of each node. Draft order: see draft_tree.py.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.tree.draft_tree import DraftTree, best_tree
from dovetail.runtime.tree.limits import TreeLimits

_NEVER = float("-inf")


@dataclass(frozen=True, eq=False)
class Candidates:
    """Children that the drafter offers: the K best next tokens of each of n nodes."""

    logprobs: NDArray[np.float32]  # [n, K] log-probability given the node; -inf or nan marks no candidate
    ids: NDArray[np.integer[Any]]  # [n, K] target vocabulary


@dataclass(frozen=True, eq=False)
class Level:
    """Nodes of one depth that the drafter runs next, in draft order, without the root's row 0."""

    depth: int  # levels below the root, from 1
    rows: NDArray[np.int64]  # [n] buffer row of each node: 1, 2, 3, ... over the levels of one tree
    parent_rows: NDArray[np.int64]  # [n] 0 for children of the root
    tokens: NDArray[np.int64]  # [n] target vocabulary
    attend: NDArray[np.bool_]  # [n, slots] rows a node attends to: itself and its ancestors below the root


Expand = Callable[[Level], Candidates]


class Judge(Protocol):
    """Corrects a drafter's log-probabilities and decides whether another level pays."""

    def believe(self, depth: int, logprobs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return corrected log-probabilities [n, K] at `depth`, given the path; order stays."""

    def pays(self, depth: int, frontier: Sequence[float]) -> bool:
        """Return whether to expand nodes of `depth`, given their cumulative log-probabilities."""


def grow_tree(
    root_token: int,
    first: Candidates,
    expand: Expand,
    limits: TreeLimits,
    *,
    slots: int = 64,
    breadth: int | None = None,
    judge: Judge | None = None,
) -> DraftTree:
    """Return the tree of the `width - 1` nodes with the best cumulative log-probability.

    expand: runs the drafter on one level; called at most depth - 1 times, with at most top_k nodes.
    Other arguments: see `levels`.
    """
    growing = levels(root_token, first, limits, slots=slots, breadth=breadth, judge=judge)
    (tree,) = grow_together([growing], lambda wanted: {0: expand(wanted[0])})
    return tree


def grow_together(
    growing: Sequence[Generator[Level, Candidates, DraftTree]],
    expand: Callable[[Mapping[int, Level]], Mapping[int, Candidates]],
) -> list[DraftTree]:
    """Return the trees of `growing`, of which each call of `expand` runs one level.

    expand: takes and returns values by the index of their tree.
    """
    trees, found = dict[int, DraftTree](), dict[int, Candidates | None]((index, None) for index in range(len(growing)))
    while found:
        wanted = dict[int, Level]()
        for index, candidates in found.items():
            try:
                wanted[index] = growing[index].send(candidates)  # type: ignore[arg-type]  # None starts a generator
            except StopIteration as end:
                trees[index] = end.value
        found = {**expand(wanted)} if wanted else {}
    return [trees[index] for index in range(len(growing))]


def levels(
    root_token: int,
    first: Candidates,
    limits: TreeLimits,
    *,
    slots: int = 64,
    breadth: int | None = None,
    judge: Judge | None = None,
) -> Generator[Level, Candidates, DraftTree]:
    """Yield the levels that the drafter runs, take their candidates, and return the tree.

    first: [1, K], the root's children. A node is not expanded if its children cannot be among the
    best.
    slots: buffer rows of the drafter, the root's included. Nodes without a row are not expanded.
    breadth: nodes of a level that are expanded, None for top_k; 1 grows a chain with leaves.
    judge: corrects the log-probabilities and may end the growth. None leaves them as they are.
    Source: EAGLE-2's expansion and reranking, without sampling: candidates alone decide.
    """
    growth = _Growth(root_token, limits, slots, breadth or limits.top_k)

    def add(nodes: list[int], found: Candidates, depth: int) -> list[int]:
        if judge:
            found = Candidates(judge.believe(depth, found.logprobs[:, : limits.top_k]), found.ids)
        return growth.add(nodes, found)

    frontier = add([0], first, 1) if limits.width > 1 and limits.depth > 0 else []
    for depth in range(1, limits.depth):
        frontier = growth.expandable(frontier)
        if not frontier or (judge and not judge.pays(depth, [growth.logprobs[node] for node in frontier])):
            break
        frontier = add(frontier, (yield growth.level(frontier, depth)), depth + 1)
    return best_tree(growth.tokens, growth.parents, growth.logprobs, limits.width - 1)


def best_first(root_token: int, positions: Candidates, limits: TreeLimits, *, judge: Judge | None = None) -> DraftTree:
    """Return the tree of the `width - 1` nodes with the best products of probabilities.

    positions: [P, K], candidates of the P positions after the root, best first, which do not depend
    on the path. A node is a path of ranks. A heap holds the best nodes whose parent and better
    siblings are in the tree. judge: corrects log-probabilities; growth costs no call, so nobody
    asks whether it pays. Source: DDTree (arXiv 2604.12989).
    """
    levels = list[list[tuple[float, int]]]()
    for depth in range(1, min(limits.depth, len(positions.ids)) + 1):
        logprobs = positions.logprobs[depth - 1 : depth, : limits.top_k]
        believed = judge.believe(depth, logprobs) if judge else logprobs
        row = zip(believed[0].tolist(), positions.ids[depth - 1].tolist(), strict=False)
        levels.append([(min(logprob, 0.0), token) for logprob, token in row if logprob > _NEVER])
    tokens, parents, totals, depths = [root_token], [-1], [0.0], [0]
    heap = list[tuple[float, int, int]]()  # minus the log-probability, the parent, the rank among its children

    def offer(parent: int, rank: int) -> None:
        if depths[parent] < len(levels) and rank < len(level := levels[depths[parent]]):
            heappush(heap, (-totals[parent] - level[rank][0], parent, rank))

    offer(0, 0)
    while heap and len(tokens) < limits.width:
        cost, parent, rank = heappop(heap)
        offer(parent, rank + 1)
        tokens.append(levels[depths[parent]][rank][1])
        parents.append(parent)
        totals.append(-cost)
        depths.append(depths[parent] + 1)
        offer(len(tokens) - 1, 0)
    return best_tree(tokens, parents, totals, limits.width - 1)


class _Growth:
    """The nodes found so far, in order of discovery: parents precede children.

    Ties therefore keep ancestors. Lists are faster than numpy here: a round has few dozen nodes.
    """

    def __init__(self, root_token: int, limits: TreeLimits, slots: int, breadth: int) -> None:
        self.limits, self.slots, self.breadth = limits, slots, breadth
        self.budget = limits.width - 1  # nodes of the tree besides the root
        self.tokens, self.parents, self.logprobs = [root_token], [-1], [0.0]
        self.best: list[float] = []  # min-heap of the `budget` best log-probabilities
        self.rows: dict[int, int] = {0: 0}  # expanded node -> draft row
        self.lineage: dict[int, list[int]] = {0: []}  # node -> rows that the node attends to

    def add(self, nodes: list[int], found: Candidates) -> list[int]:
        """Append the children of `nodes` that are among the best so far, and return them."""
        best, budget, top_k, start = self.best, self.budget, self.limits.top_k, len(self.tokens)
        for node, row, ids in zip(nodes, found.logprobs.tolist(), found.ids.tolist(), strict=True):
            above = self.logprobs[node]
            for logprob, token in zip(row[:top_k], ids[:top_k], strict=True):
                total = above + min(logprob, 0.0)  # rounding must not make a child more probable than its parent
                if not total > _NEVER:
                    continue
                if len(best) < budget:
                    heappush(best, total)
                elif total > best[0]:
                    heapreplace(best, total)
                else:
                    continue  # the tree cannot keep this child or its descendants
                self.tokens.append(token)
                self.parents.append(node)
                self.logprobs.append(total)
        return list(range(start, len(self.tokens)))

    def expandable(self, frontier: list[int]) -> list[int]:
        """Return the best `breadth` of `frontier` whose children may be kept, limited by free rows."""
        if len(self.best) == self.budget:
            frontier = [node for node in frontier if self.logprobs[node] > self.best[0]]
        count = min(self.breadth, self.slots - len(self.rows))
        return sorted(frontier, key=lambda node: -self.logprobs[node])[:count]  # ties stay in order of discovery

    def level(self, nodes: list[int], depth: int) -> Level:
        """Give `nodes` their draft rows and return the level that the drafter runs."""
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
