"""The scheduler on scripted sessions with a clock of their own: the best tree, and never a loss to plain decoding."""

from __future__ import annotations

from collections import abc
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dovetail.runtime.drafter.session import DraftNoise
from dovetail.runtime.loop.generate import decode
from dovetail.runtime.loop.metrics import Meter
from dovetail.runtime.loop.sequence import Request, Sequence
from dovetail.runtime.policy import choose, estimates, pace, policy
from dovetail.runtime.policy.choose import FEW_WIDTHS, WIDTHS, Scheduler
from dovetail.runtime.policy.costs import Costs, Curve
from dovetail.runtime.policy.estimates import ABOVE, START, Estimate
from dovetail.runtime.policy.pace import OUTLIER
from dovetail.runtime.policy.policy import Choice, Draft, Growth, Plan, Policy, Round
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.system.arrays import FloatArray, TokenArray
from dovetail.runtime.target.session import TargetPass
from dovetail.runtime.testing.policy import ScriptedPolicy
from dovetail.runtime.testing.scripted import MarkovLogits, ScriptedDrafter, ScriptedTarget
from dovetail.runtime.tree.draft_tree import DraftTree, graft
from dovetail.runtime.tree.forest import Forest
from dovetail.runtime.tree.growth import Judge
from dovetail.runtime.tree.limits import TreeLimits
from dovetail.runtime.tree.repeats import Repeat

LIMITS = TreeLimits(width=32, depth=8, top_k=4, lookup=0)


def costs(
    pass_ms: float = 20.0,
    node_ms: float = 0.5,
    call_ms: float = 1.5,
    row_ms: float = 0.1,
    switch_ms: float = 0.0,
) -> Costs:
    """Straight lines: a pass of n nodes takes pass_ms + (n - 1) * node_ms, a call of n rows call_ms + n * row_ms."""
    target = Curve((0, 4096), (1, 64), ((pass_ms, pass_ms + 63 * node_ms),) * 2)
    draft = Curve((0, 4096), (1, 128), ((call_ms + row_ms, call_ms + 128 * row_ms),) * 2)
    return Costs(target, draft, switch_ms)


@dataclass
class Clock:
    """Seconds that the sessions' calls took; `slow` machines take a multiple."""

    costs: Costs
    now: float = 0.0
    slow: float = 1.0
    nodes: list[int] = field(default_factory=list)
    stall: float = 0.0  # seconds that the next call of the drafter takes more

    def __call__(self) -> float:
        return self.now

    def verify(self, nodes: int) -> None:
        change = 0.0 if self.nodes and self.nodes[-1] == nodes else self.costs.switch_ms  # a prompt has another width
        self.nodes.append(nodes)
        self.now += self.slow * (self.costs.target.at(0, nodes) + change) / 1e3

    def draft(self, rows: int) -> None:
        self.now += self.slow * self.costs.call_ms(0, rows) / 1e3 + self.stall
        self.stall = 0.0


class TimedTarget(ScriptedTarget):
    def __init__(self, logits: Any, clock: Clock):
        super().__init__(logits)
        self.clock = clock

    def verify(self, offers: abc.Mapping[int, DraftTree], *prompts: Any, rows: int = 0) -> dict[int, TargetPass]:
        (tree,) = offers.values()
        self.clock.verify(max(len(tree), rows))
        return super().verify(offers, *prompts)


class TimedDrafter(ScriptedDrafter):
    clock: Clock
    deaf = False  # does without the noise of sampled answers

    def extend(self, seq: int, tokens: TokenArray, features: FloatArray, noise: DraftNoise | None = None) -> None:
        self.clock.draft(len(tokens))
        super().extend(seq, tokens, features, noise)

    def propose(
        self, seq: int, limits: TreeLimits, judge: Judge | None = None, noise: DraftNoise | None = None
    ) -> DraftTree:
        timed = TimedJudge(judge, self.clock) if judge else None
        return super().propose(seq, limits, timed, None if self.deaf else noise)


@dataclass
class TimedJudge:
    """Every level that is run takes its time."""

    judge: Judge
    clock: Clock

    def believe(self, depth: int, logprobs: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.judge.believe(depth, logprobs)

    def pays(self, depth: int, frontier: abc.Sequence[float]) -> bool:
        if not self.judge.pays(depth, frontier):
            return False
        self.clock.draft(len(frontier))
        return True


def answer(
    kind: str,
    true: Costs,
    believed: Costs | None = None,
    *,
    tokens: int = 400,
    limits: TreeLimits = LIMITS,
    scheduler: Policy | None = None,
    slow: float = 1.0,
    noise: float = 0.0,
    sharpness: float = 3.0,
    temperature: float = 0.0,
    stall: float = 0.0,
    deaf: bool = False,
) -> tuple[Clock, Any, list[int]]:
    """Decode `tokens` tokens; returns the clock, the scheduler and the text."""
    logits = MarkovLogits(50, order=3, sharpness=sharpness)
    clock = Clock(true, slow=slow, stall=stall)
    made = TimedDrafter.copy_of(logits, noise) if kind == "copy" else TimedDrafter.hostile_to(logits)
    assert isinstance(made, TimedDrafter)
    made.clock, made.deaf = clock, deaf
    scheduler = scheduler or Scheduler(believed or true)
    request = Request(
        (1, 2, 3), tokens, SamplingParams(temperature=temperature, seed=3), limits=limits, scheduler=scheduler
    )
    steps = list(decode(Sequence(TimedTarget(logits, clock), made), request, Meter(clock=clock)))
    return clock, scheduler, [token for step in steps for token in step.tokens]


def plain_seconds(true: Costs, tokens: int = 400) -> float:
    return ((tokens - 1) * true.target.at(0, 1) + true.switch_ms) / 1e3


@pytest.mark.parametrize("switch_ms", [0.0, 16.0])
def test_a_hostile_drafter_costs_next_to_nothing(switch_ms: float) -> None:
    true = costs(switch_ms=switch_ms)
    assert answer("hostile", true)[0].now < 1.03 * plain_seconds(true)


def test_a_perfect_drafter_is_used_as_well_as_can_be() -> None:
    """Against the best constant depth, computed by hand: chains of d, one call to read and d - 1 to grow."""
    true = costs()
    rounds = []
    for d in range(1, LIMITS.depth + 1):
        width = next(width for width in WIDTHS if width > d)
        draft_ms = true.call_ms(0, d + 1) + (d - 1) * true.call_ms(0, 1)
        rounds.append((draft_ms + true.target.at(0, width)) / (d + 1))
    best = min(rounds)
    clock, _, tokens = answer("copy", true, sharpness=60.0, limits=TreeLimits(width=32, depth=8, top_k=1, lookup=0))
    assert clock.now * 1e3 < 1.03 * best * len(tokens)


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_no_constant_tree_is_much_better(noise: float) -> None:
    """The scheduler, which has yet to learn, against the best of a grid of fixed trees on the same text and clock."""
    true = costs(node_ms=1.0)
    fixed = []
    for width, depth in ((1, 0), (3, 2), (4, 3), (6, 4), (8, 3), (10, 5), (16, 6), (24, 8)):
        limits = TreeLimits(width=width, depth=depth, top_k=3, lookup=0)
        fixed.append(answer("copy", true, noise=noise, limits=limits, scheduler=everything())[0].now)
    assert answer("copy", true, noise=noise)[0].now < 1.05 * min(fixed)


@pytest.mark.parametrize("noise", [3.0, 4.0, 6.0])
@pytest.mark.parametrize("node_ms", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("switch_ms", [0.0, 16.0])
def test_a_poor_drafter_is_not_slower_than_plain_decoding(noise: float, node_ms: float, switch_ms: float) -> None:
    true = costs(node_ms=node_ms, switch_ms=switch_ms)
    assert answer("copy", true, noise=noise)[0].now < 1.03 * plain_seconds(true)


def everything() -> ScriptedPolicy:
    """Drafts as far as the limits go, and verifies all of it."""
    return ScriptedPolicy(draft=1.0, expand=1.0, whole=True)


def undrafted(scheduler: Scheduler, proposed: DraftTree) -> tuple[Plan, Choice]:
    """A round without the drafter, after 100 tokens."""
    forest = Forest((proposed,))
    plan = replace(scheduler.plan(100, 32, forest, 1), draft=False)
    return plan, scheduler.choose(plan, forest)


def test_the_text_is_that_of_plain_decoding() -> None:
    plain = answer("copy", costs(), limits=TreeLimits(width=1, depth=0, top_k=1, lookup=0))[2]
    for kind in ("copy", "hostile"):
        assert answer(kind, costs(), noise=3.0)[2] == plain


def test_what_is_verified_is_what_is_worth_most() -> None:
    """Against every number of nodes, best first."""
    rng = np.random.default_rng(2)
    for _ in range(50):
        parents = np.array([-1, *(int(rng.integers(0, node)) for node in range(1, 20))])
        logprobs = np.zeros(20, np.float32)
        for node in range(1, 20):
            logprobs[node] = logprobs[parents[node]] + np.log(rng.random() ** 2)
        tree = DraftTree(rng.integers(0, 9, 20), parents, logprobs)
        scheduler = Scheduler(costs(node_ms=float(rng.choice([0.1, 1.0, 5.0]))))
        choice = scheduler.choose(Plan(0, 1, WIDTHS, draft=True), Forest((tree,)))
        (found,) = choice.forest.trees
        best = np.cumsum(np.sort(np.exp(logprobs.astype(float)))[::-1])
        worth = {n: 20 * best[min(n, 20) - 1] - scheduler.costs.target.at(0, n) for n in WIDTHS}
        assert choice.width == max(worth, key=worth.__getitem__) and len(found) == min(choice.width, 20)
        assert found.expected_length == pytest.approx(best[min(len(found), 20) - 1], rel=1e-5)


def test_a_change_of_width_is_made_when_it_pays() -> None:
    """Changes are rarer the dearer they are, and decoding still gains; at once where one tree pays for it."""
    changes, seconds = [], []
    for switch_ms in (0.0, 15.0):
        true = costs(switch_ms=switch_ms)
        clock = answer("copy", true, noise=2.0)[0]
        changes.append(int(np.count_nonzero(np.diff(clock.nodes))))
        seconds.append(clock.now)
    assert changes[1] < changes[0] / 3
    assert seconds[1] < 1.15 * seconds[0] < plain_seconds(costs())


def test_few_widths_are_taken_where_changes_are_dear() -> None:
    for switch_ms, dear in ((0.0, False), (1.9, False), (2.1, True), (8.0, True)):  # a plain step takes 20 ms
        taken = {*answer("copy", costs(switch_ms=switch_ms), noise=1.0)[0].nodes}
        assert taken <= {*WIDTHS} and (taken <= {*FEW_WIDTHS}) == dear


def test_where_there_is_no_room_for_a_tree_nothing_is_drafted() -> None:
    dear = costs(switch_ms=8.0)
    least = FEW_WIDTHS[1]
    for scheduler, most, widest in (
        (Scheduler(dear), least - 1, 1), (Scheduler(dear), least, least), (Scheduler(costs()), 5, 4),
    ):  # fmt: skip
        assert scheduler.widest(100, most) == widest
        assert scheduler.plan(100, most, Forest((DraftTree.root(1),)), 1).draft == (widest > 1)


def test_where_nodes_are_free_it_verifies_all_and_where_they_are_dear_none() -> None:
    assert np.mean(answer("copy", costs(node_ms=1e-6), noise=3.0)[0].nodes) > 20
    assert np.mean(answer("copy", costs(node_ms=40.0), noise=3.0)[0].nodes[20:]) < 1.5


def test_a_wrong_curve_is_corrected_by_what_is_seen() -> None:
    """The drafter turns out ten times as slow as measured: it is used less, and decoding stays near plain."""
    true, believed = costs(call_ms=30.0), costs(call_ms=3.0)
    clock, _, _ = answer("copy", true, believed, noise=5.0)
    assert clock.now < 1.05 * plain_seconds(true)


def test_a_busy_machine_changes_no_decision() -> None:
    """Everything three times as slow: the same trees as on a quiet one, up to the first rounds."""
    quiet, busy = answer("copy", costs(), noise=3.0)[0], answer("copy", costs(), noise=3.0, slow=3.0)[0]
    assert np.mean(busy.nodes) == pytest.approx(np.mean(quiet.nodes), rel=0.15)
    assert busy.now == pytest.approx(3 * quiet.now, rel=0.1)


@pytest.mark.parametrize("stall", [0.5, 3.0, 60.0])
def test_a_machine_that_slept_drafts_again(stall: float) -> None:
    """The first call of the drafter takes seconds more, once: what it costs is learnt anew."""
    clock = answer("copy", costs(), tokens=3000, noise=1.0, stall=stall)[0]
    assert clock.now - stall < 1.1 * answer("copy", costs(), tokens=3000, noise=1.0)[0].now


@pytest.mark.parametrize(("noise", "slow"), [(3.0, 2.0), (1.5, 4.0)])
def test_a_machine_that_becomes_quiet_goes_on_drafting(noise: float, slow: float) -> None:
    """What rounds took is remembered in plain steps: twice the speed makes none of them look dear."""
    true = costs(switch_ms=8.0)
    busy, scheduler, _ = answer("copy", true, tokens=600, noise=noise, slow=slow)
    quiet = answer("copy", true, tokens=600, noise=noise, scheduler=scheduler)[0]
    assert slow * quiet.now < 1.05 * busy.now and quiet.now < 0.9 * plain_seconds(true, 600)


def test_what_was_left_in_the_long_run_is_come_back_to() -> None:
    true = costs(12.0, 0.9, 4.5, switch_ms=8.4)
    scheduler = Scheduler(true)
    for _ in range(8):
        answer("copy", true, noise=1.5, temperature=1.0, tokens=200, scheduler=scheduler, deaf=True)
    clocks = [answer("copy", true, sharpness=60.0, temperature=1.0, scheduler=scheduler)[0] for _ in range(5)]
    assert clocks[-1].now < 0.6 * plain_seconds(true)


def test_a_drafter_that_becomes_good_again_is_found_out() -> None:
    scheduler = answer("hostile", costs())[1]
    clock, _, _ = answer("copy", costs(), scheduler=scheduler, sharpness=60.0)
    assert clock.now < 0.6 * plain_seconds(costs())


@pytest.mark.parametrize("call_ms", [5.0, 7.0])
@pytest.mark.parametrize("noise", [1.0, 2.0, 3.0])
def test_an_answer_is_bounded_in_what_it_loses_whatever_those_before_it_gave(noise: float, call_ms: float) -> None:
    """Where going back to plain decoding costs more than a round of poor drafts, round after round loses a little."""
    scheduler = answer("copy", costs(12.0, 0.3, 1.0, switch_ms=8.4), tokens=300, noise=0.5)[1]
    true = scheduler.costs = scheduler.pace.costs = costs(12.0, 0.9, call_ms, switch_ms=8.4)
    clock, _, _ = answer("copy", true, tokens=1500, noise=noise, scheduler=scheduler)
    assert clock.now < 1.025 * plain_seconds(true, 1500)


def test_a_long_answer_that_lost_is_drafted_again_when_that_pays() -> None:
    true = costs(12.0, 0.9, 4.0, switch_ms=8.4)
    logits, clock = MarkovLogits(50, order=3, sharpness=3.0), Clock(true)
    poor, good = (TimedDrafter.copy_of(logits, noise) for noise in (3.0, 0.5))
    assert isinstance(poor, TimedDrafter)
    poor.clock = clock
    request = Request((1, 2, 3), 4000, limits=LIMITS, scheduler=Scheduler(true))
    seconds = list[float]()
    for step in decode(Sequence(TimedTarget(logits, clock), poor), request, Meter(clock=clock)):
        seconds += [clock.now] * len(step.tokens)
        if len(seconds) > 2000:
            poor._propose = good._propose
    assert seconds[1999] < 1.03 * plain_seconds(true, 2000)
    assert seconds[-1] - seconds[-1000] < 0.8 * plain_seconds(true, 1000)


def test_drafts_that_lose_a_little_in_every_answer_are_left_in_the_long_run() -> None:
    """Greedy answers gain, sampled ones lose less than a change costs: they are learned of apart."""
    true = costs(12.0, 0.9, 4.5, switch_ms=8.4)
    scheduler = answer("copy", true, noise=1.0)[1]
    for _ in range(6):
        answer("copy", true, noise=2.0, temperature=1.0, tokens=60, scheduler=scheduler)
    clock, _, _ = answer("copy", true, noise=2.0, temperature=1.0, tokens=60, scheduler=scheduler)
    assert clock.now < 1.03 * plain_seconds(true, 60)
    assert answer("copy", true, noise=1.0, scheduler=scheduler)[0].now < 0.95 * plain_seconds(true)


def test_repeats_are_left_while_they_do_not_come_true_and_found_out_when_they_do() -> None:
    """Their record is of rounds that had some, verified or not, however many others there were between."""
    true = costs(node_ms=1.5)
    scheduler, repeat = Scheduler(true), graft(DraftTree.root(1), [Repeat((2, 3, 4), (-0.1, -0.2, -0.3), (4, 0))], 4)
    scheduler.start(sampled=False)

    def run(proposed: DraftTree, tokens: list[int]) -> int:
        plan, choice = undrafted(scheduler, proposed)
        width = choice.width
        came = tokens if width > 1 else tokens[:1]
        scheduler.learn(Round(plan, choice, [None], [came], 0.0, true.target.at(100, width)))
        return width

    def widths_of(rounds: int, tokens: list[int]) -> list[int]:
        found = []
        for _ in range(rounds):
            found.append(run(repeat, tokens))
            assert [run(DraftTree.root(1), [9]) for _ in range(50)] == [1] * 50
        return found

    assert widths_of(100, [9])[20:].count(4) < 8
    assert widths_of(50, [2, 3, 4, 5])[-10:] == [4] * 10


@pytest.mark.parametrize("share", [0.0, 0.01, 0.05])
@pytest.mark.parametrize("kind", ["hostile", "copy"])
def test_drafts_lose_no_more_than_their_budget(kind: str, share: float) -> None:
    """Of 3,000 tokens in ten answers: the share of the time, the first allowance, and a round that goes beyond it."""
    true = costs(12.0, 0.9, 5.0, switch_ms=8.4)
    scheduler, seconds = Scheduler(true, max_slowdown=share), 0.0
    for _ in range(10):
        seconds += answer(kind, true, tokens=300, noise=4.0, scheduler=scheduler)[0].now
    lost = seconds / plain_seconds(true, 3000) - 1
    assert lost < share + (2 * START + OUTLIER) / 3000 + 0.001


def test_a_long_prompt_makes_no_later_draft_seem_slow() -> None:
    """The drafter reads 1,000 pairs in eight calls; its pace stays that of a call."""
    true = costs()
    scheduler, tree = (
        Scheduler(true),
        replace(DraftTree.chain(np.arange(4)), logprobs=np.linspace(0, -0.3, 4, dtype=np.float32)),
    )
    repeats = Forest((DraftTree.root(1),))
    for unread in (1000, 2):
        plan = replace(scheduler.plan(100, 12, repeats, unread), draft=True, together=1)
        growth = Growth(scheduler, plan)
        choice = scheduler.choose(plan, Forest((tree,)))
        read_ms = -(-unread // 128) * true.call_ms(100, min(unread, 128))
        passed_ms = true.target.at(100, choice.width)
        scheduler.learn(Round(plan, choice, [Draft(tree, growth)], [[0, 1]], read_ms, passed_ms))
        assert scheduler.pace.draft_pace == pytest.approx(1.0, abs=0.05)


def test_questions_change_nothing() -> None:
    """Each public question is asked twice at many points of an answer; what was learned stays as it was."""
    asked = 0

    class Curious(Scheduler):
        def learn(self, round: Round) -> None:
            nonlocal asked
            before, plan = deepcopy(self), round.plan
            offered = round.choice.offered
            assert offered is not None
            for question in (
                lambda: self.least(plan.context),
                lambda: self.widest(plan.context, 12),
                lambda: self.plan(plan.context, 12, offered, plan.unread),
                lambda: self.believe(plan, 1, np.log(np.array([[0.6, 0.3]], np.float32))).tolist(),
                lambda: self.worth_expanding(plan, 1, (-0.5, -1.0)),
                lambda: (lambda choice: (choice.width, choice.worth, choice.regret))(self.choose(plan, offered)),
            ):
                assert question() == question()
                asked += 1
            assert self == before
            super().learn(round)

    true = costs(switch_ms=8.0)
    answer("copy", true, noise=2.0, scheduler=Curious(true), tokens=150)
    assert asked > 100


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_a_depth_that_is_no_longer_drafted_returns_to_the_depth_above(share: float) -> None:
    known = Scheduler(costs())._known
    known.children[0] = Estimate(1.0, ABOVE)
    known.children[1] = Estimate(1.0, ABOVE)
    known.children[1].add(share)
    bad = known.share(1)
    for _ in range(300):
        known.children[0].add(0.9)
        known.fade(repeats=False)
    assert bad < 0.5 and known.share(1) > 0.85 and known.share(2) == known.share(1)


def test_the_policy_has_at_most_twelve_constants() -> None:
    named = [name for module in (choose, estimates, pace, policy) for name in vars(module) if name.isupper()]
    own = {name for name in named if name not in ("TYPE_CHECKING",)}
    assert len(own) <= 12, sorted(own)


PROMISE = tuple(float(np.log(0.7) + i * np.log(0.85)) for i in range(10))
REPEAT = graft(DraftTree.root(1), [Repeat(tuple(range(2, 12)), PROMISE, (4, 0))], 24)


def repeats_alone(
    often: float, first: float, later: float, seed: int, scheduler: Scheduler | None = None
) -> tuple[float, Scheduler]:
    """How many times as fast as plain decoding 3,000 tokens are with repeats alone, which promise more than they keep.

    often: probability of one after none.  first, later: that its first token comes true, and each one after it.
    """
    true, rng = costs(10.0, 0.2, switch_ms=7.0), np.random.default_rng(seed)
    scheduler, clock, tokens, going_on = scheduler or Scheduler(true), Clock(true), 0, False
    scheduler.start(sampled=True)
    while tokens < 3000:
        here = rng.random() < (0.5 if going_on else often)
        going_on = here and rng.random() < first
        found = 1 + going_on * min(int(rng.geometric(1 - later)), 10)
        plan, choice = undrafted(scheduler, REPEAT if here else DraftTree.root(1))
        begin, came = clock.now, list(range(2, 2 + found))[: choice.width]
        clock.verify(choice.width)
        scheduler.learn(Round(plan, choice, [None], [came], 0.0, (clock.now - begin) * 1e3))
        tokens += len(came)
    return (tokens * 10.0 + 7.0) / 1e3 / clock.now, scheduler


@pytest.mark.parametrize(("first", "later"), [(0.2, 0.6), (0.3, 0.6)])
def test_leaps_for_repeats_that_do_not_pay_for_the_way_back_become_rare(first: float, later: float) -> None:
    assert np.median([repeats_alone(0.1, first, later, seed)[0] for seed in range(5)]) > 0.987


def test_leaps_for_repeats_that_pay_are_made() -> None:
    for often, least in ((0.1, 1.5), (1.0, 2.8)):
        assert np.median([repeats_alone(often, 0.9, 0.9, seed)[0] for seed in range(5)]) > least


def test_leaps_are_made_again_when_they_pay() -> None:
    scheduler = repeats_alone(0.1, 0.2, 0.6, 0)[1]
    assert [repeats_alone(0.1, 0.9, 0.9, seed, scheduler)[0] for seed in range(3)][-1] > 1.4


def test_repeats_save_the_drafter_its_work() -> None:
    """Text in a loop: what repeats propose is as good, and free."""
    logits = MarkovLogits(3, order=1, sharpness=60.0)
    clock = Clock(costs())
    drafter = TimedDrafter.copy_of(logits)
    assert isinstance(drafter, TimedDrafter)
    drafter.clock = clock
    limits = TreeLimits(width=16, depth=6, top_k=2, lookup=12)
    request = Request((1, 2, 0), 300, limits=limits, scheduler=Scheduler(costs()))
    list(decode(Sequence(TimedTarget(logits, clock), drafter), request, Meter(clock=clock)))
    rounds = len(clock.nodes)
    assert sum(call == "propose" for call, _ in drafter.calls) < rounds / 2
    assert 300 / rounds > 8


def test_calibration_is_applied_before_anything_is_believed() -> None:
    from dovetail.runtime.policy.calibration import Calibration, DepthCalibration

    none = DepthCalibration(0.0, -3.0, 1, 0.0, 0.0, (0.0, 1.0), (1,), (0.5,), (0.05,))
    scheduler = Scheduler(costs(), Calibration(4, (none,)))
    believed = scheduler.believe(Plan(0, 1, WIDTHS, draft=True), 1, np.log(np.array([[0.9, 0.1]], np.float32)))
    assert np.exp(believed) == pytest.approx(1 / (1 + np.exp(3.0)), rel=1e-4)
