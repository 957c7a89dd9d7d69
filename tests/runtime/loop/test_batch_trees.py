"""Texts with trees in one pass: each is what it is alone, with shared prefixes, little memory, cancelled requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import log
from typing import Any

import numpy as np
import pytest

from dovetail.runtime.drafter.session import Ask, Moved
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.loop.batch import PROMPT_TOKENS, SHARED_TOKENS, SequenceBatch, Ticket
from dovetail.runtime.loop.sequence import Request
from dovetail.runtime.policy.choose import BOUNDS, Scheduler
from dovetail.runtime.policy.costs import Costs, Curve
from dovetail.runtime.policy.policy import Choice, Plan, Policy, Round
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.target.session import NO_PROMPTS
from dovetail.runtime.testing.policy import ScriptedPolicy
from dovetail.runtime.testing.scripted import MarkovLogits, ScriptedDrafter, ScriptedTarget
from dovetail.runtime.tree.draft_tree import DraftTree, graft
from dovetail.runtime.tree.forest import Forest
from dovetail.runtime.tree.limits import TreeLimits
from dovetail.runtime.tree.repeats import Repeat

VOCAB = 9
LOGITS = MarkovLogits(VOCAB, sharpness=3.0)
STOP = frozenset({8})
SYSTEM = tuple(int(token) for token in np.random.default_rng(5).integers(0, VOCAB - 1, 300))
LIMITS = TreeLimits(width=12, depth=4, top_k=3, lookup=6)


def costs(plain_ms: float = 20.0, node_ms: float = 0.5, call_ms: float = 1.5, switch_ms: float = 0.0) -> Costs:
    target = Curve((0, 4096), (1, 64), ((plain_ms, plain_ms + 63 * node_ms),) * 2)
    draft = Curve((0, 4096), (1, 128), ((call_ms, call_ms + 12.0),) * 2)
    return Costs(target, draft, switch_ms)


def requests(count: int, policy: Policy | None, seed: int = 0) -> list[Request]:
    """Half begin with a part of one long text, half are sampled; some are plain, some have trees of fixed limits."""
    rng, made = np.random.default_rng(seed), list[Request]()
    for index in range(count):
        begin = SYSTEM[: int(rng.integers(0, 300))] if rng.random() < 0.5 else ()
        prompt = (*begin, *(int(token) for token in rng.integers(0, VOCAB - 1, rng.integers(1, 40))))
        sampling = SamplingParams(temperature=float(index % 2), seed=index)
        limits, scheduler = [(None, None), (LIMITS, None), (LIMITS, policy), (LIMITS, policy)][int(rng.integers(4))]
        made.append(Request(prompt, int(rng.integers(1, 60)), sampling, STOP, limits, scheduler))
    return made


def alone(request: Request) -> tuple[int, ...]:
    """The answer, one token after the other, without sessions; the stop token included."""
    sampler, text = Sampler(request.sampling), request.prompt
    while len(text) < len(request.prompt) + request.max_new_tokens:
        text += (sampler.pick(LOGITS(text), len(text), text),)
        if text[-1] in request.stop_tokens:
            break
    return text[len(request.prompt) :]


def policies() -> dict[str, Policy | None]:
    return {"none": None, "chance": ScriptedPolicy(3, plain=0.2), "costs": Scheduler(costs(), plain_rows=2)}


def drafters(kind: str) -> ScriptedDrafter | None:
    if kind == "none":
        return None
    if kind == "small":
        return ScriptedDrafter(ScriptedDrafter.copy_of(LOGITS, 1.0)._propose, capacity=48)
    return ScriptedDrafter.copy_of(LOGITS, 0.5) if kind == "good" else ScriptedDrafter.hostile_to(LOGITS)


@pytest.mark.parametrize("policy", policies())
@pytest.mark.parametrize("drafter", ["good", "small", "hostile", "none"])
@pytest.mark.parametrize("memory", [1 << 30, 700])
@pytest.mark.parametrize("share", [True, False])
def test_each_text_is_what_it_is_alone(policy: str, drafter: str, memory: int, share: bool) -> None:
    chosen, target = policies()[policy], ScriptedTarget(LOGITS, max_context=400, memory=memory)
    batch = SequenceBatch(target, 5, drafters(drafter), chosen, share_prefixes=share)
    tickets = [batch.add(request) for request in requests(40, chosen)]
    answers: dict[Ticket, list[int]] = {ticket: [] for ticket in tickets}
    ended = set[Ticket]()
    while len(ended) < 40:
        for advance in batch.step():
            ticket, step = advance.ticket, advance.step
            assert ticket not in ended
            answers[ticket] += [*step.tokens, *([] if step.stop is None else [step.stop])]
            if step.finish:
                ended.add(ticket)
    for ticket in tickets:
        assert tuple(answers[ticket]) == alone(ticket.request)
        metrics = ticket.meter.metrics()
        assert metrics.new_tokens == len([token for token in answers[ticket] if token not in STOP])
        assert metrics.prompt_tokens == len(ticket.request.prompt) > metrics.cached_tokens
    assert batch.step() == []
    batch.clear()
    assert not target.texts


@pytest.mark.parametrize("seed", range(4))
def test_requests_that_leave_change_no_other_text_and_free_their_kv(seed: int) -> None:
    rng, target = np.random.default_rng(seed), ScriptedTarget(LOGITS, max_context=400)
    policy = Scheduler(costs(), plain_rows=2)
    batch = SequenceBatch(target, 4, drafters("good"), policy)
    coming = requests(40, policy, seed)
    answers, left, ended = dict[Ticket, list[int]](), set[Ticket](), set[Ticket]()
    while coming or batch.running or batch.waiting:
        if coming and rng.random() < 0.5:
            answers[batch.add(coming.pop())] = []
        if answers and rng.random() < 0.1:
            ticket = [*answers][int(rng.integers(len(answers)))]
            batch.cancel(ticket)
            left.add(ticket)
            assert ticket.sequence is None
        for advance in batch.step():
            assert advance.ticket not in left
            answers[advance.ticket] += [
                *advance.step.tokens,
                *([] if advance.step.stop is None else [advance.step.stop]),
            ]
            if advance.step.finish:
                ended.add(advance.ticket)
        assert len(target.texts) == len(batch.running) + sum(ticket.sequence is not None for ticket in batch.waiting)
    assert len(ended | left) == 40 and len(left) > 2
    for ticket in ended:
        assert tuple(answers[ticket]) == alone(ticket.request)
    assert not target.texts


@pytest.mark.parametrize("at", [1, 4, 9, 30])
@pytest.mark.parametrize("kind", ["alone", "together"])
def test_a_drafter_that_moves_to_another_device_drafts_every_text_again(at: int, kind: str) -> None:
    """The move loses the pairs of all texts, also of those that the failing call was not for."""
    target = ScriptedTarget(LOGITS)
    made = (Moving if kind == "alone" else MovingTogether).copy_of(LOGITS, 0.5)
    assert isinstance(made, Moving)
    made.left = at
    batch, asked = SequenceBatch(target, 4, made), requests(12, None)
    answers: dict[Ticket, list[int]] = {batch.add(replace(request, limits=LIMITS)): [] for request in asked}
    while batch.running or batch.waiting:
        for advance in batch.step():
            stop = advance.step.stop
            answers[advance.ticket] += [*advance.step.tokens, *([] if stop is None else [stop])]
        for ticket in batch.running:
            assert ticket.sequence and ticket.sequence.window
            held = made.length(ticket.sequence.id)
            assert held in (0, ticket.sequence.window.length)  # 0 until its next draft
    assert made.left < 0
    for ticket, tokens in answers.items():
        assert tuple(tokens) == alone(ticket.request)
    assert sum(ticket.meter.metrics().accepted for ticket in answers) > 20


class Moving(ScriptedDrafter):
    """Fails in one call, and holds nothing afterwards."""

    left = 0

    def extend(self, seq: int, *pairs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.texts.clear()
            raise Moved("the drafter moved")
        super().extend(seq, *pairs)


class MovingTogether(Moving):
    def extend_all(self, pairs: Mapping[int, tuple[Any, Any]]) -> None:
        for seq, each in pairs.items():
            self.extend(seq, *each)

    def propose_all(self, asks: Mapping[int, Ask]) -> dict[int, DraftTree]:
        return {seq: self.propose(seq, *ask) for seq, ask in asks.items()}


def test_a_prefix_that_many_share_is_read_once() -> None:
    target = ScriptedTarget(LOGITS)
    batch = SequenceBatch(target, 8, share_prefixes=True)
    asked = [Request((*SYSTEM, index), 5) for index in range(7)]
    list(batch.run(asked))
    read = sum(count for call, count in target.calls if call == "verify")
    assert read < len(SYSTEM) + 7 * 64 + 7 * 6
    without = ScriptedTarget(LOGITS)
    list(SequenceBatch(without, 8).run(asked))
    assert sum(count for call, count in without.calls if call == "verify") > 7 * len(SYSTEM)


def test_the_next_turn_of_a_conversation_reads_the_last_answer_and_its_new_words() -> None:
    """Answers have the bits of trees: as a prompt they are read again, and then kept."""
    target = ScriptedTarget(LOGITS)
    batch = SequenceBatch(target, 2, drafters("good"), share_prefixes=True)
    text, cached = [*SYSTEM[:200]], list[int]()
    for _ in range(3):
        ticket = batch.add(Request((*text, 1, 2, 3), 40, limits=LIMITS))
        text = [*ticket.request.prompt, *(token for advance in _all(batch) for token in advance.step.tokens)]
        cached.append(ticket.meter.cached_tokens)
    assert cached == [0, 203, 246]
    assert len(batch.prefixes.kept) == 1  # the longer text takes the place of its prefix


def test_an_equal_text_takes_the_place_of_the_kept_one() -> None:
    target = ScriptedTarget(LOGITS)
    batch = SequenceBatch(target, 2, share_prefixes=True)
    for _ in range(4):
        batch.add(Request(SYSTEM[:100], 20, stop_tokens=frozenset()))
        _all(batch)
    assert len(batch.prefixes.kept) == 1 and sum(map(len, target.texts.values())) == 100


def test_prompts_are_read_in_parts_so_that_no_answer_waits_long() -> None:
    target = ScriptedTarget(LOGITS)
    batch = SequenceBatch(target, 4)
    writing = batch.add(Request((1, 2), 60))
    batch.step()
    long = batch.add(Request(SYSTEM * 4, 1))
    short = batch.add(Request(SYSTEM[:20], 1))
    seen = list[set[Ticket]]()
    while batch.running:
        seen.append({advance.ticket for advance in batch.step() if advance.step.tokens})
        assert target.calls[-1][0] != "prefill"
    sizes = [count for call, count in target.calls if call == "verify"]
    assert max(sizes) <= SHARED_TOKENS + 1 < PROMPT_TOKENS
    first = next(index for index, tickets in enumerate(seen) if short in tickets)
    last = next(index for index, tickets in enumerate(seen) if long in tickets)
    assert first == 0 and last > 10  # the short prompt does not wait for the long one
    assert all(writing in tickets for tickets in seen[:last])  # a token in every round


def test_the_oldest_texts_keep_their_memory() -> None:
    target = ScriptedTarget(LOGITS, max_context=400, memory=600)
    batch = SequenceBatch(target, 4)
    tickets = [batch.add(Request(SYSTEM[: 100 + index], 200, stop_tokens=frozenset())) for index in range(4)]
    ended = [advance.ticket for advance in _all(batch) if advance.step.finish]
    assert ended[0] is tickets[0] and {*ended} == {*tickets}


def test_a_text_that_exceeds_the_memory_alone_is_an_error() -> None:
    target = ScriptedTarget(LOGITS, max_context=400, memory=100)
    batch = SequenceBatch(target, 2)
    batch.add(Request(SYSTEM[:200], 5))
    with pytest.raises(DeviceError):
        _all(batch)
    batch.clear()
    assert not target.texts


# Costs of nodes, and gains over plain decoding with 1, 2, 4 and 8 texts.
GAINS = {("copy", 0.1): (2.5, 2.0, 1.5, 1.15), ("copy", 30.0): (0.97,) * 4, ("hostile", 0.5): (0.97,) * 4}


@pytest.mark.parametrize("texts", [1, 2, 4, 8])
@pytest.mark.parametrize(("kind", "node_ms"), GAINS)
def test_drafts_of_many_texts_pay_where_rows_are_cheap(texts: int, kind: str, node_ms: float) -> None:
    table = costs(node_ms=node_ms)
    assert gain(texts, kind, table, table) > GAINS[kind, node_ms][texts.bit_length() - 1]


@pytest.mark.parametrize("texts", [2, 4, 8])
@pytest.mark.parametrize(("kind", "node_ms"), [("copy", 30.0), ("hostile", 5.0)])
def test_a_wrong_table_of_costs_makes_no_load_slower(texts: int, kind: str, node_ms: float) -> None:
    """The table was measured on a busy machine: rows seem to cost nothing."""
    assert gain(texts, kind, costs(node_ms=node_ms), costs(plain_ms=400.0, node_ms=0.1, call_ms=10.0)) > 0.95


@pytest.mark.parametrize(("texts", "node_ms"), [(2, 5.0), (4, 2.0)])
def test_a_busy_moment_at_first_makes_no_load_slower(texts: int, node_ms: float) -> None:
    """The first passes, which are plain, take three times as long as later ones."""
    table = costs(node_ms=node_ms)
    assert gain(texts, "some", table, table, busy=3) > 0.97


@pytest.mark.parametrize("texts", [2, 4, 8])
@pytest.mark.parametrize("kind", ["hostile", "some"])
def test_texts_that_come_and_go_make_no_load_slower(texts: int, kind: str) -> None:
    """Many passes also read a prompt, so that their times do not tell what drafts cost."""
    table = costs(plain_ms=13.0, node_ms=2.0, switch_ms=8.0)
    assert gain(texts, kind, table, table, requests=12 * texts) > 0.97


@pytest.mark.parametrize(("texts", "call_ms"), [(2, 4.0), (4, 4.0), (8, 1.5)])
def test_the_prompts_of_others_are_no_reason_to_draft(texts: int, call_ms: float) -> None:
    """After a pass that read a prompt plain decoding changes the width as well: no choice is cheaper for that."""
    table = costs(plain_ms=13.0, node_ms=2.0, call_ms=call_ms, switch_ms=8.0)
    least = {2: 0.982, 4: 0.987, 8: 0.992}[texts]
    assert gain(texts, "hostile", table, table, requests=12 * texts) > least


@pytest.mark.parametrize(("texts", "drafts"), [(1, True), (4, False)])
def test_only_one_text_goes_on_drafting_in_debt(texts: int, drafts: bool) -> None:
    """Drafts that have paid so far, after a budget that is spent."""
    scheduler = Scheduler(costs())
    scheduler.start(sampled=False, texts=texts)
    roots = Forest((DraftTree.root(1),) * texts)
    for _ in range(2):
        passed_ms = scheduler.costs.target.at(100, texts)
        plan = Plan(100, 0, (texts,), texts=texts)
        scheduler.learn(Round(plan, scheduler.choose(plan, roots), (None,) * texts, [[1]] * texts, 0.1, passed_ms))
    scheduler._known.tokens.add(4.0, 20.0)
    assert scheduler.plan(100, 8 * texts, roots, texts).draft
    scheduler._known.budget.balance = -0.1
    assert scheduler.plan(100, 8 * texts, roots, texts).draft == drafts
    assert (scheduler.least(100) > 1.0) == (not drafts)


@pytest.mark.parametrize("texts", [2, 4, 16])
def test_the_least_probability_is_where_repeats_begin_to_pay(texts: int) -> None:
    scheduler = Scheduler(costs(plain_ms=13.0, node_ms=2.0, switch_ms=0.0))
    scheduler.start(sampled=False, texts=texts)
    for _ in range(2):  # plain passes, whose time the scheduler has to know
        plain = Plan(100, 0, (texts,), texts=texts)
        roots = Forest((DraftTree.root(1),) * texts)
        passed_ms = scheduler.costs.target.at(100, texts)
        scheduler.learn(Round(plain, scheduler.choose(plain, roots), (None,) * texts, [[1]] * texts, 0.1, passed_ms))
    least = scheduler.least(100)
    assert 0.0 < least <= 1.0
    for probability, pays in ((0.98 * least, False), (min(1.02 * least, 1.0), least < 1.0)):
        repeat = Repeat((5,), (log(probability),), (16, 0))
        forest = Forest((graft(DraftTree.root(1), [repeat], 2),) * texts)
        choice = scheduler.choose(scheduler.plan(100, 2 * texts, forest, 0), forest)
        assert (choice.width > texts) == pays


@pytest.mark.parametrize("switch_ms", [0.0, 8.0])
@pytest.mark.parametrize("node_ms", [0.5, 2.0])
@pytest.mark.parametrize("kind", ["hostile", "some"])
def test_a_look_at_repeated_text_would_have_changed_nothing(kind: str, node_ms: float, switch_ms: float) -> None:
    """A scheduler that looks in all rounds decodes those plainly that would not have looked."""
    unlooked = 0

    class Looking(Scheduler):
        plainly = False

        def least(self, context: int) -> float:
            self.plainly = (least := super().least(context)) > 1.0
            return 0.0 if self.plainly else least

        def plan(self, *arguments: Any) -> Plan:
            plan = super().plan(*arguments)
            assert not (self.plainly and plan.draft)
            return plan

        def choose(self, plan: Plan, forest: Forest) -> Choice:
            nonlocal unlooked
            choice = super().choose(plan, forest)
            unlooked += self.plainly
            assert not self.plainly or choice.width == plan.texts == len(choice.forest)
            return choice

    table = costs(plain_ms=13.0, node_ms=node_ms, switch_ms=switch_ms)
    gain(4, kind, table, table, requests=24, policy=Looking, lookup=8)
    assert unlooked > 50


def gain(
    texts: int,
    kind: str,
    table: Costs,
    believed: Costs,
    *,
    busy: int = 0,
    requests: int = 0,
    policy: type[Scheduler] = Scheduler,
    lookup: int = 0,
) -> float:
    """Return how many times as fast as plain decoding.

    table: of passes and calls. believed: the policy's. busy: the first passes, which take three times as long.
    requests: short answers to long prompts, one after the other in `texts` slots; 0 for one long answer in each slot.
    """
    seconds = []
    for limits in (replace(BOUNDS, lookup=lookup), None):
        now = [0.0]
        target = Timed(MarkovLogits(VOCAB, sharpness=40.0), table, now)
        target.busy = busy
        if kind == "hostile":
            drafter = TimedDrafter.hostile_to(target.logits_of)
        else:
            drafter = TimedDrafter.copy_of(target.logits_of, noise=4.0 if kind == "some" else 0.0)
        assert isinstance(drafter, TimedDrafter)
        drafter.table, drafter.now = table, now
        scheduler = policy(believed)
        batch = SequenceBatch(target, texts, drafter, scheduler, clock=partial(now.__getitem__, 0))
        for index in range(requests or texts):
            prompt = (*SYSTEM[: 60 + 7 * index % 100], 1, index % 7) if requests else (1, index)
            length = 40 + 17 * index % 50 if requests else 400  # equal lengths would end all at once
            batch.add(Request(prompt, length, limits=limits, scheduler=scheduler))
        _all(batch)
        seconds.append(now[0])
    return seconds[1] / seconds[0]


class Timed(ScriptedTarget):
    def __init__(self, logits: Any, table: Costs, now: list[float]) -> None:
        super().__init__(logits)
        self.table, self.now, self.busy, self.last = table, now, 0, 0  # last: rows of the last pass

    def verify(self, offers: Any, prompts: Any = NO_PROMPTS, *, rows: int = 0) -> Any:
        count = max(rows, sum(map(len, offers.values()))) + sum(map(len, prompts.values()))
        ms = self.table.target.at(0, count) + (count != self.last) * self.table.switch_ms
        self.last = count
        self.now[0] += (3 if self.busy > 0 else 1) * ms / 1e3
        self.busy -= 1
        return super().verify(offers, prompts, rows=rows)


class TimedDrafter(ScriptedDrafter):
    table: Costs
    now: list[float]

    def extend(self, seq: int, tokens: Any, *rest: Any) -> None:
        self.now[0] += self.table.call_ms(0, len(tokens)) / 1e3
        super().extend(seq, tokens, *rest)

    def propose(self, seq: int, limits: TreeLimits, judge: Any = None, noise: Any = None) -> Any:
        outer = self

        class Counted:
            def believe(self, depth: int, logprobs: Any) -> Any:
                return judge.believe(depth, logprobs)

            def pays(self, depth: int, frontier: Any) -> bool:
                if not judge.pays(depth, frontier):
                    return False
                outer.now[0] += outer.table.call_ms(0, len(frontier)) / 1e3
                return True

        return super().propose(seq, limits, Counted(), noise)


def _all(batch: SequenceBatch) -> list[Any]:
    advances = []
    while batch.running or batch.waiting:
        advances += batch.step()
    return advances
