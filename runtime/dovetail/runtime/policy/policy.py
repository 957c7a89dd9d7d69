"""The seam of the policy, and the records that go through a round: a plan, a choice, and what came of both.

A record goes forward: `plan` before the drafter is asked, `choose` before the target verifies, `learn` at the end.
Questions change nothing; `start` and `learn` alone write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.tree.draft_tree import DraftTree


@dataclass(frozen=True)
class Plan:
    """What a round is to do.

    context: tokens committed before it.  unread: pairs that the drafter has not read yet.
    widths: numbers of nodes, ascending, that the tree may have.  draft: whether to ask the drafter.
    """

    context: int
    unread: int
    widths: tuple[int, ...]
    draft: bool = False


@dataclass(frozen=True, eq=False)
class Choice:
    """What is verified.

    tree: for the target.  offered: the tree that it was chosen from.  width: nodes that count, 1 for plain decoding.
    worth: width -> milliseconds that verifying that many nodes is worth.
    regret: width -> milliseconds that keeping the last width has lost by now.
    """

    tree: DraftTree
    offered: DraftTree | None = None
    width: int = 0
    worth: Mapping[int, float] = field(default_factory=dict)
    regret: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Round:
    """What came of a plan and a choice.

    drafted: the drafter's own tree, None if the drafter was not asked.  growth: how that tree grew.
    tokens: those that followed the root.  draft_ms, verify_ms: milliseconds of both engines.
    """

    plan: Plan
    choice: Choice
    drafted: DraftTree | None
    growth: Growth | None
    tokens: Sequence[int]
    draft_ms: float
    verify_ms: float


class Policy(Protocol):
    """Decides for one engine how much to draft and to verify; what it learns outlives a conversation."""

    def start(self, sampled: bool) -> None:
        """An answer begins.  sampled: whether its tokens are drawn."""
        ...

    def widest(self, context: int, most: int) -> int:
        """Nodes of the largest tree that is of use after `context` tokens; `most` have room."""
        ...

    def plan(self, context: int, most: int, repeats: DraftTree, unread: int) -> Plan:
        """Whether to ask the drafter.  repeats: the tree that repeated text alone proposes.  unread: see Plan."""
        ...

    def believe(self, plan: Plan, depth: int, logprobs: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Judge.believe."""
        ...

    def worth_expanding(self, plan: Plan, depth: int, frontier: Sequence[float]) -> bool:
        """See Judge.pays."""
        ...

    def choose(self, plan: Plan, tree: DraftTree) -> Choice:
        """What to verify of `tree`, which may be filled up with nodes that nobody expects to be right."""
        ...

    def learn(self, round: Round) -> None:
        """A round has ended."""
        ...


class Growth:
    """The judge of one tree that grows: asks the policy and notes what it was asked.

    taken: depth of a parent -> share of its nodes' probability that their candidates take.
    rows: nodes that the drafter ran, level by level.
    """

    def __init__(self, policy: Policy, plan: Plan) -> None:
        self._policy, self._plan = policy, plan
        self.taken: dict[int, float] = {}
        self.rows: list[int] = []

    def believe(self, depth: int, logprobs: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Judge."""
        believed = self._policy.believe(self._plan, depth, logprobs)
        taken = float(np.exp(believed).sum()) / len(believed)
        if not isnan(taken):  # nan is no candidate
            self.taken[depth - 1] = min(taken, 1.0)
        return believed

    def pays(self, depth: int, frontier: Sequence[float]) -> bool:
        """See Judge."""
        if not self._policy.worth_expanding(self._plan, depth, frontier):
            return False
        self.rows.append(len(frontier))
        return True
