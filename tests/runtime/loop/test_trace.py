"""The record of a round: its tree, and the tokens that it gave."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.runtime import (
    Engine,
    MarkovLogits,
    RoundTrace,
    ScriptedDrafter,
    ScriptedTarget,
    ScriptedTokenizer,
    TreeLimits,
)
from dovetail.runtime.loop.batch import SequenceBatch, Ticket
from dovetail.runtime.loop.generate import decode
from dovetail.runtime.loop.metrics import Meter
from dovetail.runtime.loop.sequence import Request, Sequence, Step
from dovetail.runtime.sampling.params import SamplingParams

VOCAB = 7


def steps(seed: int, noise: float, drafted: bool = True, **request: Any) -> list[Step]:
    logits = MarkovLogits(VOCAB, seed)
    drafter = ScriptedDrafter.copy_of(logits, noise=noise, seed=3) if drafted else None
    sequence = Sequence(ScriptedTarget(logits), drafter)
    limits = TreeLimits(width=8, depth=4, top_k=3, lookup=4) if drafted else None
    return list(decode(sequence, Request((1, 2, 3), limits=limits, **request), Meter()))


def written(step: Step) -> tuple[int, ...]:
    return step.tokens if step.stop is None else (*step.tokens, step.stop)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 50), noise=st.sampled_from([0.0, 1.0, 4.0]), count=st.integers(1, 40),
    stops=st.frozensets(st.integers(0, VOCAB - 1), max_size=1), hot=st.booleans(),
)  # fmt: skip
def test_a_trace_tells_the_tokens_of_its_round(
    seed: int, noise: float, count: int, stops: frozenset[int], hot: bool
) -> None:
    sampling = SamplingParams(temperature=1.0, seed=5) if hot else SamplingParams()
    options: dict[str, Any] = {"max_new_tokens": count, "stop_tokens": stops, "sampling": sampling}
    found = steps(seed, noise, trace=True, **options)
    plain = steps(seed, noise, **options)
    assert [(step.tokens, step.finish, step.stop) for step in found] == [
        (step.tokens, step.finish, step.stop) for step in plain
    ]
    assert all(step.round is None for step in plain) and found[0].round is None
    known = found[0].tokens[-1:]
    for step in found[1:]:
        one = step.round
        assert one and one.parents[0] == -1 and (one.tokens[0],) == known
        assert [one.parents[node] for node in one.accepted] == [0, *one.accepted][: len(one.accepted)]
        given_tokens = tuple(one.tokens[node] for node in one.accepted) + (() if one.next is None else (one.next,))
        assert given_tokens == written(step)
        assert one.draft_ms >= 0 and one.verify_ms >= 0
        known = step.tokens[-1:]


def test_texts_of_a_batch_are_traced_one_by_one() -> None:
    logits = MarkovLogits(VOCAB, 1)
    batch = SequenceBatch(ScriptedTarget(logits), 3, ScriptedDrafter.copy_of(logits, noise=1.0))
    limits = TreeLimits(width=8, depth=4, top_k=3, lookup=4)
    asked = [batch.add(Request((1, 2, 3), 20, limits=limits, trace=number != 1)) for number in range(3)]
    traces: dict[Ticket, list[Step]] = {ticket: [] for ticket in asked}
    while batch.running or batch.waiting:
        for advance in batch.step():
            traces[advance.ticket].append(advance.step)
    assert all(step.round is None for step in traces[asked[1]])
    for ticket in (asked[0], asked[2]):
        rounds = [step for step in traces[ticket] if step.round]
        assert sum(len(step.tokens) for step in rounds) == 19
        for step in rounds:
            assert step.round
            assert len(step.round.accepted) + (step.round.next is not None) == len(step.tokens)


def test_a_plain_round_is_its_root_and_the_next_token() -> None:
    for step in steps(0, 0.0, drafted=False, max_new_tokens=5, trace=True)[1:]:
        assert step.round and step.round.parents == (-1,) and step.round.accepted == ()
        assert (step.round.next,) == step.tokens


@pytest.mark.parametrize("trace", [False, True])
def test_chunks_have_the_trace_that_was_asked_for(trace: bool) -> None:
    logits, alphabet = MarkovLogits(VOCAB, 0), "abcdefg"
    engine = Engine(ScriptedTarget(logits), ScriptedDrafter.copy_of(logits), ScriptedTokenizer(alphabet))
    chunks = list(engine.stream("abc", 20, trace=trace))
    assert chunks[0].round is None
    assert all(isinstance(chunk.round, RoundTrace) == trace for chunk in chunks[1:])
