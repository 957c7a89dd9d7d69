"""The loop under a grammar: the target's own text among the allowed ones, the same with any draft."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runtime.loop.constrained import DRAFTERS, LIMITS, autoregressive, run

from dovetail.runtime.errors import DovetailError, InputError
from dovetail.runtime.loop.batch import SequenceBatch
from dovetail.runtime.loop.constrain import constrained
from dovetail.runtime.loop.generate import decode
from dovetail.runtime.loop.metrics import Meter
from dovetail.runtime.loop.sequence import Request, Sequence
from dovetail.runtime.policy.choose import BOUNDS, Scheduler
from dovetail.runtime.policy.costs import Costs, Curve
from dovetail.runtime.policy.policy import Plan
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.testing.constraint import ScriptedConstraint
from dovetail.runtime.testing.policy import ScriptedPolicy
from dovetail.runtime.testing.scripted import MarkovLogits, ScriptedDrafter, ScriptedTarget
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.forest import Forest
from dovetail.runtime.tree.limits import TreeLimits

VOCAB, STOP = 7, 6
GREEDY = SamplingParams()
HOT = SamplingParams(
    temperature=1.0, top_p=0.95, repetition_penalty=1.2, presence_penalty=0.5, logit_bias={2: 1.5}, seed=11
)


def rule(seed: int, length: int) -> Callable[[tuple[int, ...]], list[int]]:
    """A random grammar: 1 to 5 tokens may follow the last two, and a text has at most `length`."""

    def allowed(text: tuple[int, ...]) -> list[int]:
        if len(text) >= length:
            return []
        rng = np.random.default_rng([seed, len(text) % 3, *text[-2:]])
        found: list[int] = rng.choice(VOCAB, int(rng.integers(1, 6)), replace=False).tolist()
        return found

    return allowed


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 30),
    drafter=st.sampled_from(sorted(DRAFTERS)),
    limits=st.none()
    | st.builds(TreeLimits, st.integers(1, 20), st.integers(0, 7), st.integers(1, 7), st.integers(0, 9)),
    sampling=st.sampled_from([GREEDY, replace(GREEDY, frequency_penalty=0.7), HOT]),
    max_new_tokens=st.integers(1, 30),
    scheduled=st.booleans(),
)
def test_a_draft_changes_no_token(
    seed: int,
    length: int,
    drafter: str,
    limits: TreeLimits | None,
    sampling: SamplingParams,
    max_new_tokens: int,
    scheduled: bool,
) -> None:
    logits = MarkovLogits(VOCAB, seed)
    request = Request(
        (1, 2, 3), max_new_tokens, sampling, frozenset({STOP}), limits,
        ScriptedPolicy(seed) if scheduled and limits else None,
        ScriptedConstraint(rule(seed, length), {STOP}), logprobs=2,
    )  # fmt: skip
    tokens, finish, _ = run(ScriptedTarget(logits), DRAFTERS[drafter](logits), request)
    assert (tokens, finish) == autoregressive(logits, request)


@pytest.mark.parametrize("memory", [1 << 30, 220])
@pytest.mark.parametrize("drafter", ["none", "noisy"])
def test_a_batch_follows_the_grammar_of_each_request(
    drafter: str, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, policy, dropped = MarkovLogits(VOCAB, 4), ScriptedPolicy(2), list[Sequence]()
    drop = Sequence.drop

    def counted(text: Sequence) -> None:
        dropped.append(text)
        drop(text)

    monkeypatch.setattr(Sequence, "drop", counted)
    requests = [
        Request(
            (1, 2) * seed, 40, GREEDY if seed % 2 else HOT, frozenset({STOP}) if seed > 7 else frozenset(), LIMITS,
            policy if seed % 3 else None, ScriptedConstraint(rule(seed, 35), {STOP} if seed > 7 else ()), logprobs=1,
        )
        for seed in range(1, 9)
    ]  # fmt: skip
    target = ScriptedTarget(logits, max_context=100, memory=memory)
    found: dict[Request, tuple[int, ...]] = {}
    for advance in SequenceBatch(target, 5, DRAFTERS[drafter](logits), policy).run(requests):
        request, step = advance.ticket.request, advance.step
        found[request] = found.get(request, ()) + step.tokens
        assert tuple(each.token_id for each in step.logprobs) == step.tokens
    assert [found[request] for request in requests] == [autoregressive(logits, request)[0] for request in requests]
    assert bool(dropped) == (memory == 220)  # these texts lost their KV in the middle, and went on


def test_forced_tokens_are_drafted_without_a_drafter_and_without_repeats() -> None:
    forced = ScriptedConstraint(lambda text: [[3], [4], [5], [0], [1, 2], []][min(len(text), 5)])
    logits = MarkovLogits(VOCAB, 1)
    for top_k in (1, 3):
        request = Request((1, 2), 20, limits=TreeLimits(8, 4, top_k, lookup=0), constraint=forced)
        tokens, finish, metrics = run(ScriptedTarget(logits), None, request)
        assert (tokens, finish) == autoregressive(logits, request)
        assert tokens[:4] == (3, 4, 5, 0) and finish == "stop" and (metrics.rounds, metrics.accepted) == (1, 3)


def test_the_scheduler_takes_forced_tokens_for_certain() -> None:
    class Recording(ScriptedPolicy):
        seen: list[DraftTree]

        def plan(self, context: int, most: int, repeats: Forest, unread: int) -> Plan:
            self.seen = [*getattr(self, "seen", []), *repeats.trees]
            return super().plan(context, most, repeats, unread)

    policy = Recording(draft=0.0, whole=True)
    forced = ScriptedConstraint(lambda text: [0] if len(text) < 9 else [])
    request = Request((1, 2), 20, limits=TreeLimits(6, 4, 3, lookup=0), scheduler=policy, constraint=forced)
    _, _, metrics = run(ScriptedTarget(MarkovLogits(VOCAB)), None, request)
    assert policy.seen[0].tokens.tolist() == [0] * 6 and policy.seen[0].expected_length == 6
    assert metrics.rounds == 2

    flat = Curve((0,), (1, 32), ((1.0, 1.1),))
    scheduled = replace(request, limits=BOUNDS, scheduler=Scheduler(Costs(flat, None)))
    assert run(ScriptedTarget(MarkovLogits(VOCAB)), None, scheduled)[2].rounds < 8


def test_refused_nodes_leave_a_tree_with_all_below_them() -> None:
    # 0 -> 1 -> 2 -> 3 and 0 -> 1 -> 4, 0 -> 5 -> 2: the grammar refuses a 2 after 1 and a 5 at first.
    tree = DraftTree(np.array([0, 1, 2, 3, 4, 5, 2]), np.array([-1, 0, 1, 2, 1, 0, 5]), -np.arange(7, dtype=np.float32))
    matcher = ScriptedConstraint(lambda text: [1, 2] if not text else [4, 5] if text == (1,) else [2, 3]).begin()
    kept = constrained(tree, matcher, 9)
    assert (kept.tokens.tolist(), kept.parents.tolist(), kept.logprobs.tolist()) == ([0, 1, 4], [-1, 0, 1], [0, -1, -4])
    assert matcher.text == ()
    assert constrained(tree, matcher, 2).tokens.tolist() == [0, 1]


def test_forced_tokens_join_below_any_node_and_are_certain_there() -> None:
    # After 1 come 2 and 3 alone, then one of two. After 4 comes 5 alone, which ends the text.
    def rule(text: tuple[int, ...]) -> list[int]:
        return {(): [1, 4, 6], (1,): [2], (1, 2): [3], (4,): [5], (4, 5): []}.get(text, [0, 6])

    tree = DraftTree(
        np.array([0, 1, 2, 3, 6, 4, 6]), np.array([-1, 0, 1, 2, 3, 0, 1]),
        np.array([0, -1, -1.5, -1.75, -2, -3, -4], np.float32),
    )  # fmt: skip
    matcher = ScriptedConstraint(rule).begin()
    found = constrained(tree, matcher, 9)
    assert found.tokens.tolist() == [0, 1, 2, 3, 6, 4, 5]
    assert found.parents.tolist() == [-1, 0, 1, 2, 3, 0, 5]
    assert found.logprobs.tolist() == [0, -1, -1, -1, -1.25, -3, -3]
    assert constrained(tree, matcher, 4).tokens.tolist() == [0, 1, 2, 3]
    endless = ScriptedConstraint(lambda text: [2]).begin()
    assert constrained(DraftTree.root(7), endless, 6).tokens.tolist() == [7, 2, 2, 2, 2, 2]
    assert constrained(DraftTree.root(7), endless, 6, deepest=3).tokens.tolist() == [7, 2, 2, 2]
    assert matcher.text == endless.text == ()


def test_a_complete_answer_within_the_room_ends_with_stop() -> None:
    logits = MarkovLogits(VOCAB)
    for count, finish in ((4, "length"), (5, "stop"), (6, "stop")):
        request = Request((1,), count, limits=LIMITS, constraint=ScriptedConstraint(rule(1, 5)))
        tokens, found, _ = run(ScriptedTarget(logits), ScriptedDrafter.copy_of(logits), request)
        assert (len(tokens), found) == (min(count, 5), finish)


def test_an_answer_that_is_complete_past_its_room_ends_with_length() -> None:
    logits, forced = MarkovLogits(VOCAB), ScriptedConstraint(lambda text: [3] if len(text) < 9 else [])
    request = Request((1,), 5, limits=TreeLimits(12, 4, 3), constraint=forced)
    tokens, finish, metrics = run(ScriptedTarget(logits), None, request)
    assert (tokens, finish, metrics.rounds) == ((3,) * 5, "length", 1)


def failing(at: tuple[int, ...]) -> Callable[[tuple[int, ...]], list[int]]:
    """A grammar that allows 1 and 2, five times, and cannot be followed after the text `at`."""

    def allowed(text: tuple[int, ...]) -> list[int]:
        if text[: len(at)] == at:
            raise InputError(f"the grammar fails after {text}")
        return [1, 2] if len(text) < 5 else []

    return allowed


@pytest.mark.parametrize("top_k", [1, 3])
def test_a_grammar_that_fails_on_a_drafted_path_alone_changes_no_token(top_k: int) -> None:
    logits = MarkovLogits(VOCAB, 8)
    plain = Request((1, 2), 20, constraint=ScriptedConstraint(failing((5,))))
    text = autoregressive(logits, plain)
    for count in range(1, 5):  # the grammar fails where the text does not go
        other = (*text[0][:count], 3 - text[0][count])
        request = replace(plain, limits=TreeLimits(9, 4, top_k), constraint=ScriptedConstraint(failing(other)))
        for drafter in DRAFTERS.values():
            assert run(ScriptedTarget(logits), drafter(logits), request)[:2] == text


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("drafter", sorted(DRAFTERS))
def test_a_grammar_that_fails_on_the_text_is_an_error_of_its_request_alone(drafter: str, count: int) -> None:
    logits = MarkovLogits(VOCAB, 8)
    good = Request((1, 2), 20, limits=LIMITS, constraint=ScriptedConstraint(failing((5,))))
    text, _ = autoregressive(logits, good)
    bad = replace(good, constraint=ScriptedConstraint(failing(text[:count])))
    sequence = Sequence(ScriptedTarget(logits), DRAFTERS[drafter](logits))
    with pytest.raises(InputError, match="the grammar fails after"):
        list(decode(sequence, bad, Meter()))
    assert tuple(chain.from_iterable(step.tokens for step in decode(sequence, good, Meter()))) == text

    found, errors = dict[Request, tuple[int, ...]](), dict[Request, DovetailError]()
    batch = SequenceBatch(ScriptedTarget(logits), 3, DRAFTERS[drafter](logits), ScriptedPolicy(1))
    for advance in batch.run([replace(good, max_new_tokens=9, scheduler=ScriptedPolicy(1)), bad, good]):
        request = advance.ticket.request
        found[request] = found.get(request, ()) + advance.step.tokens
        if advance.step.error:
            errors[request] = advance.step.error
    assert [*errors] == [bad] and all(tokens == text for request, tokens in found.items() if request is not bad)
