"""The scheduler on scripted sessions with a clock of their own: the best tree, and never a loss to plain decoding."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
from tests.runtime.policy.timed import LIMITS, Clock, TimedDrafter, TimedTarget, answer, costs, plain_seconds, undrafted

from dovetail.runtime.loop.generate import decode
from dovetail.runtime.loop.metrics import Meter
from dovetail.runtime.loop.sequence import Request, Sequence
from dovetail.runtime.policy import choose, estimates, pace, policy
from dovetail.runtime.policy.choose import FEW_WIDTHS, STEEP_WIDTHS, WIDTHS, Scheduler, widths
from dovetail.runtime.policy.costs import Costs, Curve
from dovetail.runtime.policy.estimates import ABOVE, START, Estimate
from dovetail.runtime.policy.pace import OUTLIER
from dovetail.runtime.policy.policy import Draft, Growth, Plan, Round
from dovetail.runtime.testing.policy import ScriptedPolicy
from dovetail.runtime.testing.scripted import MarkovLogits
from dovetail.runtime.tree.draft_tree import DraftTree, graft
from dovetail.runtime.tree.forest import Forest
from dovetail.runtime.tree.limits import TreeLimits
from dovetail.runtime.tree.repeats import Repeat


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
    assert answer("copy", true, noise=noise)[0].now < 1.05 * min(fixed_seconds(true, noise))


def fixed_seconds(true: Costs, noise: float) -> list[float]:
    """The seconds of the same answer with each of a grid of fixed trees."""
    shapes = (1, 0), (2, 1), (3, 2), (4, 3), (6, 4), (8, 3), (10, 5), (16, 6), (24, 8)
    limits = [TreeLimits(width=width, depth=depth, top_k=3, lookup=0) for width, depth in shapes]
    return [answer("copy", true, noise=noise, limits=each, scheduler=everything())[0].now for each in limits]


@pytest.mark.parametrize("noise", [3.0, 4.0, 6.0])
@pytest.mark.parametrize("node_ms", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("switch_ms", [0.0, 16.0])
def test_a_poor_drafter_is_not_slower_than_plain_decoding(noise: float, node_ms: float, switch_ms: float) -> None:
    true = costs(node_ms=node_ms, switch_ms=switch_ms)
    assert answer("copy", true, noise=noise)[0].now < 1.03 * plain_seconds(true)


def everything() -> ScriptedPolicy:
    """Drafts as far as the limits go, and verifies all of it."""
    return ScriptedPolicy(draft=1.0, expand=1.0, whole=True)


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


def mixture(switch_ms: float) -> Costs:
    """Eight of 64 experts for each token, as docs/results/moe.md measured them."""
    rows = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    ms = (8.0, 10.9, 14.8, 17.7, 24.8, 30.3, 40.7, 54.4, 69.7, 89.0)
    return replace(costs(call_ms=0.8, row_ms=0.05, switch_ms=switch_ms), target=Curve((0, 4096), rows, (ms, ms)))


@pytest.mark.parametrize("noise", [0.2, 0.6])
def test_drafts_of_few_nodes_pay_where_each_node_reads_experts_of_its_own(noise: float) -> None:
    """The scheduler, which has yet to learn, against the best of a grid of fixed trees on the same text and clock."""
    true = mixture(switch_ms=2.8)
    clock = answer("copy", true, noise=noise)[0]
    assert {*clock.nodes} <= {*STEEP_WIDTHS} and clock.now < 0.95 * plain_seconds(true)
    assert clock.now < 1.1 * min(fixed_seconds(true, noise))


def test_few_nodes_are_taken_where_nodes_are_slow() -> None:
    for node_ms, steep in ((0.5, False), (5.9, False), (6.1, True), (20.0, True)):  # a plain step takes 20 ms
        for switch_ms, others in ((0.0, WIDTHS), (4.0, FEW_WIDTHS)):
            assert widths(costs(node_ms=node_ms, switch_ms=switch_ms), 100) == (STEEP_WIDTHS if steep else others)


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
        assert scheduler.pace.draft_ms(100, 1) == pytest.approx(true.call_ms(100, 1), rel=0.05)


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
                lambda: (lambda choice: (choice.width, choice.regret))(self.choose(plan, offered)),
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


def test_the_policy_has_at_most_fourteen_constants() -> None:
    named = [name for module in (choose, estimates, pace, policy) for name in vars(module) if name.isupper()]
    own = {name for name in named if name not in ("TYPE_CHECKING",)}
    assert len(own) <= 14, sorted(own)


def test_calibration_is_applied_before_anything_is_believed() -> None:
    from dovetail.runtime.policy.calibration import Calibration, DepthCalibration

    none = DepthCalibration(0.0, -3.0, 1, 0.0, 0.0, (0.0, 1.0), (1,), (0.5,), (0.05,))
    scheduler = Scheduler(costs(), Calibration(4, (none,)))
    believed = scheduler.believe(Plan(0, 1, WIDTHS, draft=True), 1, np.log(np.array([[0.9, 0.1]], np.float32)))
    assert np.exp(believed) == pytest.approx(1 / (1 + np.exp(3.0)), rel=1e-4)
