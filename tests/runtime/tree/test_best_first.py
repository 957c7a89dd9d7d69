"""The tree of a block has the most probable products of the positions' candidates, and needs no call."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from dovetail.runtime.tree.growth import Candidates, best_first
from dovetail.runtime.tree.limits import TreeLimits

POSITIONS, CANDIDATES = 4, 3


def block(seed: int) -> Candidates:
    rng = np.random.default_rng(seed)
    logprobs = -np.sort(rng.exponential(size=(POSITIONS, CANDIDATES))).astype(np.float32)
    return Candidates(logprobs, rng.integers(0, 100, (POSITIONS, CANDIDATES)))


def products(positions: Candidates, limits: TreeLimits) -> list[float]:
    """The log-probability of every path within the limits, best first."""
    values = []
    for depth in range(1, min(limits.depth, POSITIONS) + 1):
        for ranks in product(range(min(limits.top_k, CANDIDATES)), repeat=depth):
            values.append(sum(float(positions.logprobs[at, rank]) for at, rank in enumerate(ranks)))
    return sorted(values, reverse=True)


@pytest.mark.parametrize("limits", [(1, 4, 3), (2, 4, 3), (12, 4, 3), (12, 2, 3), (12, 4, 1), (100, 3, 2), (500, 9, 9)])
@pytest.mark.parametrize("seed", range(5))
def test_the_tree_has_the_best_of_all_products(limits: tuple[int, int, int], seed: int) -> None:
    positions, bounds = block(seed), TreeLimits(*limits, lookup=0)
    tree = best_first(7, positions, bounds)
    best = products(positions, bounds)[: bounds.width - 1]
    np.testing.assert_allclose(-np.sort(-tree.logprobs[1:]), best, rtol=1e-5)
    assert tree.tokens[0] == 7 and len(tree) == len(best) + 1
    for node, depth in enumerate(tree.depths()):
        assert depth == 0 or tree.tokens[node] in positions.ids[depth - 1]


def test_the_principal_chain_comes_first_and_ties_keep_ancestors() -> None:
    even = Candidates(np.zeros((3, 2), np.float32), np.array([[1, 2], [3, 4], [5, 6]]))
    tree = best_first(0, even, TreeLimits(4, 3, 2, lookup=0))
    assert tree.parents[0] == -1 and all(parent < node for node, parent in enumerate(tree.parents[1:], 1))
    assert len(tree) == 4


def test_no_candidate_is_no_node() -> None:
    gaps = Candidates(np.array([[-0.1, -np.inf], [np.nan, np.nan]], np.float32), np.array([[1, 2], [3, 4]]))
    tree = best_first(0, gaps, TreeLimits(8, 4, 2, lookup=0))
    assert tree.tokens.tolist() == [0, 1]


class Halving:
    """Believes that each level is half as probable, and must not be asked whether a level pays."""

    def __init__(self) -> None:
        self.depths: list[int] = []

    def believe(self, depth: int, logprobs: NDArray[np.float32]) -> NDArray[np.float32]:
        self.depths.append(depth)
        assert logprobs.shape == (1, 2)
        return logprobs - np.float32(np.log(2))

    def pays(self, depth: int, frontier: object) -> bool:
        raise AssertionError("growth costs nothing")


def test_a_judge_corrects_each_position_once() -> None:
    judge, positions = Halving(), block(0)
    tree = best_first(0, positions, TreeLimits(6, 3, 2, lookup=0), judge=judge)
    assert judge.depths == [1, 2, 3]
    plain = best_first(0, positions, TreeLimits(500, 3, 2, lookup=0))
    for node, (parent, depth) in enumerate(zip(tree.parents, tree.depths(), strict=True)):
        if depth == 1:
            same = plain.child(0, int(tree.tokens[node]))
            assert same is not None and parent == 0
            assert tree.logprobs[node] == pytest.approx(plain.logprobs[same] - np.log(2), rel=1e-5)
