"""What drafting while the target verifies gives a drafter with a device of its own, on the records of replay.py.

    python -m tests.bench.draft_ahead PAIR drafts.npz ... --costs tune.json

Every call of the drafter takes `--call-ms`, whatever its rows.  While the target verifies a tree, the drafter grows
trees below the likeliest ends of the accepted path.  If the path ends there, the next round has its draft already.
Otherwise the drafter drafts after the pass, as today.  A tree that was drafted ahead grows from the drafter's own
features, since those of the target exist only after the pass.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from math import exp
from pathlib import Path
from statistics import geometric_mean

import click
import numpy as np
from tests.bench.replay import (
    Record,
    ReplayDrafter,
    ReplayTarget,
    limits_of,
    load,
    plain_ms,
    read_costs,
    read_pair,
    replay,
)

from dovetail.runtime.cli.main import fail
from dovetail.runtime.errors import DovetailError, InputError
from dovetail.runtime.loop.sequence import Found, Outlook, Sequence
from dovetail.runtime.policy.calibration import Calibration, pair_calibration
from dovetail.runtime.policy.choose import Scheduler
from dovetail.runtime.policy.costs import Costs, Curve
from dovetail.runtime.policy.policy import Plan, Policy
from dovetail.runtime.target.session import TargetPass
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.forest import Forest
from dovetail.runtime.tree.growth import Judge
from dovetail.runtime.tree.limits import TreeLimits

FREE_MS = 1e-6  # a curve has no times of 0
WRONG = -1  # a token that no text has


@dataclass(frozen=True)
class Way:
    """How drafts are made.  ends: of the accepted path below which trees are drafted ahead, 0 as today."""

    ends: int = 0
    as_good: bool = False  # whether a tree that was drafted ahead is as good as one from the target's features
    free: bool = False  # whether drafts take no time at all


WAYS = {
    "today": Way(),
    "1 end": Way(1),
    "3 ends": Way(3),
    "3 ends, as good": Way(3, as_good=True),
    "no time for any draft": Way(free=True),
}


@dataclass
class Ahead:
    """The work of the drafter's device during the passes of one answer.

    levels: of `kept_by_level`.
    """

    way: Way
    each: Record
    call_ms: float
    levels: list[float]
    rounds: int = 0
    hits: int = 0
    depth: int = 0  # levels below its root at which the present tree was drafted ahead, 0 if it was not
    calls: int = 0  # levels that the last pass had time for
    wait_ms: float = 0.0  # after the last pass, until a call that is in vain has ended
    _place: int = 0  # of the last pass's root in the answer
    _ends: list[tuple[int, ...]] = field(default_factory=list)  # tokens after that root

    def during(self, place: int, tree: DraftTree, pass_ms: float) -> None:
        """Draft below the likeliest ends of the path in `tree`, whose root is the answer's token at `place`.

        One call finds the ends.  After a tree that was drafted ahead one more reads the target's features.
        """
        found = self._likeliest(place, tree) if self.way.ends and place < len(self.each.trees) else []
        self._place, self._ends = place, found[: self.way.ends]
        self.calls = int(pass_ms / self.call_ms) - 1 - (self.depth > 0)
        self.wait_ms = -pass_ms % self.call_ms if found and 0 < self.calls < len(self.levels) else 0.0

    def turn(self, place: int) -> None:
        """Go on at the answer's token at `place`."""
        path = self.each.answer[self._place + 1 : place + 1]
        hit = path in self._ends and self.calls > 0 and place < len(self.each.trees)
        self.depth = len(path) if hit else 0
        self.rounds, self.hits = self.rounds + 1, self.hits + hit

    def _likeliest(self, place: int, tree: DraftTree) -> list[tuple[int, ...]]:
        """Tokens after the root of `tree` up to the first that the tree lacks, the likeliest first."""
        record, truth = self.each.trees[place], self.each.answer[place + 1 :]
        found, paths = dict[tuple[int, ...], float](), dict[int, tuple[int, ...]]({0: ()})
        inside = {0: 0}  # node of the record -> node of `tree`
        parents = record.parents.tolist()
        for node, token in enumerate(record.tokens.tolist()):
            if node and (parent := parents[node]) in inside:
                path = paths[node] = (*paths[parent], token)
                if (child := tree.child(inside[parent], token)) is None:
                    found[path] = exp(record.logprobs[node])
                else:
                    inside[node] = child
        last = max(map(len, paths.values()))
        deepest = [node for node in inside if len(paths[node]) == last]
        for node in deepest:  # if the path is right, another record goes on
            path, below = paths[node], place + last
            chance = exp(2 * record.logprobs[node] - record.logprobs[parents[node]])  # as if by the step before
            right = path == truth[: len(path)] and below < len(self.each.trees) and len(self.each.trees[below]) > 1
            best = int(self.each.trees[below].tokens[1]) if right else WRONG
            found[*path, best] = chance
        return sorted(found, key=lambda path: -found[path])

    def tree(self, place: int) -> DraftTree:
        """The tree that was drafted ahead: at each level as rarely right as the record's trees `depth` levels below."""
        tree, node = self.each.trees[place], 0
        rng, tokens = np.random.default_rng((len(self.each.prompt), place)), tree.tokens.copy()
        for level, token in enumerate(self.each.answer[place + 1 :], 1):
            child = tree.child(node, token)
            if self.way.as_good or child is None:
                break
            if rng.random() > self._kept(level + self.depth) / self._kept(level):
                tokens[child] = WRONG
                break
            node = child
        return DraftTree(tokens, tree.parents, tree.logprobs)

    def _kept(self, level: int) -> float:
        return self.levels[min(level, len(self.levels)) - 1]


def kept_by_level(records: list[Record]) -> list[float]:
    """How often the target's token is a child of its right parent, over how often it is one at level 1.

    One value for each level from 1, over the same tokens: only easy text has right paths of many levels.
    """
    right, first = list[int](), list[int]()
    for each in records:
        for place, tree in enumerate(each.trees):
            node: int | None = 0
            for level, token in enumerate(each.answer[place + 1 :]):
                if node is None or not (tree.parents == node).any():
                    break
                if level == len(right):
                    right.append(0)
                    first.append(0)
                node = tree.child(node, token)
                right[level] += node is not None
                first[level] += each.trees[place + level].child(0, token) is not None
    return [min(hits / most, 1.0) for hits, most in zip(right, first, strict=True) if most]


class AheadScheduler(Scheduler):
    """Takes a tree that was drafted ahead as one that costs nothing."""

    ahead: Ahead
    timed: Costs  # of drafts after the pass

    def turn(self, measured: Calibration | None) -> None:
        """Follow `ahead` into the next round.  measured: by depth, from the target's features."""
        depth = self.ahead.depth
        self.costs = self.pace.costs = drafts_of(self.timed, FREE_MS) if depth else self.timed
        self.calibration = measured
        if measured and depth and not self.ahead.way.as_good:
            self.calibration = replace(measured, depths=measured.depths[min(depth, len(measured.depths) - 1) :])

    def plan(self, context: int, most: int, repeats: Forest, unread: int) -> Plan:
        plan = super().plan(context, most, repeats, unread)
        return replace(plan, draft=plan.draft or (self.ahead.depth > 0 and len(plan.widths) > 1))


class AheadSequence(Sequence):
    """A sequence whose drafter works during passes."""

    def __init__(
        self, target: ReplayTarget, drafter: ReplayDrafter, ahead: Ahead, measured: Calibration | None
    ) -> None:
        super().__init__(target, AheadDrafter(drafter, ahead))
        self.ahead, self._measured, self._clock, self._before = ahead, measured, drafter.clock, 0.0

    def outlook(self, policy: Policy | None = None, least: float = 0.0) -> Outlook:
        assert self.request and isinstance(policy, AheadScheduler)
        self.ahead.turn(len(self.tokens) - len(self.request.prompt) - 1)
        policy.turn(self._measured)
        self._clock.costs = policy.costs
        outlook, self._before = super().outlook(policy, least), self._clock.ms
        if self.ahead.depth:
            limits = replace(outlook.limits, depth=min(outlook.limits.depth, self.ahead.calls))
            outlook = replace(outlook, limits=limits)
        return outlook

    def propose(self, limits: TreeLimits, judge: Judge | None) -> DraftTree:
        if not self.ahead.depth:
            self._clock.ms += self.ahead.wait_ms
        tree, self._before = super().propose(limits, judge), self._clock.ms
        return tree

    def accept(self, tree: DraftTree, result: TargetPass) -> Found:
        assert self.request
        self.ahead.during(self.length - len(self.request.prompt), tree, self._clock.ms - self._before)
        return super().accept(tree, result)


class AheadDrafter(ReplayDrafter):
    """Proposes the tree that was drafted ahead, if there is one."""

    def __init__(self, of: ReplayDrafter, ahead: Ahead) -> None:
        super().__init__(of.each, of.target, of.clock)
        self._ahead = ahead

    def recorded(self, place: int) -> DraftTree:
        return self._ahead.tree(place) if self._ahead.depth else super().recorded(place)


def drafts_of(costs: Costs, call_ms: float) -> Costs:
    """Costs with calls of the drafter that take `call_ms`, whatever their rows."""
    return replace(costs, draft=Curve((0,), (1, 128), ((call_ms, call_ms),)))


def compact(each: Record) -> Record:
    """The record with small numbers for its tokens, in their order: its logits are short, and so is its replay."""
    known = {*each.prompt, *each.answer, *(token for tree in each.trees for token in tree.tokens.tolist())}
    number = {token: place for place, token in enumerate(sorted(known))}
    trees = [replace(tree, tokens=np.array([number[token] for token in tree.tokens.tolist()])) for tree in each.trees]
    prompt, answer = ([number[token] for token in text] for text in (each.prompt, each.answer))
    return replace(each, prompt=tuple(prompt), answer=tuple(answer), trees=tuple(trees))


def play(
    way: Way, records: list[Record], levels: list[float], costs: Costs, measured: Calibration | None,
    limits: TreeLimits, other_ms: float,
) -> tuple[list[float], float]:  # fmt: skip
    """Speed of each answer against plain decoding, and the share of rounds whose tree was drafted ahead.

    levels: of `kept_by_level`.
    """
    scheduler = AheadScheduler(costs, measured)
    scheduler.timed = drafts_of(costs, FREE_MS) if way.free else costs
    ratios, rounds, hits = list[float](), 0, 0
    for each in records:
        ahead = scheduler.ahead = Ahead(way, each, scheduler.timed.call_ms(0, 1), levels)

        def new(target: ReplayTarget, drafter: ReplayDrafter | None, ahead: Ahead = ahead) -> Sequence:
            assert drafter
            return AheadSequence(target, drafter, ahead, measured)

        count, ms = replay(each, costs, scheduler, limits, new)
        ratios.append(plain_ms(each, costs) / (ms + count * other_ms))
        rounds, hits = rounds + ahead.rounds, hits + ahead.hits
    return ratios, hits / rounds


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("pair")
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="RECORD...")
@click.option("--costs", "measured", type=click.Path(path_type=Path), required=True, help="JSON of dovetail-run tune.")
@click.option("--call-ms", "calls", type=click.FloatRange(min=0, min_open=True), multiple=True,
              default=(0.5, 1, 2, 4, 8), show_default=True, help="Ms of a drafter's call; repeatable.")  # fmt: skip
@click.option("--other-ms", type=click.FloatRange(min=0), default=0.14, show_default=True, help="As of replay.py.")
def main(pair: str, files: tuple[Path, ...], measured: Path, calls: tuple[float, ...], other_ms: float) -> None:
    """Print how much quicker than plain decoding the records are decoded in each way."""
    try:
        folder, manifest = read_pair(pair)
        calibration, limits, costs = pair_calibration(folder, manifest), limits_of(manifest), read_costs(measured)
        texts = [[compact(each) for each in load(file)] for file in files]
        if any(len(tree) == 1 for records in texts for each in records for tree in each.trees):
            raise InputError("a record has places without a draft: record a pair that has a drafter")
        levels = [kept_by_level(records) for records in texts]
        heads = "".join(f" {file.stem} |" for file in files)
        click.echo(f"| a call, ms | way |{heads} mean | against today | ahead |\n|--:|---|{'--:|' * (len(files) + 3)}")
        for call_ms in calls:
            today = 0.0
            for name, way in WAYS.items():
                timed = drafts_of(costs, call_ms)
                found = [
                    play(way, *known, timed, calibration, limits, other_ms) for known in zip(texts, levels, strict=True)
                ]
                means = [geometric_mean(ratios) for ratios, _ in found]
                mean, share = sum(means) / len(means), sum(hits for _, hits in found) / len(found)
                today = today or mean
                cells = " | ".join(f"{value:.3f}x" for value in (*means, mean))
                click.echo(f"| {call_ms:g} | {name} | {cells} | {mean / today - 1:+.1%} | {share:.0%} |")
    except DovetailError as error:
        sys.exit(fail(str(error), error.exit_code))


if __name__ == "__main__":
    main()
