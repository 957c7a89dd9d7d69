"""How much to draft and to verify, round by round: what is expected to come against what it costs here.

Every round is worth (expected tokens) x (price of a token) - (its time).  The price is what a token has lately
cost in milliseconds, at most a plain step: a round that beats it makes the answer faster, and only such rounds
are run.  With nothing worth drafting rounds become plain decoding, so decoding is slower than that only by the
drafts that had to be tried and the changes of width.  (A ratio of one round, tokens per millisecond, would
undervalue long trees: the next round begins with the same fixed costs.)

Probabilities are the drafter's, calibrated when it was trained, and corrected by what came true here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from math import exp, log

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.policy.calibration import Calibration
from dovetail.runtime.policy.costs import Costs
from dovetail.runtime.policy.estimates import MEMORY, Average, Correction, Experience, Outcome
from dovetail.runtime.policy.pace import OUTLIER, Pace
from dovetail.runtime.policy.policy import Choice, Plan, Round
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
TRIAL_SHARE = 0.005  # of the time that may be lost later to see whether drafting pays again
TRIAL_REST = 4  # undrafted rounds between two trials
TRIAL_MEMORY = 4.0  # what averages and corrections remember when a trial comes after a long rest
ANSWER_LOSS = 3.0  # plain steps that an answer's drafted rounds may have lost, beyond which only trials draft
ANSWER_GAIN = 5.0  # of what they gained before, or were forgiven, this much may be lost again
FORGIVEN = 0.01  # of a plain step that each token makes up for, so that long answers are drafted again


@dataclass
class Scheduler:
    """Decides for one engine; what it learned stays when the conversation changes.  Implements `Policy`.

    calibration: of the drafter, None where it brought none.  plain_rows: rows that a plain pass computes in any case;
    nodes of a tree that fit into them ride along at no cost.
    """

    costs: Costs
    calibration: Calibration | None = None
    plain_rows: int = 1
    pace: Pace = field(init=False)
    _greedy: Experience = field(default_factory=Experience)
    _sampled: Experience = field(default_factory=Experience)
    _known: Experience = field(init=False)  # of the two, that of the answer at hand
    _width: int = 0  # of the last verified tree, 0 for a pass of another kind
    _regret: Mapping[int, float] = field(default_factory=dict)  # width -> ms that staying at the last one has lost
    _lost: float = 0.0  # plain steps that the answer at hand has lost to its drafts
    _leap: float | None = None  # plain steps gained since repeats led from plain decoding to trees, None when back

    def __post_init__(self) -> None:
        self.pace = Pace(self.costs)
        self._known = self._greedy

    def start(self, sampled: bool) -> None:
        """An answer begins, and the last has ended: the target's last pass was none of a tree.

        sampled: its tokens are drawn.
        """
        self._land()
        self._width, self._regret, self._lost = 0, {}, 0.0
        self._known = self._sampled if sampled else self._greedy

    # --- before the drafter is asked

    def widest(self, context: int, most: int) -> int:
        """See Policy."""
        return self._widths(context, most)[-1]

    def plan(self, context: int, most: int, repeats: DraftTree, unread: int) -> Plan:
        """See Policy."""
        plan = Plan(context, unread, self._widths(context, most))
        if len(plan.widths) == 1:  # no room for a tree
            return plan
        known, plain, otherwise = self._known, self.pace.target_ms(context, 1), self._otherwise(plan, repeats)
        worth = known.drafted.worth(known.price) * plain - self.pace.backlog_ms(context, unread)
        pays = worth >= otherwise - MARGIN * plain and self._lost <= ANSWER_LOSS and not known.left
        plan = replace(plan, doubted=known.drafted.count >= PATIENCE and not pays, otherwise=otherwise)
        if not plan.doubted:
            return replace(plan, draft=True)
        credit = TRIAL_START if known.credit is None else known.credit
        if credit * plain < self.pace.draft_ms(context, 1) or known.rested < TRIAL_REST:
            return plan
        return replace(plan, draft=True, fresh=known.rested >= MEMORY)  # what was wrong then may be right now

    def _widths(self, context: int, most: int) -> tuple[int, ...]:
        return tuple(width for width in widths(self.costs, context) if width <= most)

    # --- while the drafter's tree grows

    def believe(self, plan: Plan, depth: int, logprobs: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Judge."""
        if self.calibration is not None:
            logprobs = self.calibration.apply(depth, logprobs)
        first, others = (log(correction.factor) for correction in self._correction(plan, depth))
        shift = np.full(logprobs.shape[-1], others, np.float32)
        shift[0] = first
        believed: NDArray[np.float32] = np.minimum(logprobs + shift, LOG_CERTAIN)
        np.minimum(believed, believed[:, :1], out=believed)  # the first stays the first
        return believed

    def _correction(self, plan: Plan, depth: int) -> Sequence[Correction]:
        found = self._known.corrections.get(depth, (Correction(), Correction()))
        return [one.recalled(TRIAL_MEMORY) for one in found] if plan.fresh else found

    def worth_expanding(self, plan: Plan, depth: int, frontier: Sequence[float]) -> bool:
        """Whether the children of `frontier` (log-probabilities of nodes at `depth`) are worth a call for them."""
        context, pace, children = plan.context, self.pace, self._known.children
        taken = children[depth].value if depth in children else CHILDREN
        gain = self._price(plan) * sum(map(exp, frontier)) * taken * self._known.trees[True].factor
        node = (pace.target_ms(context, plan.widths[-1]) - pace.target_ms(context, 1)) / (plan.widths[-1] - 1)
        return gain > pace.draft_ms(context, len(frontier)) + node

    # --- before the target verifies

    def choose(self, plan: Plan, tree: DraftTree) -> Choice:
        """The part of `tree` whose verification is worth most, in one of a few widths; filled up where it is smaller.

        Where a draft would not pay and there are no repeats, neither do nodes that are there for the width alone.
        """
        least = self.pace.path_ms(plan.context) / (self._price(plan) * self._known.trees[plan.draft].factor)
        offered = tree = without_branches(tree, least)
        worth = self._worth(plan, tree) if plan.draft or len(tree) > 1 else {1: 0.0}
        width, regret = self._best_width(plan, worth)
        kept = min(max(width, self.plain_rows), len(tree))
        if kept < len(tree):
            tree = best_tree(tree.tokens.tolist(), tree.parents.tolist(), tree.logprobs.tolist(), kept - 1)
        return Choice(filled(tree, width), offered, width, worth, regret)

    def _best_width(self, plan: Plan, worth: Mapping[int, float]) -> tuple[int, Mapping[int, float]]:
        """The last one, or another: when this tree alone makes the change pay, or when what staying lost would have.

        With it the regret of every width, where that stays.
        """
        change = {width: self._change(plan, width) for width in worth}
        width = max(worth, key=lambda width: worth[width] - change[width])
        if width != self._width:
            return width, {}
        regret = {other: max(0.0, self._regret.get(other, 0.0) + worth[other] - worth[width]) for other in worth}
        best = max((other for other in worth if regret[other] >= change[other]), key=worth.__getitem__)
        return best, {**self._regret, **regret} if best == self._width else {}

    def _price(self, plan: Plan) -> float:
        """Milliseconds that a token is worth."""
        return self._known.price * self.pace.target_ms(plan.context, 1)

    def _worth(self, plan: Plan, tree: DraftTree) -> dict[int, float]:
        """Of verifying the best part of `tree` in each width, in ms, without the change to it."""
        expected = tree.expected_lengths
        price, factor = self._price(plan), self._known.trees[plan.draft].factor
        out = {}
        for width in plan.widths:
            tokens = 1.0 + (expected[min(width, len(tree)) - 1] - 1.0) * factor
            out[width] = price * tokens - self.pace.verify_ms(plan.context, tree, width)
            if width >= len(tree):
                break
        if self._width in plan.widths and self._width not in out:  # wider than the tree
            out[self._width] = price * tokens - self.pace.verify_ms(plan.context, tree, self._width)
        return out

    def _otherwise(self, plan: Plan, repeats: DraftTree) -> float:
        """Worth of a round without a draft, in the last width or in another, the change to that included.

        Such rounds come in rows, over which a change is spread: where there are no repeats `choose` makes it at once.
        """
        return max(worth - self._change(plan, width) for width, worth in self._worth(plan, repeats).items())

    def _change(self, plan: Plan, width: int) -> float:
        """Ms that this width costs more because the last pass had another.

        Text in which plain decoding pays, or does not, seldom goes on for long: from it, and to it (at the start of an
        answer too), the way back counts.  For repeats alone plain decoding is left with caution.
        """
        if self._width == width:
            return 0.0
        ms = (1 + (1 in (self._width, width))) * self.pace.switch_ms
        leaps = self._leaps(self._width, width, plan.draft)
        return ms + leaps * self._known.caution * self.pace.target_ms(plan.context, 1)

    @staticmethod
    def _leaps(before: int, width: int, drafted: bool) -> bool:
        """Whether repeats alone lead from plain decoding, or the start of an answer, to a tree."""
        return not drafted and before <= 1 < width

    # --- when it has ended

    def learn(self, round: Round) -> None:
        """See Policy."""
        known, pace, plan, choice = self._known, self.pace, round.plan, round.choice
        context, drafted, tokens = plan.context, round.drafted, len(round.tokens)
        offered = choice.offered or choice.tree
        unverified = choice.width == 1 < len(offered)
        predicted = sum(self.costs.draft.at(context, rows) for rows in round.growth.rows) if round.growth else 0.0
        missed = self._missed(round, offered, predicted) if drafted and unverified else None
        if plan.doubted and known.credit is None:
            known.credit = TRIAL_START
        if plan.fresh:
            known.drafted.forget(TRIAL_MEMORY)
            for correction in chain(*known.corrections.values()):
                correction.forget(TRIAL_MEMORY)
        for depth, taken in round.growth.taken.items() if round.growth else ():
            known.children.setdefault(depth, Average(CHILDREN, 1.0)).add(taken)
        self._regret = choice.regret

        nodes = len(choice.tree) if len(choice.tree) > self.plain_rows else 1
        before, self._width = self._width, nodes
        changed = before != nodes
        switch_ms = changed * self.costs.switch_ms
        paths_ms = (choice.tree.path_counts[-1] - 1) * self.costs.path.at(context, 1)
        verify_ms = pace.credible(context, nodes, paths_ms, switch_ms, round.verify_ms)
        if drafted:
            draft_ms = pace.learn_draft(predicted + self.costs.draft.at(context, plan.unread), round.draft_ms)
        else:
            draft_ms = round.draft_ms

        plain = pace.target_ms(context, 1)
        took = (draft_ms + verify_ms) / plain
        known.rounds.add(Outcome(tokens, took))
        change = changed * pace.switch_ms / plain
        self._follow(before, change, -change if drafted else max(tokens - took, -OUTLIER), drafted is not None)
        self._lost -= FORGIVEN * tokens
        if drafted:
            self._lost = max(self._lost + min(took - tokens, OUTLIER), -ANSWER_GAIN)
        trees = known.trees[drafted is not None]
        if nodes > 1:
            trees.add(choice.tree.expected_length - 1.0, tokens - 1.0)
        elif unverified:  # or what was wrong once would never be tried again
            trees.forget((TRIAL_FADING if plan.trial else FADING) * trees.visits)
        predicted_ms = self.costs.target.at(context, nodes) + paths_ms + switch_ms
        pace.learn_target(context, nodes, predicted_ms, verify_ms, changed=changed)
        if known.credit is not None:
            loss = plan.otherwise / plain - (known.price * tokens - took) if plan.trial else 0.0
            known.credit = min(known.credit + TRIAL_SHARE * took - max(loss, 0.0), TRIAL_ROUNDS)
        if drafted is None:
            known.rested += 1
        else:
            self._learn_draft(drafted, round.tokens)
            known.rested, took = 0, took - pace.backlog_ms(context, plan.unread) / plain
            # A trial tells what drafts are worth, also where the change alone kept its tree from being verified.
            known.drafted.add((plan.trial and missed) or Outcome(tokens, took))
            known.long_run.add(missed or Outcome(tokens, took - changed * pace.switch_ms / plain))
        known.judge_long_run()

    def _missed(self, round: Round, offered: DraftTree, predicted: float) -> Outcome:
        """What the round would have been, had its draft been verified."""
        plan, worth, pace = round.plan, round.choice.worth, self.pace
        best = max((width for width in worth if width > 1), key=worth.__getitem__)
        verify = pace.verify_ms(plan.context, offered, best)
        took = verify + pace.draft_ms(plan.context, 1) + pace.draft_pace * predicted
        return Outcome((worth[best] + verify) / self._price(plan), took / pace.target_ms(plan.context, 1))

    def _learn_draft(self, tree: DraftTree, tokens: Sequence[int]) -> None:
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
