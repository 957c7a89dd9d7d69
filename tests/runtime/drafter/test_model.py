"""A small language model drafts: the tokens stay the target's, and the model reads each text once."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dovetail.runtime.drafter.model import ModelDrafter
from dovetail.runtime.errors import InputError
from dovetail.runtime.loop.generate import decode
from dovetail.runtime.loop.metrics import Meter
from dovetail.runtime.loop.sequence import Request, Sequence
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.testing.scripted import MarkovLogits, ScriptedTarget
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.limits import TreeLimits

VOCABULARY = 40
LIMITS = TreeLimits(width=8, depth=5, top_k=2, lookup=0)
SAMPLED = SamplingParams(temperature=1.0, seed=5)


class SmallModel(ScriptedTarget):
    """A scripted model that can be timed."""

    def pretend_length(self, seq: int, tokens: int) -> None:
        self.texts[seq] = [0] * tokens

    def time_pass(self, seq: int, rows: int, *, clock: Any = None) -> float:
        self.verify({seq: DraftTree.root(0)})
        return 1.0


def model(noise: float = 0.0, max_context: int = 4096) -> tuple[SmallModel, ModelDrafter]:
    """A small model with the target's logits, and noise that makes it wrong at times."""
    clean, other = MarkovLogits(VOCABULARY), MarkovLogits(VOCABULARY, seed=1)
    small = SmallModel(lambda prefix: clean(prefix) + np.float32(noise) * other(prefix), max_context)
    return small, ModelDrafter(small, VOCABULARY, VOCABULARY, "a test")


def answer(sequence: Sequence, request: Request) -> tuple[list[int], Meter]:
    meter = Meter()
    return [token for step in decode(sequence, request, meter) for token in step.tokens], meter


@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED])
@pytest.mark.parametrize(
    "limits", [LIMITS, TreeLimits(width=4, depth=3, top_k=1), TreeLimits(width=20, depth=8, top_k=5)]
)
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_text_is_the_targets(noise: float, limits: TreeLimits, sampling: SamplingParams) -> None:
    """Two turns of a conversation, then another one: the model follows each text."""
    _, drafter = model(noise)
    sequence, alone = (Sequence(ScriptedTarget(MarkovLogits(VOCABULARY)), each) for each in (drafter, None))
    request = Request(tuple(range(3, 20)), 60, sampling=sampling, limits=limits)
    first, meter = answer(sequence, request)
    assert first == answer(alone, replace(request, limits=None))[0]
    assert meter.metrics().acceptance_length > 1.5
    turn = replace(request, prompt=(*request.prompt, *first, 7, 8, 9))
    assert answer(sequence, turn)[0] == answer(alone, replace(turn, limits=None))[0]
    other = replace(request, prompt=(5, 4, 3, 2))
    assert answer(sequence, other)[0] == answer(alone, replace(other, limits=None))[0]


def test_a_perfect_model_is_always_right() -> None:
    _, drafter = model()
    sequence = Sequence(ScriptedTarget(MarkovLogits(VOCABULARY)), drafter)
    _, meter = answer(sequence, Request((1, 2), 121, limits=TreeLimits(width=5, depth=4, top_k=1, lookup=0)))
    assert meter.metrics().acceptance_length == 5.0


def test_each_token_is_read_once() -> None:
    """A right draft stays in the model's KV: a round runs a row for each node of the chain, and reads what is new."""
    small, drafter = model()
    sequence = Sequence(ScriptedTarget(MarkovLogits(VOCABULARY)), drafter)
    tokens, _ = answer(sequence, Request(tuple(range(10)), 101, limits=TreeLimits(width=5, depth=4, top_k=1, lookup=0)))
    read = sum(count for call, count in small.calls if call in ("prefill", "verify"))
    assert read == 10 + len(tokens) - 2  # but for the last two, all once


def test_a_long_prompt_is_read_whole() -> None:
    small, drafter = model()
    sequence = Sequence(ScriptedTarget(MarkovLogits(VOCABULARY)), drafter)
    prompt = tuple(int(token) for token in np.random.default_rng(0).integers(0, VOCABULARY, 700))
    answer(sequence, Request(prompt, 5, limits=LIMITS))
    assert [count for call, count in small.calls if call == "prefill"][:3] == [256, 256, 189]


@pytest.mark.parametrize("call", ["prefill", "verify", "commit", "rewind"])
@pytest.mark.parametrize("nth", [1, 2, 5, 9])
@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_anywhere_leaves_the_next_text_right(
    monkeypatch: pytest.MonkeyPatch, call: str, nth: int, after: bool
) -> None:
    small, drafter = model(0.5)
    sequence = Sequence(ScriptedTarget(MarkovLogits(VOCABULARY)), drafter)
    request = Request(tuple(range(3, 20)), 60, limits=LIMITS)
    expected, _ = answer(Sequence(ScriptedTarget(MarkovLogits(VOCABULARY))), replace(request, limits=None))
    real, count = getattr(small, call), [0]

    def interrupted(*arguments: Any, **named: Any) -> Any:
        count[0] += 1
        result = real(*arguments, **named) if after or count[0] != nth else None
        if count[0] == nth:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(small, call, interrupted)
    with suppress(KeyboardInterrupt):
        answer(sequence, request)
    monkeypatch.setattr(small, call, real)
    got, meter = answer(sequence, request)
    assert got == expected and meter.metrics().acceptance_length > 1.5


@pytest.mark.parametrize("max_context", [12, 40, 60])
@pytest.mark.parametrize("prompt", [5, 50])
def test_a_text_may_be_longer_than_the_models_context(max_context: int, prompt: int) -> None:
    """The model then starts over with the last half of its context."""
    _, drafter = model(0.2, max_context)
    sequence, alone = (Sequence(ScriptedTarget(MarkovLogits(VOCABULARY)), each) for each in (drafter, None))
    request = Request(tuple(range(2)) * (prompt // 2), 120, limits=LIMITS)
    tokens, meter = answer(sequence, request)
    assert tokens == answer(alone, replace(request, limits=None))[0]
    assert meter.metrics().acceptance_length > 1.5
    other = replace(request, prompt=(*request.prompt, *tokens[:3], 9))
    assert answer(sequence, other)[0] == answer(alone, replace(other, limits=None))[0]


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_while_a_text_is_dropped_leaves_the_engine_usable(
    monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    small, drafter = model()
    sequence = Sequence(ScriptedTarget(MarkovLogits(VOCABULARY)), drafter)
    request = Request(tuple(range(3, 20)), 30, limits=LIMITS)
    expected, _ = answer(sequence, request)
    real = small.close

    def interrupted(seq: int) -> None:
        if after:
            real(seq)
        raise KeyboardInterrupt

    monkeypatch.setattr(small, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sequence.forget()
    monkeypatch.setattr(small, "close", real)
    assert answer(sequence, request)[0] == expected


def test_two_texts_are_drafted_apart() -> None:
    _, drafter = model()
    drafter.extend(1, np.array([1, 2, 3]))
    drafter.extend(2, np.array([7, 8]))
    assert drafter.propose(1, LIMITS).tokens[0] == 3 and drafter.propose(2, LIMITS).tokens[0] == 8


def test_a_token_that_the_model_lacks_is_read_as_another() -> None:
    small, _ = model()
    drafter = ModelDrafter(small, VOCABULARY, 10, "a test")
    drafter.extend(1, np.array([1, 30]))
    assert small.texts[1] == [1, 0]
    assert drafter.propose(1, LIMITS).tokens[0] == 30  # the root is the target's token all the same


def test_misuse_is_named() -> None:
    _, drafter = model()
    with pytest.raises(InputError, match="nothing to draft from"):
        drafter.propose(1, LIMITS)
    drafter.extend(1, np.array([1, 2, 3]))
    assert drafter.length(1) == 2
    with pytest.raises(InputError, match="cannot keep 3 pairs of 2"):
        drafter.rewind(1, 3)
    drafter.rewind(1, 1)
    with pytest.raises(InputError, match="nothing to draft from"):
        drafter.propose(1, LIMITS)
    drafter.close()
    assert drafter.length(1) == 0


@pytest.mark.parametrize("rows", [1, 7])
def test_timing_leaves_nothing_behind(rows: int) -> None:
    small, drafter = model()
    drafter.pretend_length(4, 30)
    assert drafter.length(4) == 30
    assert drafter.time_pass(4, rows, clock=iter(range(9)).__next__) == 1000
    drafter.rewind(4, 0)
    assert drafter.length(4) == 0 and not small.texts


def test_a_chain_ends_where_the_models_context_does() -> None:
    _, drafter = model(max_context=12)
    drafter.extend(1, np.arange(10))
    tree = drafter.propose(1, TreeLimits(width=20, depth=12, top_k=2))
    assert tree.depths().max() <= 3
