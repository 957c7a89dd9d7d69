"""Choose how much a round drafts and verifies, by the times of passes and the gain of drafts.

A round is worth (expected tokens) x (price of a token) - (its time). The price is the time that a
token has lately taken, at most a plain step. The scheduler takes the choice that is worth most, or
decodes plainly if no other choice is worth more. Source: Dinkelbach's rule for a ratio of sums. The
ratio of a single round, tokens per millisecond, would undervalue long trees.

A budget bounds what drafts may lose (estimates.py). Probabilities are the drafter's, calibrated by
its training and corrected by how often its tokens were right here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp, log

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.policy.calibration import Calibration
from dovetail.runtime.policy.costs import Costs
from dovetail.runtime.policy.estimates import ABOVE, PRIOR, START, Budget, Estimate, Experience
from dovetail.runtime.policy.pace import Pace
from dovetail.runtime.policy.policy import Choice, Plan, Round
from dovetail.runtime.tree.draft_tree import DraftTree, best_tree, without_branches
from dovetail.runtime.tree.limits import TreeLimits

# Where a value comes from "the replay", tests/bench/replay.py chose it: the best mean over both
# shipped pairs, temperatures 0 and 1, and three tables of costs.
BOUNDS = TreeLimits(width=32, depth=8, top_k=3, lookup=24)  # the replay has no larger trees
WIDTHS = (1, 4, 6, 8, 12, 16, 24, 32)  # few: OpenVINO prepares its kernels again for another width
FEW_WIDTHS = (1, 6, 12)  # if changes are slow: 2% better in the replay than all widths
DEAR = 0.1  # plain steps; a change that takes longer is slow
OPTIMISM = 0.4  # plain steps that a drafted round may seem to lose: the budget bounds real losses


@dataclass
class Scheduler:
    """Makes the schedule of one engine and learns across conversations. Implements `Policy`."""

    costs: Costs
    calibration: Calibration | None = None  # None if the drafter has no calibration file
    plain_rows: int = 1  # rows that a plain pass computes anyway: a tree of so many nodes costs no more
    max_slowdown: float = 0.01  # share of the time that drafts may lose in the long run; the user sets it
    pace: Pace = field(init=False)
    _greedy: Experience = field(init=False)
    _sampled: Experience = field(init=False)
    _known: Experience = field(init=False)  # the one of the current answer
    _width: int = 0  # of the last verified tree, 0 after another kind of pass
    _regret: Mapping[int, float] = field(default_factory=dict)  # width -> ms lost by keeping the last width

    def __post_init__(self) -> None:
        self.pace = Pace(self.costs)
        self._greedy, self._sampled = (Experience(Budget(self.max_slowdown)) for _ in range(2))
        self._known = self._greedy

    def start(self, sampled: bool) -> None:
        self._width, self._regret = 0, {}  # the last pass verified no tree
        self._known = self._sampled if sampled else self._greedy

    # --- before the draft

    def widest(self, context: int, most: int) -> int:
        return self._widths(context, most)[-1]

    def plan(self, context: int, most: int, repeats: DraftTree, unread: int) -> Plan:
        plan = Plan(context, unread, self._widths(context, most))
        if len(plan.widths) == 1 or self.costs.draft is None:  # no room for a tree, or no drafter
            return plan
        known, pace = self._known, self.pace
        plain = pace.target_ms(context, 1)
        otherwise = max(worth - self._change(width) for width, worth in self._worth(plan, repeats).items())
        gain = known.price_of_token * known.tokens.value - known.steps.value - otherwise / plain
        at_risk = known.steps.value - 1.0 + pace.backlog_ms(context, unread) / plain if gain <= 0.0 else -START
        return replace(plan, draft=gain >= -OPTIMISM and known.budget.covers(at_risk))

    def _widths(self, context: int, most: int) -> tuple[int, ...]:
        return tuple(width for width in widths(self.costs, context) if width <= most)

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
        node = (pace.target_ms(context, plan.widths[-1]) - pace.target_ms(context, 1)) / (plan.widths[-1] - 1)
        return gain > pace.draft_ms(context, len(frontier)) + node

    # --- before the target verifies

    def choose(self, plan: Plan, tree: DraftTree) -> Choice:
        """Return the part of `tree` that is worth most to verify, filled up to a width."""
        least = self.pace.path_ms(plan.context) / (self._price(plan) * self._known.trees[plan.draft].value)
        offered = tree = without_branches(tree, least)
        worth = self._worth(plan, tree) if plan.draft or len(tree) > 1 else {1: 0.0}  # nothing to verify: plain
        width, regret = self._best_width(plan, worth)
        kept = min(max(width, self.plain_rows), len(tree))
        if kept < len(tree):
            tree = best_tree(tree.tokens.tolist(), tree.parents.tolist(), tree.logprobs.tolist(), kept - 1)
        return Choice(filled(tree, width), offered, width, worth, regret)

    def _best_width(self, plan: Plan, worth: Mapping[int, float]) -> tuple[int, Mapping[int, float]]:
        """Return the width to verify, and each width's regret if the width stays.

        The width changes if this tree alone pays for the change, or if the regret has reached the
        cost of the change (ski rental).
        """
        if not plan.draft:  # `plan` has checked the budget for drafts
            worth = {width: ms for width, ms in worth.items() if width == 1 or self._affordable(plan, width)}
        change = {width: self._change(width) for width in worth}
        width = max(worth, key=lambda width: worth[width] - change[width])
        if width != self._width:
            return width, {}
        regret = {other: max(0.0, self._regret.get(other, 0.0) + worth[other] - worth[width]) for other in worth}
        best = max((other for other in worth if regret[other] >= change[other]), key=worth.__getitem__)
        return best, {**self._regret, **regret} if best == self._width else {}

    def _affordable(self, plan: Plan, width: int) -> bool:
        """Return whether the budget covers a tree without a right node and two changes of width."""
        plain = self.pace.target_ms(plan.context, 1)
        loss = self.pace.target_ms(plan.context, width) - plain + self._change(width)
        return self._known.budget.covers(loss / plain)

    def _price(self, plan: Plan) -> float:
        """Return the milliseconds that a token is worth."""
        return self._known.price_of_token * self.pace.target_ms(plan.context, 1)

    def _worth(self, plan: Plan, tree: DraftTree) -> dict[int, float]:
        """Return width -> worth (ms) of a pass over the best part of `tree`, before changes."""
        expected = tree.expected_lengths
        price, factor = self._price(plan), self._known.trees[plan.draft].value
        out = {}
        for width in plan.widths:
            tokens = 1.0 + (expected[min(width, len(tree)) - 1] - 1.0) * factor
            out[width] = price * tokens - self.pace.verify_ms(plan.context, tree, width)
            if width >= len(tree):
                break
        if self._width in plan.widths and self._width not in out:  # wider than the tree
            out[self._width] = price * tokens - self.pace.verify_ms(plan.context, tree, self._width)
        return out

    def _change(self, width: int) -> float:
        """Return the ms that a pass of this width costs more because the last width differs.

        A change to or from plain decoding counts twice, for the way back, which is usually near.
        """
        return (1 + (1 in (self._width, width))) * self.pace.switch_ms if self._width != width else 0.0

    # --- after the round

    def learn(self, round: Round) -> None:
        known, pace, plan, choice = self._known, self.pace, round.plan, round.choice
        context, drafted, tokens = plan.context, round.drafted is not None, len(round.tokens)
        offered = choice.offered or choice.tree
        missed = self._missed(round, offered) if drafted and choice.width == 1 < len(offered) else None
        known.fade(repeats=not drafted and len(offered) > 1)
        predicted = 0.0
        if round.growth:
            for depth, taken in round.growth.taken.items():
                known.children.setdefault(depth, Estimate(1.0, ABOVE)).add(taken)
            predicted = self.costs.call_ms(context, plan.unread) + self._levels(round)

        self._regret = choice.regret
        nodes = len(choice.tree) if len(choice.tree) > self.plain_rows else 1
        changed, self._width = self._width != nodes, nodes
        extra_ms = (choice.tree.path_counts[-1] - 1) * self.costs.path.at(context, 1) + changed * self.costs.switch_ms
        verify_ms = pace.learn_target(context, nodes, extra_ms, round.verify_ms, changed=changed)
        draft_ms = pace.learn_draft(predicted, round.draft_ms)

        plain = pace.target_ms(context, 1)
        took, change = (draft_ms + verify_ms) / plain, changed * pace.switch_ms / plain
        known.price.add(took / tokens, tokens)
        known.budget.add(took, tokens - took if drafted or nodes > 1 else -change)
        if nodes > 1 and (expected := choice.tree.expected_length - 1.0) > 0:
            known.trees[drafted].add((tokens - 1.0) / expected, expected)
        if round.drafted is not None:
            self._learn_draft(round.drafted, round.tokens)
            backlog = pace.backlog_ms(context, plan.unread) / plain
            gave, steps = missed or (tokens, took - backlog)
            known.tokens.add(gave)
            known.steps.add(steps)

    def _levels(self, round: Round) -> float:
        """Return the ms that the levels of the round's tree take by the cost table."""
        return sum(self.costs.call_ms(round.plan.context, rows) for rows in round.growth.rows) if round.growth else 0.0

    def _missed(self, round: Round, offered: DraftTree) -> tuple[float, float]:
        """Return the tokens and plain steps to expect of the round, had its draft been verified."""
        context, worth, pace = round.plan.context, round.choice.worth, self.pace
        best = max((width for width in worth if width > 1), key=worth.__getitem__)
        verify = pace.verify_ms(context, offered, best)
        took = verify + pace.draft_ms(context, 1) + pace.draft_pace * self._levels(round)
        return (worth[best] + verify) / self._price(round.plan), took / pace.target_ms(context, 1)

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
    return WIDTHS if costs.switch_ms <= DEAR * costs.target.at(context, 1) else FEW_WIDTHS


def filled(tree: DraftTree, width: int) -> DraftTree:
    """Return `tree`, filled up to `width` nodes by a chain of the root's token below the last."""
    count = width - len(tree)
    if count <= 0:
        return tree
    return DraftTree(
        np.concatenate([tree.tokens, np.full(count, tree.tokens[0])]),
        np.concatenate([tree.parents, np.arange(len(tree) - 1, width - 1)]),
        np.concatenate([tree.logprobs, np.full(count, -np.inf, np.float32)]),
    )
