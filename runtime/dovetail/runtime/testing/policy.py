"""A policy without costs, for tests of the loop: text must not depend on what a policy decides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.policy.policy import Choice, Plan, Round
from dovetail.runtime.tree.draft_tree import DraftTree, best_tree


class ScriptedPolicy:
    """Decides by chance.  Implements `Policy`.

    draft, expand: probabilities of asking the drafter, and of expanding a level.  whole: verify whole trees, else any
    number of nodes.  rounds: what it was given to learn, oldest first.
    """

    def __init__(self, seed: int = 0, *, draft: float = 0.5, expand: float = 0.7, whole: bool = False) -> None:
        self.rng = np.random.default_rng(seed)
        self.draft, self.expand, self.whole = draft, expand, whole
        self.rounds: list[Round] = []

    def start(self, sampled: bool) -> None:
        """See Policy."""

    def widest(self, context: int, most: int) -> int:
        """See Policy."""
        return most

    def plan(self, context: int, most: int, repeats: DraftTree, unread: int) -> Plan:
        """See Policy."""
        return Plan(context, unread, (1, most), draft=bool(self.rng.random() < self.draft))

    def believe(self, plan: Plan, depth: int, logprobs: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Policy."""
        return logprobs

    def worth_expanding(self, plan: Plan, depth: int, frontier: Sequence[float]) -> bool:
        """See Policy."""
        return bool(self.rng.random() < self.expand)

    def choose(self, plan: Plan, tree: DraftTree) -> Choice:
        """See Policy."""
        if self.whole:
            return Choice(tree)
        parts = (tree.tokens.tolist(), tree.parents.tolist(), tree.logprobs.tolist())
        return Choice(best_tree(*parts, int(self.rng.integers(0, len(tree)))))

    def learn(self, round: Round) -> None:
        """See Policy."""
        self.rounds.append(round)
