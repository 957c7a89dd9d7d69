"""Choose how much a round drafts and verifies, by the times of passes and the gain of drafts.

A round is worth (expected tokens) x (price of a token) - (its time). The price is the time that a
token has lately taken, at most a plain step. The scheduler takes the choice that is worth most, or
decodes plainly if no other choice is worth more. Source: Dinkelbach's rule for a ratio of sums. The
ratio of a single round, tokens per millisecond, would undervalue long trees. With several texts in
a round the unit is one token for each text, so that plain decoding still gives one.

A budget bounds what drafts may lose (estimates.py). Probabilities are the drafter's, calibrated by
its training and corrected by how often its tokens were right here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from math import exp, inf, log

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.policy.calibration import Calibration
from dovetail.runtime.policy.costs import Costs
from dovetail.runtime.policy.estimates import ABOVE, PRIOR, START, Budget, Estimate, Experience
from dovetail.runtime.policy.pace import Pace
from dovetail.runtime.policy.policy import Choice, Plan, Round
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.forest import Forest
from dovetail.runtime.tree.limits import TreeLimits

# Where a value comes from "the replay", tests/bench/replay.py chose it: the best mean over both
# shipped pairs, temperatures 0 and 1, and three tables of costs.
BOUNDS = TreeLimits(width=32, depth=8, top_k=3, lookup=24)  # the replay has no larger trees
WIDTHS = (1, 4, 6, 8, 12, 16, 24, 32)  # few: OpenVINO prepares its kernels again for another width
FEW_WIDTHS = (1, 6, 12)  # if changes are slow: 2% better in the replay than all widths
DEAR = 0.1  # plain steps; a change that takes longer is slow
STEEP_WIDTHS = (1, 2, 4)  # if nodes are slow, as in a mixture of experts: docs/results/moe.md
STEEP = 2.5  # plain steps; nodes are slow if a pass of FEW_WIDTHS[1] nodes takes longer: docs/results/moe.md
OPTIMISM = 0.4  # plain steps that a drafted round may seem to lose: the budget bounds real losses


@dataclass
class Scheduler:
    """Makes the schedule of one engine and learns across conversations. Implements `Policy`."""

    costs: Costs
    calibration: Calibration | None = None  # None if the drafter has no calibration file
    plain_rows: int = 1  # rows that a plain pass of one text computes anyway: so many nodes cost no more
    max_slowdown: float = 0.01  # share of the time that drafts may lose in the long run; the user sets it
    pace: Pace = field(init=False)
    _experiences: dict[tuple[bool, int], Experience] = field(default_factory=dict)  # by sampled and number of texts
    _known: Experience = field(init=False)  # of the current rounds
    _texts: int = 1
    _width: int = 0  # of the last round, 0 after another kind of pass
    _regret: Mapping[int, float] = field(default_factory=dict)  # width -> ms lost by keeping the last width

    def __post_init__(self) -> None:
        self.pace = Pace(self.costs)
        self.start(sampled=False)

    def start(self, sampled: bool, texts: int = 1) -> None:
        """See Policy. Rounds of 2 and 3, of 4 to 7 texts and so on share what is learned of them.

        All rounds of several texts share one budget: an engine that meets many numbers of texts in a
        short time tries drafts for each of them.
        """
        self._width, self._regret, self._texts = 0, {}, texts  # the last pass verified no tree
        key = sampled, texts.bit_length()
        if key not in self._experiences:
            alike = (known for (drawn, size), known in self._experiences.items() if size > 1 and drawn == sampled)
            shared = next(alike, None) if texts > 1 else None
            self._experiences[key] = Experience(shared.budget if shared else Budget(self.max_slowdown))
        self._known = self._experiences[key]

    # --- before the draft

    def least(self, context: int) -> float:
        """See Policy. With one text the answer is 0: its trees take little time, and a further row may be free."""
        known, texts = self._known, self._texts
        if texts == 1:
            return 0.0
        if not known.budget.covers(0.0) and self._width == texts:
            return inf
        plain = self.pace.target_ms(context, texts, texts)
        wider = self._widths(context, texts * BOUNDS.width, texts)[1:]
        node = min((self.pace.target_ms(context, width, texts) - plain) / (width - texts) for width in wider)
        return min(max(node / (known.price_of_token * plain / texts), 0.0), 1.0)

    def widest(self, context: int, most: int) -> int:
        return min(self._widths(context, most, self._texts)[-1], most, BOUNDS.width)

    def plan(self, context: int, most: int, repeats: Forest, unread: int) -> Plan:
        texts = len(repeats.trees)
        plan = Plan(context, unread, self._widths(context, most, texts), texts=texts)
        if len(plan.widths) == 1 or self.costs.draft is None or self._unknown(plan):  # no room, no drafter, not yet
            return plan
        known, pace = self._known, self.pace
        plain = self._plain_ms(plan)
        otherwise = max(worth - self._change(width) for width, worth in self._worth(plan, repeats).items())
        gain = known.price_of_token * known.tokens.value - known.steps.value - otherwise / plain
        debt = START if texts == 1 else 0.0  # with several texts the replay has no use for one
        at_risk = known.steps.value - 1.0 + pace.backlog_ms(context, unread) / plain if gain <= 0.0 else -debt
        return replace(plan, draft=gain >= -OPTIMISM and known.budget.covers(at_risk))

    def _widths(self, context: int, most: int, texts: int) -> tuple[int, ...]:
        """Return the widths of a pass over so many texts: for several of them also twice the two largest."""
        every = widths(self.costs, context)
        if texts > 1:
            every = (*WIDTHS, *(2 * width for width in WIDTHS[-2:]))
        return (texts, *(width for width in every if texts < width <= most))

    def _unknown(self, plan: Plan) -> bool:
        """Whether plain passes of so many texts have yet to be timed. The table has times of one text alone."""
        return plan.texts > 1 and not self.pace.knows(plan.texts, plan.texts)

    def _plain_ms(self, plan: Plan) -> float:
        """Return the ms of a round that decodes every text plainly."""
        return self.pace.target_ms(plan.context, plan.texts, plan.texts)

    # --- while the drafter's tree grows

    def believe(self, plan: Plan, depth: int, logprobs: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.calibration is not None:
            logprobs = self.calibration.apply(depth, logprobs)
        shift = np.full(logprobs.shape[-1], log(self._known.factor(self._known.others, depth)), np.float32)
        shift[0] = log(self._known.factor(self._known.first, depth))
        believed: NDArray[np.float32] = np.minimum(logprobs + shift, np.float32(0))
        np.minimum(believed, believed[:, :1], out=believed)  # the best candidate stays the best
        return believed

    def worth_expanding(self, plan: Plan, depth: int, frontier: Sequence[float]) -> bool:
        context, pace, known = plan.context, self.pace, self._known
        gain = self._price(plan) * sum(map(exp, frontier)) * known.share(depth) * known.trees[True].value
        least, most = plan.widths[0], plan.widths[-1]
        texts = plan.texts
        node = (pace.target_ms(context, most, texts) - pace.target_ms(context, least, texts)) / (most - least)
        shared = max(plan.together, 1)
        return gain > pace.draft_ms(context, len(frontier) * shared) / shared + node

    # --- before the target verifies

    def choose(self, plan: Plan, forest: Forest) -> Choice:
        """Return the part of `forest` that is worth most to verify, and its width."""
        some = (plan.draft or len(forest) > plan.texts) and not self._unknown(plan)
        worth = self._worth(plan, forest) if some else {plan.texts: 0.0}  # nothing to verify: plain
        width, regret = self._best_width(plan, worth)
        return Choice(forest.best(max(width, self.plain_rows)), forest, width, regret)

    def _best_width(self, plan: Plan, worth: Mapping[int, float]) -> tuple[int, Mapping[int, float]]:
        """Return the width to verify, and each width's regret if the width stays.

        The width changes if this tree alone pays for the change, or if the regret has reached the
        cost of the change (ski rental).
        """
        if not plan.draft:  # `plan` has checked the budget for drafts
            worth = {width: ms for width, ms in worth.items() if width == plan.texts or self._affordable(plan, width)}
        change = {width: self._change(width) for width in worth}
        width = max(worth, key=lambda width: worth[width] - change[width])
        if width != self._width:
            return width, {}
        regret = {other: max(0.0, self._regret.get(other, 0.0) + worth[other] - worth[width]) for other in worth}
        best = max((other for other in worth if regret[other] >= change[other]), key=worth.__getitem__)
        return best, {**self._regret, **regret} if best == self._width else {}

    def _affordable(self, plan: Plan, width: int) -> bool:
        """Return whether the budget covers a tree without a right node and two changes of width."""
        pace = self.pace
        context, texts = plan.context, plan.texts
        loss = pace.target_ms(context, width, texts) - pace.target_ms(context, texts, texts) + self._change(width)
        return self._known.budget.covers(loss / self._plain_ms(plan))

    def _price(self, plan: Plan) -> float:
        """Return the milliseconds that a token is worth."""
        return self._known.price_of_token * self._plain_ms(plan) / plan.texts

    def _worth(self, plan: Plan, forest: Forest) -> dict[int, float]:
        """Return width -> worth (ms) of a pass over the best part of `forest`, before changes."""
        expected, texts = forest.expected_lengths, plan.texts
        price, factor = self._price(plan), self._known.trees[plan.draft].value
        out = {}
        for width in plan.widths:
            tokens = texts + (expected[min(width, len(forest)) - 1] - texts) * factor
            out[width] = price * tokens - self.pace.target_ms(plan.context, width, texts)
            if width >= len(forest):
                break
        if self._width in plan.widths and self._width not in out:  # wider than the trees
            out[self._width] = price * tokens - self.pace.target_ms(plan.context, self._width, texts)
        return out

    def _change(self, width: int) -> float:
        """Return the ms that a pass of this width costs more because the last width differs.

        A change to or from plain decoding counts twice, for the way back, which is usually near. With
        several texts the first pass after one that read a prompt changes the width in any case.
        """
        if self._texts > 1 and not self._width:
            return 0.0
        return (1 + (self._texts in (self._width, width))) * self.pace.switch_ms if self._width != width else 0.0

    # --- after the round

    def learn(self, round: Round) -> None:
        known, pace, plan, choice = self._known, self.pace, round.plan, round.choice
        context, texts, forest = plan.context, plan.texts, choice.forest
        drafts = [draft for draft in round.drafts if draft]
        tokens = sum(map(len, round.tokens)) / texts
        offered = choice.offered or forest
        known.fade(repeats=not drafts and len(offered) > texts)
        predicted = 0.0
        for draft in drafts:
            for depth, taken in draft.growth.taken.items():
                known.children.setdefault(depth, Estimate(1.0, ABOVE)).add(taken)
        if drafts:
            predicted = self.costs.read_ms(context, plan.unread) + self._levels(round)

        self._regret = choice.regret
        rows = max(choice.width, len(forest))
        nodes = rows if rows > self.plain_rows else texts
        changed = self._width != nodes
        self._width = nodes
        if round.verify_ms is None:
            changed, verify_ms = False, pace.target_ms(context, nodes, texts)
        else:
            verify_ms = pace.learn_target(context, nodes, round.verify_ms, changed=changed, texts=texts)
        draft_ms = pace.learn_draft(predicted, round.draft_ms)

        plain = self._plain_ms(plan)
        took, change = (draft_ms + verify_ms) / plain, changed * pace.switch_ms / plain
        known.price.add(took / tokens, tokens)
        known.budget.add(took, tokens - took if drafts or nodes > texts else -change)
        if nodes > texts and (expected := forest.expected_length - texts) > 0:
            known.trees[bool(drafts)].add((tokens - 1.0) * texts / expected, expected)
        for drafted, found in zip(round.drafts, round.tokens, strict=True):
            if drafted:
                self._learn_draft(drafted.tree, found)
        if drafts:
            known.tokens.add(tokens)
            known.steps.add(took - pace.backlog_ms(context, plan.unread) / plain)

    def _levels(self, round: Round) -> float:
        """Return the ms that the levels of the round's trees take by the cost table."""
        levels = [draft.growth.rows for draft in round.drafts if draft]
        calls: Iterable[int] = chain.from_iterable(levels)
        if round.plan.together > 1:
            calls = map(sum, zip_longest(*levels, fillvalue=0))
        return sum(self.costs.call_ms(round.plan.context, rows) for rows in calls)

    def _learn_draft(self, tree: DraftTree, tokens: Sequence[int]) -> None:
        """Compare the drafter's own tree with the tokens that followed its root."""
        node, known = 0, self._known
        probabilities = np.exp(tree.logprobs.astype(np.float64))
        for depth, token in enumerate(tokens, 1):
            children = np.flatnonzero(tree.parents == node)
            if not len(children):
                return
            claims = probabilities[children] / probabilities[node]
            best = children[int(np.argmax(claims))]
            child = tree.child(node, token)
            for kind, claim, hit in (
                (known.first, float(claims.max()), child == best),
                (known.others, float(claims.sum() - claims.max()), child is not None and child != best),
            ):
                claimed = min(claim / known.factor(kind, depth), 1.0)  # before the correction
                if claimed > 0:
                    kind.setdefault(depth, Estimate(1.0, PRIOR)).add(hit / claimed, claimed)
            if child is None:
                return
            node = child


def widths(costs: Costs, context: int) -> tuple[int, ...]:
    """Return the numbers of nodes that trees may have at these `costs`, after `context` tokens."""
    plain, target = costs.target.at(context, 1), costs.target
    if target.at(context, FEW_WIDTHS[1]) > STEEP * plain:
        return STEEP_WIDTHS
    return WIDTHS if costs.switch_ms <= DEAR * plain else FEW_WIDTHS
