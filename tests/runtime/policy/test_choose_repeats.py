"""The scheduler with trees of repeated text alone, on a clock of its own."""

from __future__ import annotations

import numpy as np
import pytest
from tests.runtime.policy.timed import Clock, TimedDrafter, TimedTarget, costs, undrafted

from dovetail.runtime.loop.generate import decode
from dovetail.runtime.loop.metrics import Meter
from dovetail.runtime.loop.sequence import Request, Sequence
from dovetail.runtime.policy.choose import Scheduler
from dovetail.runtime.policy.policy import Round
from dovetail.runtime.testing.scripted import MarkovLogits
from dovetail.runtime.tree.draft_tree import DraftTree, graft
from dovetail.runtime.tree.limits import TreeLimits
from dovetail.runtime.tree.repeats import Repeat

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
