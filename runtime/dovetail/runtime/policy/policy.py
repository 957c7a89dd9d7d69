"""The policy's protocol, and the records of a round: a plan, a choice, and the outcome of both.

A round is one pass of the target over the trees of one or more texts. The loop calls `plan` before
the drafts, `choose` before verification and `learn` at the end. Only `start` and `learn` change a
policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.forest import Forest


@dataclass(frozen=True)
class Plan:
    """Whether a round drafts, and the widths to choose from."""

    context: int  # tokens committed before the round, the mean over its texts
    unread: int  # context pairs of all texts that the drafter has not read
    widths: tuple[int, ...]  # numbers of nodes, ascending, that the pass may have; the first decodes plainly
    draft: bool = False  # whether to call the drafter
    texts: int = 1
    together: int = 0  # texts whose drafts share the drafter's calls


@dataclass(frozen=True, eq=False)
class Choice:
    """The trees that the target verifies."""

    forest: Forest
    offered: Forest | None = None  # the trees that they were chosen from
    width: int = 0  # rows that the pass computes at least, one for each text in plain decoding
    regret: Mapping[int, float] = field(default_factory=dict)  # width -> ms lost so far by keeping the last width


@dataclass(frozen=True, eq=False)
class Draft:
    """The drafter's own tree for a text, and how the tree grew."""

    tree: DraftTree
    growth: Growth


@dataclass(frozen=True, eq=False)
class Round:
    """The outcome of a plan and a choice. Drafts and tokens are in the order of the texts."""

    plan: Plan
    choice: Choice
    drafts: Sequence[Draft | None]  # None for a text that the drafter was not asked about
    tokens: Sequence[Sequence[int]]  # those that followed the root
    draft_ms: float
    verify_ms: float | None  # None if the pass did other work too, so that its time says little


class Policy(Protocol):
    """Decides for one engine how much to draft and verify, and learns across conversations."""

    def start(self, sampled: bool, texts: int = 1) -> None:
        """Turn to rounds of so many texts. sampled: whether any of their answers is sampled."""

    def least(self, context: int) -> float:
        """Return the least probability with which repeated text may pay for its pass.

        Above 1 the next round decodes plainly, without a look at repeated text and at a grammar.
        """

    def widest(self, context: int, most: int) -> int:
        """Return the nodes of the largest useful tree of a text, at most `most`."""

    def plan(self, context: int, most: int, repeats: Forest, unread: int) -> Plan:
        """Plan a round of at most `most` nodes. repeats: the trees of repeated text alone."""

    def believe(self, plan: Plan, depth: int, logprobs: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Judge.believe."""

    def worth_expanding(self, plan: Plan, depth: int, frontier: Sequence[float]) -> bool:
        """See Judge.pays."""

    def choose(self, plan: Plan, forest: Forest) -> Choice:
        """Return the part of `forest` to verify, and the rows of the pass."""

    def learn(self, round: Round) -> None:
        """Learn from a round that has ended."""


class Growth:
    """The judge of one growing tree: asks the policy and records the answers."""

    def __init__(self, policy: Policy, plan: Plan) -> None:
        self._policy, self._plan = policy, plan
        self.taken: dict[int, float] = {}  # depth of a parent -> share of its probability that its candidates have
        self.rows: list[int] = []  # nodes that the drafter ran, level by level

    def believe(self, depth: int, logprobs: NDArray[np.float32]) -> NDArray[np.float32]:
        believed = self._policy.believe(self._plan, depth, logprobs)
        taken = float(np.exp(believed).sum()) / len(believed)
        if not isnan(taken):  # nan is no candidate
            self.taken[depth - 1] = min(taken, 1.0)
        return believed

    def pays(self, depth: int, frontier: Sequence[float]) -> bool:
        if not self._policy.worth_expanding(self._plan, depth, frontier):
            return False
        self.rows.append(len(frontier))
        return True
