"""Grammars on a tiny pair: OpenVINO's logits, a drafter, a scheduler, and the pair's own tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dovetail.runtime import Engine, InputError, MarkovLogits, ScriptedTarget, ScriptedTokenizer, TreeLimits
from dovetail.runtime.text.tokenizer import Tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "born": {"type": "integer", "minimum": 1900, "maximum": 2030},
        "tags": {"type": "array", "items": {"enum": ["thin", "thick", None]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "born", "tags"],
    "additionalProperties": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "schema": {"json_schema": PERSON},
    "regex": {"regex": r"the (th|in){2,5}\."},
    "lark": {"grammar": 'start: "(" start ")" | /[a-f]{1,3}/'},
}


@pytest.fixture(scope="module")
def engine(tiny_full_pair: Path) -> Iterator[Engine]:
    with Engine.from_pretrained(tiny_full_pair, tree=TreeLimits(12, 4, 3), drafter_device="cpu", threads=1) as engine:
        yield engine


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampling", [
    {}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "top_k": 20, "frequency_penalty": 0.6, "seed": 4},
])  # fmt: skip
def test_a_draft_changes_nothing(engine: Engine, kind: str, sampling: dict[str, Any]) -> None:
    constraint = engine.constraint(**KINDS[kind])
    assert engine.constraint(**KINDS[kind]) is constraint
    for prompt in ("the quick brown fox", "0, 1, 2"):
        options: dict[str, Any] = {"constraint": constraint, "logprobs": 1, "raw": True, **sampling}
        drafted = engine.generate(prompt, 120, **options)
        plain = engine.generate(prompt, 120, speculate=False, **options)
        assert (drafted.text, drafted.token_ids, drafted.finish_reason) == (
            plain.text,
            plain.token_ids,
            plain.finish_reason,
        )
        assert drafted.logprobs == plain.logprobs and len(plain.logprobs) == len(plain.token_ids)
        assert drafted.metrics.accepted > 0 or kind == "lark"
        if kind == "schema":
            person = json.loads(drafted.text)
            assert list(person) == ["name", "born", "tags"] and len(person["name"]) <= 6
            assert 1900 <= person["born"] <= 2030 and {*person["tags"]} <= {"thin", "thick", None}
            assert drafted.finish_reason == "stop"


def test_the_grammar_allows_the_targets_stop_tokens(engine: Engine) -> None:
    stop = engine.tokenizer.eos_token_ids[0]
    result = engine.generate("a", 30, raw=True, constraint=engine.constraint(regex="[a-z]*"), logit_bias={stop: 100})
    assert (result.text, result.finish_reason) == ("", "stop")
    result = engine.generate("a", 30, raw=True, constraint=engine.constraint(regex="a[a-z]*"), logit_bias={stop: 100})
    assert (result.text, result.finish_reason) == ("a", "stop")


def test_a_constraint_of_another_tokenizer_is_refused(engine: Engine) -> None:
    own = Tokenizer(json.dumps({**json.loads(engine.tokenizer.definition()), "normalizer": {"type": "NFC"}}).encode())  # type: ignore[attr-defined]  # a pair's
    other = Engine(ScriptedTarget(MarkovLogits(300)), None, own, stop_tokens=engine.stop_tokens)
    with pytest.raises(InputError, match="of another tokenizer"):
        engine.stream("a", constraint=other.constraint(regex="a"))


def test_values_that_no_answer_can_have_are_refused_at_once(engine: Engine) -> None:
    with pytest.raises(InputError, match="token id 999 of logit_bias is none"):
        engine.stream("a", logit_bias={999: 1.0})
    with pytest.raises(InputError, match=r"constraint \{'type': 'object'\} is none: make one"):
        engine.stream("a", constraint={"type": "object"})  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(InputError, match="logprobs -1 is out of range"):
        engine.stream("a", logprobs=-1)
    with pytest.raises(InputError, match=r"json_schema cannot be used \(Invalid type: objekt\)"):
        engine.constraint(json_schema={"type": "objekt"})
    scripted = Engine(ScriptedTarget(MarkovLogits(4)), None, ScriptedTokenizer("abcd"))
    with pytest.raises(InputError, match="needs the tokenizer of a pair folder"):
        scripted.constraint(regex="a")
