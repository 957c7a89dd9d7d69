"""Trees: their shape and their paths, and that growth finds the best nodes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.runtime.errors import InputError
from dovetail.runtime.tree.draft_tree import DraftTree, best_tree
from dovetail.runtime.tree.growth import Candidates, Level, grow_tree
from dovetail.runtime.tree.limits import TreeLimits

ROOT = 7


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    """Trees of up to nine nodes in verification order."""
    parents, logprobs = [-1], [0.0]
    for node in range(1, draw(st.integers(1, 9))):
        parents.append(draw(st.integers(0, node - 1)))
        logprobs.append(logprobs[parents[-1]] + draw(st.sampled_from([0.0, -0.25, -1.0, -3.0])))
    return best_tree(list(range(len(parents))), parents, logprobs, len(parents) - 1)


class Oracle:
    """A drafter as a table: K candidates for each path below the root; records the levels it was asked for."""

    def __init__(self, seed: int, k: int, step: float | None = None) -> None:
        self.seed, self.k, self.step = seed, k, step
        self.paths: dict[int, tuple[int, ...]] = {0: ()}
        self.levels: list[Level] = []

    def row(self, path: tuple[int, ...]) -> tuple[list[float], list[int]]:
        rng = np.random.default_rng([self.seed, len(path), *path])
        logprobs = np.sort(-rng.exponential(1.0, self.k))[::-1].astype(np.float32)
        if self.step is not None:
            logprobs = np.round(logprobs / self.step) * np.float32(self.step)
        return logprobs.tolist(), rng.permutation(10 * self.k)[: self.k].tolist()

    def candidates(self, paths: list[tuple[int, ...]]) -> Candidates:
        logprobs, ids = zip(*(self.row(path) for path in paths), strict=True)
        return Candidates(np.array(logprobs, np.float32), np.array(ids, np.int32))

    def expand(self, level: Level) -> Candidates:
        self.levels.append(level)
        for row, parent, token in zip(level.rows, level.parent_rows, level.tokens, strict=True):
            self.paths[int(row)] = (*self.paths[int(parent)], int(token))
        return self.candidates([self.paths[int(row)] for row in level.rows])

    def grow(self, limits: TreeLimits, slots: int = 64) -> DraftTree:
        return grow_tree(ROOT, self.candidates([()]), self.expand, limits, slots=slots)


def paths_of(tree: DraftTree) -> dict[tuple[int, ...], float]:
    """Path tokens below the root -> cumulative log-probability."""
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens[1:].tolist(), tree.parents[1:].tolist(), strict=True):
        paths.append((*paths[parent], token))
    return dict(zip(paths, tree.logprobs.tolist(), strict=True))


def eagle2(oracle: Oracle, limits: TreeLimits) -> dict[tuple[int, ...], float]:
    """Expansion and reranking written down naively: expand everything EAGLE-2 expands, rank at the end."""
    found: dict[tuple[int, ...], float] = {}
    frontier: dict[tuple[int, ...], float] = {(): 0.0}
    for _ in range(limits.depth):
        level: dict[tuple[int, ...], float] = {}
        for path, above in frontier.items():
            for logprob, token in zip(*oracle.row(path), strict=True):
                level[(*path, token)] = above + logprob
        found |= level
        frontier = dict(sorted(level.items(), key=lambda item: -item[1])[: limits.top_k])
    return dict(sorted(found.items(), key=lambda item: -item[1])[: limits.width - 1])


@pytest.mark.parametrize(("width", "depth", "top_k"), list(itertools.product((2, 5, 12, 40), (1, 3, 6), (1, 3, 4))))
def test_growth_keeps_what_full_expansion_and_reranking_would_keep(width: int, depth: int, top_k: int) -> None:
    limits = TreeLimits(width, depth, top_k)
    for seed in range(5):
        tree = Oracle(seed, top_k).grow(limits)
        expected = eagle2(Oracle(seed, top_k), limits)
        grown = paths_of(tree)
        assert grown.pop(()) == 0.0
        assert grown == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("step", [None, 0.5, 2.0, 100.0])
def test_order_is_principal_chain_then_parents_before_children(step: float | None) -> None:
    for seed in range(20):
        tree = Oracle(seed, 4, step).grow(TreeLimits(12, 6, 4))
        assert tree.tokens[0] == ROOT and len(tree) == 12
        chain = 0
        while chain + 1 < len(tree) and tree.parents[chain + 1] == chain:
            chain += 1
        for node in range(chain + 1):  # the next of the chain is the best child; the chain ends at a leaf
            children = [child for child in range(1, len(tree)) if tree.parents[child] == node]
            assert bool(children) == (node < chain)
            if children:
                assert tree.logprobs[node + 1] == max(tree.logprobs[children])
        assert all(tree.logprobs[1:] <= tree.logprobs[tree.parents[1:]])


def test_growth_is_deterministic_with_ties() -> None:
    first, second = (Oracle(3, 4, 1.0).grow(TreeLimits(12, 6, 4)) for _ in range(2))
    assert first.tokens.tolist() == second.tokens.tolist() and first.parents.tolist() == second.parents.tolist()


def test_levels_describe_draft_rows() -> None:
    oracle = Oracle(1, 4)
    oracle.grow(TreeLimits(30, 5, 4))
    assert [level.depth for level in oracle.levels] == list(range(1, len(oracle.levels) + 1))
    rows = [row for level in oracle.levels for row in level.rows.tolist()]
    assert rows == list(range(1, len(rows) + 1))
    attended = {0: frozenset[int]()}
    for level in oracle.levels:
        assert level.attend.shape == (len(level.rows), 64) and len(level.rows) <= 4
        for row, parent, attend in zip(level.rows.tolist(), level.parent_rows.tolist(), level.attend, strict=True):
            attended[row] = attended[parent] | {row}
            assert set(np.flatnonzero(attend).tolist()) == attended[row]


@pytest.mark.parametrize(("width", "depth"), [(1, 6), (12, 0), (12, 1), (2, 6)])
def test_no_level_is_expanded_in_vain(width: int, depth: int) -> None:
    oracle = Oracle(2, 4)
    tree = oracle.grow(TreeLimits(width, depth, 4))
    assert oracle.levels == []
    assert len(tree) == (min(width, 5) if depth else 1)


def test_at_most_depth_minus_one_expansions_and_early_stop() -> None:
    sure = Candidates(np.array([[0.0, -50.0]], np.float32), np.array([[1, 2]]))
    levels: list[Level] = []

    def expand(level: Level) -> Candidates:
        levels.append(level)
        count = len(level.rows)
        return Candidates(sure.logprobs.repeat(count, 0), sure.ids.repeat(count, 0))

    tree = grow_tree(ROOT, sure, expand, TreeLimits(5, 6, 2))
    assert tree.parents.tolist() == [-1, 0, 1, 2, 3]
    assert len(levels) == 3  # four sure nodes: the fourth needs no children, and the doubtful ones never pay
    levels.clear()
    grow_tree(ROOT, sure, expand, TreeLimits(60, 6, 2))
    assert len(levels) == 5


def test_growth_stays_within_the_drafters_rows() -> None:
    oracle = Oracle(5, 10)
    tree = oracle.grow(TreeLimits(60, 9, 10), slots=16)
    assert max(int(level.rows.max()) for level in oracle.levels) == 15
    assert len(tree) <= 60


def test_impossible_candidates_are_skipped_and_rounding_never_lifts_a_child() -> None:
    first = Candidates(np.array([[1e-6, np.nan, -np.inf]], np.float32), np.array([[1, 2, 3]]))
    tree = grow_tree(ROOT, first, lambda level: first, TreeLimits(12, 3, 3))
    assert tree.tokens.tolist() == [ROOT, 1, 1, 1]
    assert tree.logprobs.tolist() == [0.0] * 4


def test_paths_depths_and_children() -> None:
    tree = DraftTree(np.array([7, 1, 2, 2, 9]), np.array([-1, 0, 1, 0, 3]), np.zeros(5, np.float32))
    assert [path.tolist() for path in tree.paths()] == [[0, 1, 2], [0, 3, 4]]
    assert tree.depths().tolist() == [0, 1, 2, 1, 2]
    assert (tree.child(0, 2), tree.child(1, 2), tree.child(0, 9), tree.child(3, 9)) == (3, 2, None, 4)
    root = DraftTree.root(4)
    assert len(root) == 1 and [path.tolist() for path in root.paths()] == [[0]] and root.child(0, 4) is None


@given(trees())
def test_every_node_is_on_a_path_and_the_first_path_has_the_lowest_nodes(tree: DraftTree) -> None:
    paths = [path.tolist() for path in tree.paths()]
    assert {node for path in paths for node in path} == {*range(len(tree))}
    assert paths == sorted(paths)
    for path in paths:
        assert path[0] == 0 and tree.parents[path[1:]].tolist() == path[:-1] and path[-1] not in tree.parents


@pytest.mark.parametrize("parents", [[], [0, 0], [-1, 1], [-1, -1], [-1, 0, 2]])
def test_trees_out_of_order_are_refused(parents: list[int]) -> None:
    count = len(parents)
    with pytest.raises(InputError, match="out of order"):
        DraftTree(np.zeros(count, np.int64), np.array(parents, np.int64), np.zeros(count, np.float32))


def test_arrays_that_do_not_match_are_refused() -> None:
    with pytest.raises(InputError, match="do not match"):
        DraftTree(np.zeros(2, np.int64), np.array([-1], np.int64), np.zeros(1, np.float32))


@pytest.mark.parametrize("bad", [{"width": 0}, {"depth": -1}, {"top_k": 0}, {"width": 2.5}])
def test_limits_out_of_range_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(InputError, match=f"tree {next(iter(bad))}"):
        TreeLimits(**bad)
