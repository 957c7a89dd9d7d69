"""Repeats that continue earlier texts of an engine: fewer passes, no other token, and forgotten when asked."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest

from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import InputError
from dovetail.runtime.loop.generate import decode
from dovetail.runtime.loop.metrics import Meter
from dovetail.runtime.loop.sequence import Request, Sequence
from dovetail.runtime.policy.choose import Scheduler
from dovetail.runtime.policy.costs import Costs, Curve
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.testing.scripted import MarkovLogits, ScriptedDrafter, ScriptedTarget, ScriptedTokenizer
from dovetail.runtime.tree import repeats
from dovetail.runtime.tree.limits import TreeLimits

LOGITS = MarkovLogits(200, order=3)
ALPHABET = "".join(map(chr, range(200)))
PROMPTS = [[1, 2, 3, 4], [9, 8, 7], [1, 2, 3, 5], [9, 8, 7], [4, 1, 2, 3, 4]]


def engine(cache: int) -> Engine:
    limits = TreeLimits(width=16, depth=4, top_k=3, lookup=12)
    return Engine(ScriptedTarget(LOGITS), None, ScriptedTokenizer(ALPHABET), tree=limits, lookup_cache=cache)


def answers(
    cache: int, request: Request, *, drafted: bool = False, scheduled: bool = False
) -> tuple[list[list[int]], list[int]]:
    """Answers to all prompts, and the passes that each took. A pass takes the same time at every width."""
    drafter = ScriptedDrafter.copy_of(LOGITS, noise=2.0) if drafted else None
    sequence = Sequence(ScriptedTarget(LOGITS), drafter, lookup_cache=cache)
    curve = Curve.fit((0,), (1, 16, 64), np.array([[10.0, 10.5, 12.0]]))
    draft = Curve.fit((0,), (1, 64), np.array([[0.5, 0.6]])) if drafted else None
    scheduler = Scheduler(Costs(curve, draft)) if scheduled else None
    texts, passes = list[list[int]](), list[int]()
    for prompt in PROMPTS:
        meter = Meter(clock=count().__next__)
        steps = decode(sequence, replace(request, prompt=tuple(prompt), scheduler=scheduler), meter)
        texts.append([token for step in steps for token in step.tokens])
        passes.append(meter.rounds)
    return texts, passes


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=0.7, seed=3)])
def test_earlier_texts_save_passes_and_change_no_token(
    drafted: bool, scheduled: bool, sampling: SamplingParams, top_k: int
) -> None:
    request = Request((1,), 80, sampling, limits=TreeLimits(width=16, depth=4, top_k=top_k, lookup=12))
    plain, _ = answers(0, replace(request, limits=None))
    without, passes = answers(0, request, drafted=drafted, scheduled=scheduled)
    cached, fewer = answers(5000, request, drafted=drafted, scheduled=scheduled)
    assert cached == without == plain
    assert fewer[0] == passes[0] and fewer[3] < passes[3] / 2  # the same question again


def test_nothing_is_kept_unless_asked_for() -> None:
    of = engine(0)
    for prompt in PROMPTS:
        of.generate(prompt, 20)
    assert of._sequence and not of._sequence.earlier._texts and not of._sequence.earlier._ends


def test_a_conversation_that_goes_on_is_no_earlier_text() -> None:
    of = engine(5000)
    said = of.generate(PROMPTS[0], 20).token_ids
    of.generate([*PROMPTS[0], *said, 7, 8, 9], 20)
    assert of._sequence and not of._sequence.earlier._texts
    of.generate([*PROMPTS[0], *said, 7, 8, 1], 20)  # another ending: what both begin with is not kept twice
    [kept] = of._sequence.earlier._texts.values()
    assert len(kept) == 16 + 1 + 20


@pytest.mark.parametrize("forget", [lambda of: of.reset(), lambda of: of.choices([1, 2], [3])])
def test_a_reset_forgets_earlier_texts_too(forget: Any) -> None:
    of = engine(5000)
    for prompt in PROMPTS[:2]:
        of.generate(prompt, 20)
    assert of._sequence and of._sequence.earlier._texts
    forget(of)
    assert not of._sequence.earlier._texts and of._sequence.earlier.capacity == 5000


def test_an_unusable_capacity_is_told_before_anything_is_read() -> None:
    with pytest.raises(InputError, match="lookup_cache -3 is out of range"):
        Engine.from_pretrained("nowhere", lookup_cache=-3)
    with pytest.raises(InputError, match="lookup_cache -3 is out of range"):
        engine(-3)


@pytest.mark.parametrize("nth", range(10, 2000, 200))
def test_an_interrupt_while_texts_are_exchanged_leaves_the_engine_right(
    monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    of, plain = engine(120), engine(0)
    real, calls = repeats._runs, count(1)

    def interrupted(*arguments: Any) -> Any:
        for run in real(*arguments):
            if next(calls) == nth:
                raise KeyboardInterrupt
            yield run

    monkeypatch.setattr(repeats, "_runs", interrupted)
    for prompt in PROMPTS:
        with suppress(KeyboardInterrupt):
            of.generate(prompt, 80)
    assert next(calls) > nth
    for prompt in PROMPTS:
        assert of.generate(prompt, 80).token_ids == plain.generate(prompt, 80, speculate=False).token_ids
    assert of._sequence
    held = of._sequence.earlier
    assert 0 < sum(map(len, held._texts.values())) <= 120
    for text in list(held._texts):
        held._drop(text)
    assert not held._ends  # no run is left of a text that is gone
