"""Texts that share passes are the texts that each would be alone, whenever they come and go."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest

from dovetail.runtime.errors import ContextOverflow
from dovetail.runtime.loop import batch as batch_module
from dovetail.runtime.loop.batch import SequenceBatch, Ticket
from dovetail.runtime.loop.sequence import Request
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.testing.scripted import MarkovLogits, ScriptedTarget

VOCAB = 7
LOGITS = MarkovLogits(VOCAB)


def requests(count: int, seed: int = 0) -> list[Request]:
    """Prompts of 1 to 9 tokens, answers of 1 to 12; half are drawn, and one token in seven ends them."""
    rng, made = np.random.default_rng(seed), list[Request]()
    for index in range(count):
        prompt = tuple(rng.integers(0, VOCAB, rng.integers(1, 10)).tolist())
        sampling = SamplingParams(temperature=float(index % 2), seed=index)
        made.append(Request(prompt, int(rng.integers(1, 13)), sampling, frozenset({6})))
    return made


def alone(request: Request) -> tuple[int, ...]:
    """The answer, one token after the other, without sessions; the stop token included."""
    sampler, text = Sampler(request.sampling), request.prompt
    while len(text) < len(request.prompt) + request.max_new_tokens:
        text += (sampler.pick(LOGITS(text), len(text), text),)
        if text[-1] in request.stop_tokens:
            break
    return text[len(request.prompt) :]


@pytest.mark.parametrize("slots", [1, 3, 20])
@pytest.mark.parametrize("budget", [1, 12, 512])
def test_each_text_is_what_it_is_alone(slots: int, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """ScriptedTarget spoils what a pass gave with its next call, and refuses a misuse of any sequence."""
    monkeypatch.setattr(batch_module, "PROMPT_TOKENS", budget)
    target, asked = ScriptedTarget(LOGITS), requests(30)
    answers, rows = dict[Ticket, list[int]](), dict[Ticket, list[np.ndarray]]()
    for advance in SequenceBatch(target, slots, prompt_tokens=min(budget, 64)).run(asked):
        ticket, step = advance.ticket, advance.step
        answers.setdefault(ticket, []).extend([*step.tokens, *([] if step.stop is None else [step.stop])])
        rows.setdefault(ticket, []).append(advance.features)
        if step.finish:
            assert tuple(answers[ticket]) == alone(ticket.request)
            features = np.concatenate(rows[ticket])  # of every token but the last, which no pass ran
            text = [*ticket.request.prompt, *answers[ticket]]
            assert features[:, 0].tolist() == [*range(len(text) - 1)] and features[:, 1].tolist() == text[:-1]
    assert {id(ticket.request) for ticket in answers} == {*map(id, asked)}
    assert not target.texts and len(answers) == 30


def test_a_text_that_ends_makes_room_at_once() -> None:
    target = ScriptedTarget(LOGITS)
    held = [len({*target.texts}) for _ in SequenceBatch(target, 4).run(requests(40))]
    assert max(held) == 4
    passes = sum(call == "verify" for call, _ in target.calls)
    tokens = sum(len(alone(request)) for request in requests(40))
    assert passes < 1.3 * tokens / 4  # few slots are empty before the end


def test_new_prompts_share_the_pass_of_running_answers() -> None:
    target = ScriptedTarget(LOGITS)
    list(SequenceBatch(target, 3).run(requests(12)))
    assert not [call for call, _ in target.calls if call == "prefill"]


@pytest.mark.parametrize("taken", [0, 1, 5, 17])
def test_a_batch_that_is_abandoned_or_interrupted_leaves_nothing_open(taken: int) -> None:
    class Pressed(ScriptedTarget):
        left = taken

        def verify(self, *offers: Any, rows: int = 0) -> dict[int, Any]:
            result = super().verify(*offers)
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return result

    for target in (ScriptedTarget(LOGITS), Pressed(LOGITS)):
        batch = SequenceBatch(target, 3)
        steps = batch.run(requests(9))
        try:
            assert len(list(islice(steps, taken))) == taken
        except KeyboardInterrupt:
            assert isinstance(target, Pressed)
        steps.close()
        assert not target.texts
        again = [advance.step for advance in batch.run([replace(requests(9)[4], stop_tokens=frozenset())])]
        assert len(again) == requests(9)[4].max_new_tokens and not target.texts


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    target = ScriptedTarget(LOGITS, max_context=8)
    with pytest.raises(ContextOverflow, match="8 tokens leaves no room"):
        list(SequenceBatch(target, 2).run([Request((1,) * 8, 3)]))
    assert not target.texts
