"""How much to draft and to verify, round by round: what is expected to come against what it costs here.

Every round is worth (expected tokens) x (price of a token) - (its time).  The price is what a token has lately
cost in milliseconds, at most a plain step: a round that beats it makes the answer faster, and only such rounds
are run.  With nothing worth drafting rounds become plain decoding, so decoding is slower than that only by the
drafts that had to be tried and the changes of width.  (A ratio of one round, tokens per millisecond, would
undervalue long trees: the next round begins with the same fixed costs.)

Probabilities are the drafter's, calibrated when it was trained, and corrected by what came true here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import exp, isnan, log

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.policy.calibration import Calibration
from dovetail.runtime.policy.costs import Costs
from dovetail.runtime.policy.estimates import MEMORY, Average, Experience, Round
from dovetail.runtime.tree.draft_tree import DraftTree, best_tree, without_branches
from dovetail.runtime.tree.limits import TreeLimits

BOUNDS = TreeLimits(width=32, depth=8, top_k=3, lookup=24)  # of a scheduled tree
FADING = 0.995  # of what is remembered of trees, at each that was not worth verifying
TRIAL_FADING = 0.5  # the same at a trial, of which there are few
LOG_CERTAIN = np.float32(np.log(0.995))  # no token is surer than this: what is believed to be free is never questioned
CHILDREN = 0.7  # of a node's probability that its drafted children take together, before any was seen
WIDTHS = (1, 4, 6, 8, 12, 16, 24, 32)  # of a scheduled tree; 1 is plain decoding
FEW_WIDTHS = (1, 6, 12)  # where a change from one to another is dear
WIDE = 24  # one more there, if its further nodes take less than
CHEAP = 0.25  # of a plain step
DEAR = 0.1  # of a plain step: a change that takes more is dear
FILLING = -50.0  # log-probability of a node that is there for the width alone
PATIENCE = 4.0  # drafted rounds before a draft may be found not to pay
MARGIN = 0.05  # of a plain step that drafting may seem to lose: what is seen of it is noisy
TRIAL_START = 1.0  # plain rounds' time that may be lost to drafts before any has paid
TRIAL_ROUNDS = 3.0  # the same at most, later
STALL = 10.0  # times its average that one call moves the drafter's pace by at most
OUTLIER = 2.0  # times what is expected that a call counts as at most
TRIAL_SHARE = 0.005  # of the time that may be lost later to see whether drafting pays again
TRIAL_REST = 4  # undrafted rounds between two trials
TRIAL_MEMORY = 4.0  # what averages and corrections remember when a trial comes after a long rest
ANSWER_LOSS = 3.0  # plain steps that an answer's drafted rounds may have lost, beyond which only trials draft
ANSWER_GAIN = 5.0  # of what they gained before, or were forgiven, this much may be lost again
FORGIVEN = 0.01  # of a plain step that each token makes up for, so that long answers are drafted again


@dataclass
class Scheduler:
    """Decides for one engine; what it learned stays when the conversation changes.

    calibration: of the drafter, None where it brought none.  plain_rows: rows that a plain pass computes in any case;
    nodes of a tree that fit into them ride along at no cost.
    """

    costs: Costs
    calibration: Calibration | None = None
    plain_rows: int = 1
    _context: int = 0  # tokens before the root, of the round at hand
    _widths: tuple[int, ...] = WIDTHS  # that the round at hand has room for, of those that pay here
    _greedy: Experience = field(default_factory=Experience)
    _sampled: Experience = field(default_factory=Experience)
    _known: Experience = field(init=False)  # of the two, that of the answer at hand
    _target_pace: Average = field(default_factory=lambda: Average(1.0))  # real over predicted ms
    _width_pace: dict[int, Average] = field(default_factory=dict)  # and of one width over that of all
    _draft_pace: Average = field(default_factory=lambda: Average(1.0))
    _width: int = 0  # of the last verified tree, 0 for a pass of another kind
    _regret: dict[int, float] = field(default_factory=dict)  # width -> ms that staying at the last one has lost
    _lost: float = 0.0  # plain steps that the answer at hand has lost to its drafts
    _leap: float | None = None  # plain steps gained since repeats led from plain decoding to trees, None when back
    _trial: float | None = None  # what the round at hand would have been worth without its draft, if that is more
    _calls: float = 0.0  # ms that the levels of the round at hand take by the curve
    _unverified: bool = False  # the round at hand had a tree of which nothing was worth verifying
    _missed: Round | None = None  # what the round at hand would have been, had its draft been verified

    def __post_init__(self) -> None:
        self._known = self._greedy

    def restart(self, sampled: bool) -> None:
        """An answer begins, and the last has ended: the target's last pass was none of a tree.

        sampled: its tokens are drawn.
        """
        self._land()
        self._width, self._regret, self._lost = 0, {}, 0.0
        self._known = self._sampled if sampled else self._greedy

    def begin(self, context: int, most: int) -> int:
        """A round begins: `context` tokens are committed, `most` nodes have room.  Returns the widest tree of use."""
        self._context = context
        self._widths = tuple(width for width in widths(self.costs, context) if width <= most)
        self._calls, self._trial, self._unverified, self._missed = 0.0, None, False, None
        return self._widths[-1]

    # --- what is believed

    def believe(self, depth: int, logprobs: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Judge; remembers too how much of their parents' probability the candidates take."""
        if self.calibration is not None:
            logprobs = self.calibration.apply(depth, logprobs)
        first, others = (log(correction.factor) for correction in self._known.correction(depth))
        shift = np.full(logprobs.shape[-1], others, np.float32)
        shift[0] = first
        believed: NDArray[np.float32] = np.minimum(logprobs + shift, LOG_CERTAIN)
        np.minimum(believed, believed[:, :1], out=believed)  # the first stays the first
        taken = float(np.exp(believed).sum()) / len(believed)
        if not isnan(taken):  # nan is no candidate
            self._known.children.setdefault(depth - 1, Average(CHILDREN, 1.0)).add(min(taken, 1.0))
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
            first, others = self._known.correction(depth)
            expected = float(claims.max()), float(claims.sum() - claims.max())
            right = child == best, child is not None and child != best
            for correction, claim, hit in zip((first, others), expected, right, strict=True):
                correction.add(min(claim / correction.factor, 1.0), hit)
            if child is None:
                return
            node = child

    # --- what is worth its time

    @property
    def price(self) -> float:
        """Milliseconds that a token is worth."""
        return self._known.price * self._pass(1)

    def drafts(self, repeats: DraftTree, unread: int) -> bool:
        """Whether to ask the drafter, at the start of a round.

        repeats: what repeated text alone proposes.  unread: pairs that the drafter has not been told yet.
        """
        if len(self._widths) == 1:  # no room for a tree
            return False
        known, plain, otherwise = self._known, self._pass(1), self._otherwise(repeats)
        worth = known.drafted.worth(known.price) * plain - self._backlog(unread)
        known.judge_long_run()
        pays = worth >= otherwise - MARGIN * plain and self._lost <= ANSWER_LOSS and not known.left
        if known.drafted.count < PATIENCE or pays:
            return True
        if known.credit is None:
            known.credit = TRIAL_START
        if known.credit * plain < self._draft(1) or known.rested < TRIAL_REST:
            return False
        self._trial = otherwise
        if known.rested >= MEMORY:  # what was wrong then may be right now
            known.drafted.forget(TRIAL_MEMORY)
            for correction in chain(*known.corrections.values()):
                correction.forget(TRIAL_MEMORY)
        return True

    def pays(self, depth: int, frontier: Sequence[float]) -> bool:
        """Whether the children of `frontier` (log-probabilities of nodes at `depth`) are worth a call for them."""
        children = self._known.children
        taken = children[depth].value if depth in children else CHILDREN
        gain = self.price * sum(map(exp, frontier)) * taken * self._known.trees[True].factor
        node = (self._pass(self._widths[-1]) - self._pass(1)) / (self._widths[-1] - 1)
        if gain <= self._draft(len(frontier)) + node:
            return False
        self._calls += self.costs.draft.at(self._context, len(frontier))
        return True

    def prune(self, tree: DraftTree, drafted: bool) -> DraftTree:
        """The part of `tree` whose verification is worth most, in one of a few widths; filled up where it is smaller.

        Where a draft would not pay and there are no repeats, neither do nodes that are there for the width alone.
        """
        tree = without_branches(tree, self._path() / (self.price * self._known.trees[drafted].factor))
        worth = self._worth(tree, drafted) if drafted or len(tree) > 1 else {1: 0.0}
        width = self._best_width(worth, drafted)
        self._unverified = width == 1 < len(tree)
        if drafted and self._unverified:
            best = max((other for other in worth if other > 1), key=worth.__getitem__)
            verify = self._verify(tree, best)
            took = verify + self._draft(1) + self._calls * self._draft_pace.value
            self._missed = Round((worth[best] + verify) / self.price, took / self._pass(1))
        if width != self._width:
            self._regret = {}
        kept = min(max(width, self.plain_rows), len(tree))
        if kept < len(tree):
            tree = best_tree(tree.tokens.tolist(), tree.parents.tolist(), tree.logprobs.tolist(), kept - 1)
        return filled(tree, width)

    def _best_width(self, worth: dict[int, float], drafted: bool) -> int:
        """The last one, or another: when this tree alone makes the change pay, or when what staying lost would have."""
        change = {width: self._change(width, drafted) for width in worth}
        width = max(worth, key=lambda width: worth[width] - change[width])
        if width == self._width:
            for other in worth:
                self._regret[other] = max(0.0, self._regret.get(other, 0.0) + worth[other] - worth[width])
            width = max((other for other in worth if self._regret[other] >= change[other]), key=worth.__getitem__)
        return width

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
        nodes = len(verified) if len(verified) > self.plain_rows else 1
        before, self._width = self._width, nodes
        changed = before != nodes
        switch_ms = changed * self.costs.switch_ms
        # The first pass of a width, and whatever else took the machine, must not decide what drafting is worth.
        paths_ms = (verified.path_counts[-1] - 1) * self.costs.path.at(self._context, 1)
        pace = self._target_pace.value
        verify_ms = min(verify_ms, OUTLIER * (self._pass(nodes) + (paths_ms + switch_ms) * pace))
        calls = self._calls + self.costs.draft.at(self._context, unread) if drafted else 0.0
        if calls:  # else the drafter had read all, and its root's children were enough
            # A machine that slept must not make drafting too dear ever to be tried again.
            self._draft_pace.add(min(draft_ms / calls, STALL * self._draft_pace.value))
            draft_ms = min(draft_ms, OUTLIER * calls * self._draft_pace.value)

        known, plain = self._known, self._pass(1)
        took = (draft_ms + verify_ms) / plain
        known.rounds.add(Round(len(tokens), took))
        change = switch_ms * self._target_pace.value / plain
        self._follow(before, change, -change if drafted else max(len(tokens) - took, -OUTLIER), drafted is not None)
        self._lost -= FORGIVEN * len(tokens)
        if drafted:
            self._lost = max(self._lost + min(took - len(tokens), OUTLIER), -ANSWER_GAIN)
        trees = known.trees[drafted is not None]
        if nodes > 1:
            trees.add(verified.expected_length - 1.0, len(tokens) - 1.0)
        elif self._unverified:  # or what was wrong once would never be tried again
            trees.forget((FADING if self._trial is None else TRIAL_FADING) * trees.visits)
        alone = self._width_pace.setdefault(nodes, Average(1.0, 4.0))
        ratio = verify_ms / (self.costs.target.at(self._context, nodes) + paths_ms + switch_ms)
        if not changed and self._target_pace.count:
            alone.add(ratio / self._target_pace.value)
        self._target_pace.add(ratio / alone.value)
        if known.credit is not None:
            loss = 0.0 if self._trial is None else self._trial / plain - (known.price * len(tokens) - took)
            known.credit = min(known.credit + TRIAL_SHARE * took - max(loss, 0.0), TRIAL_ROUNDS)
        if drafted is None:
            known.rested += 1
            return
        self._learn(drafted, tokens)
        known.rested, took = 0, took - self._backlog(unread) / plain
        # A trial is to tell what drafts are worth, also where the change alone kept its tree from being verified.
        known.drafted.add((self._trial is not None and self._missed) or Round(len(tokens), took))
        known.long_run.add(self._missed or Round(len(tokens), took - switch_ms * self._target_pace.value / plain))

    def _follow(self, before: int, change: float, gain: float, drafted: bool) -> None:
        """Count what a leap for repeats gains, from plain decoding to trees and back, all in plain steps.

        before: width of the last pass, 0 at the start of an answer, where plain decoding has to change as well.
        change: what this round's took.  gain: of the round; of a drafted one no more than that is the leap's doing.
        """
        if self._leap is None and self._leaps(before, self._width, drafted):
            self._leap = 0.0 if before else change
        if self._leap is not None and (not drafted or self._width == 1):
            self._leap += gain
        if self._width == 1:
            self._land()
            self._known.ease()

    def _land(self) -> None:
        """A leap is over, where there was one."""
        if self._leap is not None:
            self._known.judge_leap(self._leap)
        self._leap = None

    @staticmethod
    def _leaps(before: int, width: int, drafted: bool) -> bool:
        """Whether repeats alone lead from plain decoding, or the start of an answer, to a tree."""
        return not drafted and before <= 1 < width

    def _worth(self, tree: DraftTree, drafted: bool) -> dict[int, float]:
        """Of verifying the best part of `tree` in each width, in ms, without the change to it."""
        expected = tree.expected_lengths
        price, factor = self.price, self._known.trees[drafted].factor
        out = {}
        for width in self._widths:
            tokens = 1.0 + (expected[min(width, len(tree)) - 1] - 1.0) * factor
            out[width] = price * tokens - self._verify(tree, width)
            if width >= len(tree):
                break
        if self._width in self._widths and self._width not in out:  # wider than the tree
            out[self._width] = price * tokens - self._verify(tree, self._width)
        return out

    def _verify(self, tree: DraftTree, width: int) -> float:
        """Predicted ms of verifying the best part of `tree` in a pass of `width` nodes."""
        return self._pass(width) + (tree.path_counts[min(width, len(tree)) - 1] - 1) * self._path()

    def _path(self) -> float:
        """Predicted ms that a path of a tree beside the first takes now."""
        return self.costs.path.at(self._context, 1) * self._target_pace.value

    def _otherwise(self, repeats: DraftTree) -> float:
        """Worth of a round without a draft, in the last width or in another, the change to that included.

        Such rounds come in rows, over which a change is spread: where there are no repeats `prune` makes it at once.
        """
        return max(worth - self._change(width, False) for width, worth in self._worth(repeats, False).items())

    def _change(self, width: int, drafted: bool) -> float:
        """Ms that this width costs more because the last pass had another.

        Text in which plain decoding pays, or does not, seldom goes on for long: from it, and to it (at the start of an
        answer too), the way back counts.  For repeats alone plain decoding is left with caution.
        """
        if self._width == width:
            return 0.0
        ms = (1 + (1 in (self._width, width))) * self.costs.switch_ms * self._target_pace.value
        return ms + self._leaps(self._width, width, drafted) * self._known.caution * self._pass(1)

    def _pass(self, width: int) -> float:
        """Predicted ms of a pass of the target now, after one of the same width."""
        alone = self._width_pace[width].value if width in self._width_pace else 1.0
        return self.costs.target.at(self._context, width) * self._target_pace.value * alone

    def _backlog(self, unread: int) -> float:
        """Ms that reading `unread` pairs takes more than reading one."""
        return max(0.0, self._draft(unread) - self._draft(1))

    def _draft(self, rows: int) -> float:
        """Predicted ms of one call of the drafter now."""
        return self.costs.draft.at(self._context, rows) * self._draft_pace.value


def widths(costs: Costs, context: int) -> tuple[int, ...]:
    """The widths of scheduled trees where passes cost that much, after `context` tokens."""
    plain = costs.target.at(context, 1)
    if costs.switch_ms <= DEAR * plain:
        return WIDTHS
    more = costs.target.at(context, WIDE) - costs.target.at(context, FEW_WIDTHS[-1])
    return (*FEW_WIDTHS, WIDE) if more < CHEAP * plain else FEW_WIDTHS


def filled(tree: DraftTree, width: int) -> DraftTree:
    """`tree` with a chain below its last node until it has `width`; any token will do there, so it is the root's."""
    count = width - len(tree)
    if count <= 0:
        return tree
    return DraftTree(
        np.concatenate([tree.tokens, np.full(count, tree.tokens[0])]),
        np.concatenate([tree.parents, np.arange(len(tree) - 1, width - 1)]),
        np.concatenate([tree.logprobs, np.full(count, FILLING, np.float32)]),
    )
