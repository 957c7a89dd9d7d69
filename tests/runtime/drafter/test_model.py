"""A small language model drafts: the tokens stay the target's, and the model reads each text once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dovetail.runtime.drafter.model import ModelDrafter, Translation
from dovetail.runtime.errors import InputError
from dovetail.runtime.loop.generate import decode
from dovetail.runtime.loop.metrics import Meter
from dovetail.runtime.loop.sequence import Request, Sequence
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.system.arrays import FloatArray
from dovetail.runtime.target.session import TargetPass
from dovetail.runtime.testing.scripted import MarkovLogits, ScriptedTarget
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.limits import TreeLimits

VOCABULARY, OWN = 40, 60  # tokens of the target, and of a model with other ids
LIMITS = TreeLimits(width=8, depth=5, top_k=2, lookup=0)
SAMPLED = SamplingParams(temperature=1.0, seed=5)


class SmallModel(ScriptedTarget):
    """A scripted model that can be timed."""

    def pretend_length(self, seq: int, tokens: int) -> None:
        self.texts[seq] = [0] * tokens

    def time_pass(self, seq: int, rows: int, *, clock: Any = None) -> float:
        self.verify({seq: DraftTree.root(0)})
        return 1.0


def model(noise: float = 0.0, max_context: int = 4096, common: int | None = None) -> tuple[SmallModel, ModelDrafter]:
    """A small model with the target's logits, and noise that makes it wrong at times.

    common: tokens that it shares with the target, by other ids; None for the target's own ids.
    """
    clean, other = MarkovLogits(VOCABULARY), MarkovLogits(VOCABULARY, seed=1)

    def logits(prefix: tuple[int, ...]) -> FloatArray:
        return clean(prefix) + np.float32(noise) * other(prefix)

    if common is None:
        small = SmallModel(logits, max_context)
        return small, ModelDrafter(small, VOCABULARY, VOCABULARY, "a test")
    words = translated(common)
    target_of = {words.spell(token): token for token in range(VOCABULARY)}

    def by_own_ids(prefix: tuple[int, ...]) -> FloatArray:
        known, waiting = list[int](), tuple[int, ...]()
        for each in prefix:
            waiting += (each,)
            if waiting in target_of:
                known.append(target_of[waiting])
                waiting = ()
        row = np.full(OWN, 50, np.float32)  # a token without a counterpart seems best
        row[words.own] = logits(tuple(known) or (0,))[words.target]
        return row

    small = SmallModel(by_own_ids, max_context)
    return small, ModelDrafter(small, VOCABULARY, OWN, "a test", words)


def translated(common: int) -> Translation:
    """The first `common` tokens in another order; the model has two ids for each of the target's others."""
    order = np.random.default_rng(3).permutation(VOCABULARY)[:common]

    def spell(token: int) -> tuple[int, ...]:
        return (int(order[token]),) if token < common else (OWN - 1, OWN - 2 - token + common)

    return Translation(order, np.arange(common), spell)


def answer(sequence: Sequence, request: Request) -> tuple[list[int], Meter]:
    meter = Meter()
    return [token for step in decode(sequence, request, meter) for token in step.tokens], meter


@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED])
@pytest.mark.parametrize(
    "limits", [LIMITS, TreeLimits(width=4, depth=3, top_k=1), TreeLimits(width=20, depth=8, top_k=5)]
)
@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("common", [None, VOCABULARY, 34])
def test_the_text_is_the_targets(
    common: int | None, noise: float, limits: TreeLimits, sampling: SamplingParams
) -> None:
    """Two turns of a conversation, then another one: the model follows each text."""
    _, drafter = model(noise, common=common)
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


class Watched(ScriptedTarget):
    """A target that keeps the trees that it verifies."""

    def __init__(self) -> None:
        super().__init__(MarkovLogits(VOCABULARY))
        self.trees: list[DraftTree] = []

    def verify(self, offers: Mapping[int, DraftTree], *prompts: Any, rows: int = 0) -> dict[int, TargetPass]:
        self.trees += offers.values()
        return super().verify(offers, *prompts)


@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED])
def test_other_ids_of_the_same_tokens_change_no_draft(sampling: SamplingParams) -> None:
    targets = Watched(), Watched()
    for target, common in zip(targets, (None, VOCABULARY), strict=True):
        answer(Sequence(target, model(0.5, common=common)[1]), Request((1, 2), 80, sampling, limits=LIMITS))
    assert len(targets[0].trees) == len(targets[1].trees) > 10
    for one, other in zip(targets[0].trees, targets[1].trees, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist() and one.parents.tolist() == other.parents.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-5)


def test_a_token_without_a_counterpart_is_read_by_its_parts_and_never_proposed() -> None:
    small, drafter = model(common=34)
    words = translated(34)
    drafter.extend(1, np.array([1, 38, 2]))
    assert small.texts[1] == [*words.spell(1), *words.spell(38), *words.spell(2)] and len(small.texts[1]) == 4
    assert drafter.length(1) == 2
    tree = drafter.propose(1, TreeLimits(width=40, depth=5, top_k=10))
    assert tree.tokens[0] == 2 and tree.tokens.max() < 34 and len(tree) == 40
    drafter.rewind(1, 1)  # back to the two tokens [1, 38]
    assert small.texts[1] == [*words.spell(1), *words.spell(38)] and drafter.length(1) == 1


@pytest.mark.parametrize("room", [6, 11, 40])
def test_longer_spellings_may_not_fit_the_models_context(room: int) -> None:
    """The model then keeps the last half of its context, and a rewind still finds its place."""
    small, drafter = model(max_context=room, common=34)
    words, read = translated(34), [int(token) for token in np.random.default_rng(1).integers(0, VOCABULARY, 200)]
    restarts = 0
    for begin in range(0, 200, 2):
        if drafter.length(1) + 2 > drafter.capacity:
            drafter.rewind(1, 0)  # as the loop does
        drafter.extend(1, np.array(read[begin : begin + 2]))
        drafter.propose(1, LIMITS)
        known = [own for token in read[: begin + 2] for own in words.spell(token)]
        held = small.texts[drafter._texts[1].own][: drafter._texts[1].known]
        assert held == known[-len(held) :] and 2 <= len(held) <= room
        restarts += len(held) == room // 2
        if drafter.length(1) > 2:
            drafter.rewind(1, drafter.length(1) - 1)
            left = small.texts[drafter._texts[1].own]
            assert left == held[: len(held) - len(words.spell(read[begin + 1]))]
            drafter.extend(1, np.array(read[begin + 1 : begin + 2]))
    assert restarts > 2


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
@pytest.mark.parametrize(("common", "max_context"), [(None, 4096), (34, 4096), (34, 40)])
def test_an_interrupt_anywhere_leaves_the_next_text_right(
    monkeypatch: pytest.MonkeyPatch, call: str, nth: int, after: bool, common: int | None, max_context: int
) -> None:
    small, drafter = model(0.5, max_context, common)
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
@pytest.mark.parametrize("common", [None, 34])
def test_a_text_may_be_longer_than_the_models_context(max_context: int, prompt: int, common: int | None) -> None:
    """The model then starts over with the last half of its context."""
    _, drafter = model(0.2, max_context, common)
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
