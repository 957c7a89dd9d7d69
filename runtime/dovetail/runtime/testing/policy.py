"""A policy without costs, for tests of the loop: text must not depend on what a policy decides."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.policy.policy import Choice, Plan, Round
from dovetail.runtime.tree.forest import Forest


class ScriptedPolicy:
    """Decides by chance. Implements `Policy`.

    draft, expand, plain: probabilities of a draft, of another level and of no look for repeats. whole:
    verify whole trees, else a random number of nodes. rounds: the rounds to learn from, oldest first.
    """

    def __init__(
        self, seed: int = 0, *, draft: float = 0.5, expand: float = 0.7, plain: float = 0.0, whole: bool = False
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.draft, self.expand, self.plain, self.whole = draft, expand, plain, whole
        self.rounds: list[Round] = []

    def start(self, sampled: bool, texts: int = 1) -> None:
        """See Policy."""

    def least(self, context: int) -> float:
        return inf if self.plain > 0 and self.rng.random() < self.plain else 0.0

    def widest(self, context: int, most: int) -> int:
        return most

    def plan(self, context: int, most: int, repeats: Forest, unread: int) -> Plan:
        texts = len(repeats.trees)
        return Plan(context, unread, (texts, most), draft=bool(self.rng.random() < self.draft), texts=texts)

    def believe(self, plan: Plan, depth: int, logprobs: NDArray[np.float32]) -> NDArray[np.float32]:
        return logprobs

    def worth_expanding(self, plan: Plan, depth: int, frontier: Sequence[float]) -> bool:
        return bool(self.rng.random() < self.expand)

    def choose(self, plan: Plan, forest: Forest) -> Choice:
        return Choice(forest if self.whole else forest.best(1 + int(self.rng.integers(0, len(forest)))))

    def learn(self, round: Round) -> None:
        self.rounds.append(round)
