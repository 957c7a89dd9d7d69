"""How much to draft and to verify, round by round: what is expected to come against what it costs here.

Every round is worth (expected tokens) x (price of a token) - (its time).  The price is what a token has lately
cost in milliseconds, at most a plain step: a round that beats it makes the answer faster, and only such rounds
are run.  With nothing drafted a round is plain decoding, so decoding is slower than that only by the drafts that
had to be tried.  (A ratio of one round, tokens per millisecond, would undervalue long trees: the next round
begins with the same fixed costs.)

Probabilities are the drafter's, calibrated when it was trained, and corrected by what came true here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import exp, isnan, log

import numpy as np
from numpy.typing import NDArray

from .calibration import Calibration
from .costs import Costs
from .tree import DraftTree, TreeLimits, best_tree

BOUNDS = TreeLimits(width=32, depth=8, top_k=4, lookup=24)  # of a scheduled tree
MEMORY = 24.0  # rounds after which an average has mostly forgotten
EVIDENCE = 60.0  # visits that the correction of a depth remembers
PRIOR = 3.0  # visits that the drafter's own word counts for
LOG_CERTAIN = np.float32(np.log(0.995))  # no token is surer than this: what is believed to be free is never questioned
CHILDREN = 0.7  # of a node's probability that its drafted children take together, before any was seen
STRENGTHS = (1.5, 3.0)  # tokens that repeats promise: drafting is judged apart below, between and above these
TRIAL_ROUNDS = 3.0  # plain rounds' time that may be lost to drafts before any has paid
TRIAL_SHARE = 0.01  # of the time that may be lost later to see whether drafting pays again
TRIAL_MEMORY = 4.0  # what averages and corrections remember when a trial comes after a long rest


@dataclass
class Average:
    """A running mean that starts with the first value and then remembers about MEMORY of them."""

    value: float = 0.0
    count: float = 0.0

    def add(self, value: float) -> None:
        self.count = min(self.count + 1.0, MEMORY)
        self.value += (value - self.value) / self.count


@dataclass
class Correction:
    """What was expected and what came, of one kind, and what a further expectation of that kind is worth."""

    expected: float = 0.0
    right: float = 0.0
    visits: float = 0.0

    def add(self, expected: float, right: float) -> None:
        self.forget(EVIDENCE - 1.0)
        self.expected, self.right, self.visits = self.expected + expected, self.right + right, self.visits + 1.0

    def forget(self, visits: float) -> None:
        """Remember no more than so many."""
        if self.visits > visits:
            share = visits / self.visits
            self.expected, self.right, self.visits = share * self.expected, share * self.right, visits

    @property
    def factor(self) -> float:
        """What a probability of this kind, as it was before, is multiplied with."""
        return (self.right + PRIOR) / (self.expected + PRIOR)


@dataclass
class Drafting:
    """What drafted rounds gave and took: tokens, ms of the drafter, ms of the target."""

    tokens: Average = field(default_factory=Average)
    draft_ms: Average = field(default_factory=Average)
    verify_ms: Average = field(default_factory=Average)

    def add(self, tokens: float, draft_ms: float, verify_ms: float) -> None:
        for average, value in ((self.tokens, tokens), (self.draft_ms, draft_ms), (self.verify_ms, verify_ms)):
            average.add(value)

    def forget(self, rounds: float) -> None:
        for average in (self.tokens, self.draft_ms, self.verify_ms):
            average.count = min(average.count, rounds)

    def worth(self, price: float) -> float:
        """Of such a round, in ms."""
        return price * self.tokens.value - self.draft_ms.value - self.verify_ms.value


@dataclass
class Scheduler:
    """Decides for one engine; what it learned stays when the conversation changes.

    calibration: of the drafter, None where it brought none.
    """

    costs: Costs
    calibration: Calibration | None = None
    context: int = 0  # tokens before the root, of the round at hand
    # By depth: of a node's best child, and of the others.  A drafter may be too sure of the one and right in sum.
    _corrections: dict[int, tuple[Correction, Correction]] = field(default_factory=dict)
    # Of whole trees: the best candidates of many are not as good as each was believed to be.
    _trees: Correction = field(default_factory=Correction)
    _children: dict[int, Average] = field(default_factory=dict)  # depth -> share of its nodes that their children take
    _tokens: Average = field(default_factory=Average)  # per round
    _time: Average = field(default_factory=Average)  # ms per round
    _drafting: tuple[Drafting, ...] = field(default_factory=lambda: tuple(Drafting() for _ in (0, *STRENGTHS)))
    _target_pace: Average = field(default_factory=lambda: Average(1.0))  # real over predicted ms
    _draft_pace: Average = field(default_factory=lambda: Average(1.0))
    _credit: float | None = None  # ms that may be lost to drafts
    _trial: float | None = None  # what the round at hand would have been worth without its draft, if that is more
    _rested: int = 0  # rounds since the last draft
    _strength: int = 0  # of the repeats in the round at hand: which of `_drafting` it belongs to
    _calls: float = 0.0  # ms that the levels of the round at hand take by the curve

    # --- what is believed

    def believe(self, depth: int, logprobs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Conditional log-probabilities [n, K] of candidates at `depth`, as far as they deserve belief."""
        if self.calibration is not None:
            logprobs = self.calibration.apply(depth, logprobs)
        first, others = (log(correction.factor) for correction in self._correction(depth))
        shift = np.full(logprobs.shape[-1], others, np.float32)
        shift[0] = first
        believed: NDArray[np.float32] = np.minimum(logprobs + shift, LOG_CERTAIN)
        taken = float(np.exp(believed).sum()) / len(believed)
        if not isnan(taken):  # nan is no candidate
            self._children.setdefault(depth - 1, Average(CHILDREN, 1.0)).add(min(taken, 1.0))
        return believed

    def _learn(self, tree: DraftTree, tokens: Sequence[int]) -> None:
        """Compare the drafter's own tree with the tokens that came after its root."""
        node = 0
        probabilities = np.exp(tree.logprobs.astype(np.float64))
        for depth, token in enumerate(tokens, 1):
            children = np.flatnonzero(tree.parents == node)
            if not len(children):
                return
            claims = probabilities[children] / probabilities[node]
            best = children[int(np.argmax(claims))]
            child = tree.child(node, token)
            first, others = self._correction(depth)
            expected = float(claims.max()), float(claims.sum() - claims.max())
            right = child == best, child is not None and child != best
            for correction, claim, hit in zip((first, others), expected, right, strict=True):
                correction.add(min(claim / correction.factor, 1.0), hit)
            if child is None:
                return
            node = child

    def _correction(self, depth: int) -> tuple[Correction, Correction]:
        return self._corrections.setdefault(depth, (Correction(), Correction()))

    # --- what is worth its time

    @property
    def price(self) -> float:
        """Milliseconds that a token is worth."""
        plain = float(self._target(1)[1])
        return min(plain, self._time.value / self._tokens.value) if self._tokens.count else plain

    def drafts(self, repeats: DraftTree, unread: int) -> bool:
        """Whether to ask the drafter, at the start of a round.

        repeats: what repeated text alone proposes.  unread: pairs that the drafter has not been told yet.
        """
        self._calls = 0.0
        self._strength = sum(repeats.expected_length > strength for strength in STRENGTHS)
        drafting, reading, otherwise = self._drafting[self._strength], self._draft(unread), self._best(repeats)[1]
        worth = drafting.worth(self.price) - (reading - self._draft(1))
        self._trial = None
        if not drafting.tokens.count or worth >= otherwise:
            return True
        if self._credit is None:
            self._credit = TRIAL_ROUNDS * float(self._target(1)[1])
        if self._credit < reading:
            return False
        self._trial = otherwise
        if self._rested >= MEMORY:  # what was wrong then may be right now
            drafting.forget(TRIAL_MEMORY)
            for correction in chain(*self._corrections.values()):
                correction.forget(TRIAL_MEMORY)
        return True

    def pays(self, depth: int, frontier: Sequence[float]) -> bool:
        """Whether the children of `frontier` (log-probabilities of nodes at `depth`) are worth a call for them."""
        taken = self._children[depth].value if depth in self._children else CHILDREN
        gain = self.price * sum(map(exp, frontier)) * taken * self._trees.factor
        two = self._target(2)
        if gain <= self._draft(len(frontier)) + two[2] - two[1]:
            return False
        self._calls += self._draft_alone(len(frontier))
        return True

    def prune(self, tree: DraftTree) -> DraftTree:
        """The part of `tree` whose verification is worth most."""
        count = self._best(tree)[0]
        if count == len(tree):
            return tree
        return best_tree(tree.tokens.tolist(), tree.parents.tolist(), tree.logprobs.tolist(), count - 1)

    def observe(
        self,
        drafted: DraftTree | None,
        unread: int,
        verified: DraftTree,
        tokens: Sequence[int],
        *,
        draft_ms: float,
        verify_ms: float,
    ) -> None:
        """Learn from a round: what it gave and what it took.

        drafted: the drafter's own tree, None where it was not asked.  unread: pairs that it was told first.
        tokens: what came after the root.
        """
        nodes, took = len(verified), draft_ms + verify_ms
        self._tokens.add(len(tokens))
        self._time.add(took)
        self._trees.add(verified.expected_length - 1.0, len(tokens) - 1.0)
        self._target_pace.add(verify_ms / self.costs.target.at(self.context, nodes)[nodes])
        if self._credit is not None:
            loss = 0.0 if self._trial is None else self._trial - (self.price * len(tokens) - took)
            self._credit += TRIAL_SHARE * took - max(loss, 0.0)
        if drafted is None:
            self._rested += 1
            return
        self._rested = 0
        self._learn(drafted, tokens)
        self._draft_pace.add(draft_ms / (self._calls + self._draft_alone(unread)))
        self._drafting[self._strength].add(len(tokens), draft_ms, verify_ms)

    def _best(self, tree: DraftTree) -> tuple[int, float]:
        """(nodes, worth) of the best part of a tree; one node is plain decoding."""
        expected = np.cumsum(np.sort(np.exp(tree.logprobs.astype(np.float64)))[::-1])  # the root's 1 first
        expected = 1.0 + (expected - 1.0) * self._trees.factor
        worth = self.price * expected - self._target(len(tree))[1:]
        count = int(np.argmax(worth)) + 1
        return count, float(worth[count - 1])

    def _target(self, nodes: int) -> NDArray[np.float64]:
        """Predicted ms [nodes + 1] of verifying 0 to `nodes` nodes now."""
        return self.costs.target.at(self.context, nodes) * self._target_pace.value

    def _draft(self, rows: int) -> float:
        """Predicted ms of one call of the drafter now."""
        return self._draft_alone(rows) * self._draft_pace.value

    def _draft_alone(self, rows: int) -> float:
        """The same by the curve."""
        return float(self.costs.draft.at(self.context, rows)[rows])
