"""Log-probabilities: the target's own, for every token of an answer, the same with any draft."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dovetail.runtime import (
    Engine,
    InputError,
    MarkovLogits,
    Request,
    ScriptedDrafter,
    ScriptedTarget,
    ScriptedTokenizer,
)
from dovetail.runtime.sampling.logprobs import TokenLogprobs, token_logprobs
from dovetail.runtime.testing.constraint import ScriptedConstraint
from dovetail.runtime.tree.limits import TreeLimits

ALPHABET = "abcdefgh"
LOGITS = MarkovLogits(len(ALPHABET), 3)


def engine(eos: tuple[int, ...] = ()) -> Engine:
    drafter = ScriptedDrafter.copy_of(LOGITS, noise=1.0)
    return Engine(
        ScriptedTarget(LOGITS), drafter, ScriptedTokenizer(ALPHABET, eos_token_ids=eos), tree=TreeLimits(8, 5, 3)
    )


def own(text: tuple[int, ...], token: int, count: int) -> TokenLogprobs:
    """Computed naively from the target's logits."""
    logits = LOGITS(text).astype(float).tolist()
    total = math.log(sum(map(math.exp, logits)))
    found = [logit - total for logit in logits]
    ranked = sorted(range(len(found)), key=lambda each: (-found[each], each))[:count]
    return TokenLogprobs(token, found[token], tuple((each, found[each]) for each in ranked))


@pytest.mark.parametrize("sampling", [
    {},
    {"temperature": 1.3, "seed": 2, "top_k": 3, "presence_penalty": 1.0, "logit_bias": {2: 4.0}, "min_p": 0.01},
])  # fmt: skip
@pytest.mark.parametrize("count", [0, 1, 3, 8, 50])
def test_every_token_has_the_targets_own_logprobs(sampling: dict, count: int) -> None:
    drafted = engine().generate("abc", 40, logprobs=count, **sampling)
    assert len(drafted.logprobs) == len(drafted.token_ids) == 40 and drafted.metrics.accepted > 0
    text: tuple[int, ...] = (0, 1, 2)
    for token, found in zip(drafted.token_ids, drafted.logprobs, strict=True):
        expected = own(text, token, count)
        assert found.token_id == token and found.logprob == pytest.approx(expected.logprob, abs=1e-9)
        assert [each for each, _ in found.top] == [each for each, _ in expected.top]
        assert [each for _, each in found.top] == pytest.approx([each for _, each in expected.top], abs=1e-9)
        text += (token,)
    plain = engine().generate("abc", 40, logprobs=count, speculate=False, **sampling)
    assert plain.logprobs == drafted.logprobs


def test_nobody_asks_nothing_is_reported() -> None:
    chunks = list(engine().stream("abc", 20))
    assert all(chunk.logprobs == () for chunk in chunks)


def test_chunks_report_their_own_tokens_up_to_a_stop() -> None:
    text = engine().generate("abc", 40).text
    stop = text[11:14]
    for stops in (stop, ()):
        chunks = list(engine(eos=(ALPHABET.index(text[20]),)).stream("abc", 40, logprobs=0, stop=stops))
        assert len(chunks) > 3
        for chunk in chunks:
            assert tuple(each.token_id for each in chunk.logprobs) == chunk.token_ids


def test_a_grammar_does_not_change_them() -> None:
    constraint = ScriptedConstraint(lambda text: [1, 4] if len(text) < 10 else [])
    result = engine().generate("abc", 40, constraint=constraint, logprobs=2)
    assert {*result.token_ids} <= {1, 4} and result.finish_reason == "stop" and len(result.token_ids) == 10
    first = own((0, 1, 2), result.token_ids[0], 2)
    assert result.logprobs[0].logprob == pytest.approx(first.logprob, abs=1e-9)
    assert [each for each, _ in result.logprobs[0].top] == [each for each, _ in first.top]


def test_equal_tokens_are_ranked_by_id() -> None:
    logits = np.zeros(6, np.float32)
    logits[4] = 1.0
    assert [each for each, _ in token_logprobs(logits, 0, 3).top] == [4, 0, 1]
    assert sum(math.exp(value) for _, value in token_logprobs(logits, 0, 6).top) == pytest.approx(1.0)


@pytest.mark.parametrize("count", [-1, 1.5, True, "3", 2**31])
def test_a_bad_number_of_alternatives_is_refused(count: object) -> None:
    with pytest.raises(InputError, match=r"logprobs .* is out of range"):
        Request((1,), 5, logprobs=count)  # type: ignore[arg-type]  # the point of the test
