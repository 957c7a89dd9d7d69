"""Scripted sessions that take time by a cost table, and answers of theirs."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.drafter.session import DraftNoise
from dovetail.runtime.loop.generate import decode
from dovetail.runtime.loop.metrics import Meter
from dovetail.runtime.loop.sequence import Request, Sequence
from dovetail.runtime.policy.choose import Scheduler
from dovetail.runtime.policy.costs import Costs, Curve
from dovetail.runtime.policy.policy import Choice, Plan, Policy
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.system.arrays import FloatArray, TokenArray
from dovetail.runtime.target.session import TargetPass
from dovetail.runtime.testing.scripted import MarkovLogits, ScriptedDrafter, ScriptedTarget
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.forest import Forest
from dovetail.runtime.tree.growth import Judge
from dovetail.runtime.tree.limits import TreeLimits

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


def undrafted(scheduler: Scheduler, proposed: DraftTree) -> tuple[Plan, Choice]:
    """A round without the drafter, after 100 tokens."""
    forest = Forest((proposed,))
    plan = replace(scheduler.plan(100, 32, forest, 1), draft=False)
    return plan, scheduler.choose(plan, forest)
