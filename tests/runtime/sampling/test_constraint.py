"""Grammars: compiled once, refused in one line, and matchers that can be taken back."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from dovetail.runtime.errors import InputError
from dovetail.runtime.sampling.constraint import Constraint, Constraints, Grammar, GrammarMatcher, grammar_source
from dovetail.runtime.testing.constraint import ScriptedConstraint

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
STOP = len(ALPHABET)


def definition(**changes: Any) -> str:
    """A tokenizer.json of 256 bytes and a token that ends an answer."""
    backend = Backend(models.BPE({piece: index for index, piece in enumerate(ALPHABET)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    return json.dumps({**json.loads(backend.to_str()), **changes})


def ids(text: str) -> list[int]:
    return [ALPHABET.index(character) for character in text]


@pytest.fixture(scope="module")
def constraints() -> Constraints:
    return Constraints(definition(), STOP + 1, "digest", (STOP, STOP + 40))  # one stop token is none of the tokenizer's


def matcher(constraints: Constraints, **grammar: Any) -> GrammarMatcher:
    return constraints.compile(grammar_source(**grammar)).begin()


def test_both_kinds_of_constraint_are_constraints(constraints: Constraints) -> None:
    assert isinstance(constraints.compile(grammar_source(regex="a")), Constraint)
    assert isinstance(ScriptedConstraint(lambda text: []), Constraint)


def test_each_grammar_is_compiled_once(constraints: Constraints) -> None:
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "null"}}}
    first = constraints.compile(grammar_source(json_schema=schema))
    assert constraints.compile(grammar_source(json_schema=json.dumps(schema, indent=4))) is first
    assert constraints.compile(grammar_source(regex="a")) is not first
    for number in range(70):  # the oldest grammars go
        constraints.compile(grammar_source(regex=f"a{number}"))
    assert constraints.compile(grammar_source(json_schema=schema)) is not first


def test_matchers_of_one_grammar_are_independent(constraints: Constraints) -> None:
    grammar = constraints.compile(grammar_source(regex="ab|cd"))
    assert isinstance(grammar, Grammar)
    one, other = grammar.begin(), grammar.begin()
    assert one.advance(ids("a")[0]) and other.advance(ids("c")[0])
    assert one.forced() == tuple(ids("b")) and other.forced() == tuple(ids("d"))
    assert grammar.begin().allowed().tolist() == ids("ac")


def test_the_end_of_a_text(constraints: Constraints) -> None:
    place = matcher(constraints, regex="ab?")
    assert not place.advance(STOP) and not place.complete
    assert place.advance(ids("a")[0]) and not place.complete  # a b may follow
    assert place.allowed().tolist() == [*ids("b"), STOP]
    assert place.advance(STOP) and place.complete and place.allowed().tolist() == [STOP]
    assert not place.advance(ids("b")[0]) and not place.advance(STOP)
    place.retreat(1)
    assert place.advance(ids("b")[0]) and place.complete and place.forced() == ()  # nothing may follow
    assert not place.advance(ids("b")[0])
    place.retreat(2)
    assert place.allowed().tolist() == ids("a") and not place.complete


@pytest.mark.parametrize("limit", ['stop=""', "max_tokens=3"])
def test_a_grammar_whose_tokens_cannot_be_taken_back_is_refused(constraints: Constraints, limit: str) -> None:
    with pytest.raises(InputError, match="rollback not supported with max_tokens"):
        matcher(constraints, grammar=f'start: "x" word\nword[{limit}]: /[a-z]+/')
    assert matcher(constraints, grammar='start: "x" word\nword[lazy]: /[a-z]+;/').forced() == tuple(ids("x"))


def test_ids_without_a_token_are_never_allowed(constraints: Constraints) -> None:
    place = matcher(constraints, regex=r"(?s).*")
    assert place.allowed().max() == STOP
    assert not place.advance(STOP + 1) and not place.advance(10**6)
    assert place.advance(ids("x")[0])


def test_blanks_in_json_have_an_end(constraints: Constraints) -> None:
    place = matcher(constraints, json_schema={"type": "array", "items": {"type": "null"}})
    bytes_of = {"[": "[", "line": "\u010a", "blank": "\u0120"}
    assert place.advance(ids(bytes_of["["])[0])
    assert [place.advance(ids(bytes_of["line"])[0]) for _ in range(3)] == [True, True, False]
    assert [place.advance(ids(bytes_of["blank"])[0]) for _ in range(21)] == [True] * 20 + [False]
    compact = matcher(constraints, json_schema={"type": "array", "x-guidance": {"whitespace_flexible": False}})
    assert compact.advance(ids("[")[0]) and not compact.advance(ids(bytes_of["blank"])[0])
    free = matcher(constraints, json_schema={"type": "array", "x-guidance": {"whitespace_pattern": "[ ]*"}})
    assert free.advance(ids("[")[0]) and all(free.advance(ids(bytes_of["blank"])[0]) for _ in range(99))


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "none of json_schema, regex and grammar"),
    ({"regex": "a", "grammar": "start: /a/"}, "regex and grammar are given"),
    ({"regex": "(a"}, "unclosed group"),
    ({"regex": 3}, "regex 3 is no text"),
    ({"regex": "\ud800"}, "is no valid text"),
    ({"grammar": 'start: "\0"'}, "is no valid text"),
    ({"grammar": "start: start"}, "NoExtensionBias"),
    ({"grammar": "start: missing"}, 'unknown name: "missing"'),
    ({"grammar": "start: <|nobody|>"}, "unknown special token"),
    ({"grammar": b"start"}, "is no text"),
    ({"json_schema": "{"}, "Expecting property name"),
    ({"json_schema": "[]"}, "a schema is an object"),
    ({"json_schema": [1]}, "a schema is an object"),
    ({"json_schema": True}, "a schema is an object"),
    ({"json_schema": {"type": {1, 2}}}, "not JSON serializable"),
    ({"json_schema": '{"a": NaN}'}, "expected value"),
    ({"json_schema": "[" * 100_000}, "recursion"),
    ({"json_schema": {"const": "\ud800"}}, "hex escape"),
    ({"json_schema": {"type": "objekt"}}, "Invalid type: objekt"),
    ({"json_schema": {"not": {"type": "string"}}}, 'Unimplemented keys: ["not"]'),
    ({"json_schema": {"$ref": "http://example.org/schema"}}, "is not present in a registry"),
    ({"json_schema": {"type": "string", "minLength": 5, "maxLength": 3}}, "greater than maxLength"),
    ({"json_schema": {"type": "string", "x-guidance": {"whitespace_flexible": "x"}}}, "invalid type"),
]


@pytest.mark.parametrize(("grammar", "reason"), BAD)
def test_a_bad_grammar_is_refused_in_one_line(constraints: Constraints, grammar: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError) as caught:
        constraints.compile(grammar_source(**grammar))
    message = str(caught.value)
    assert reason in message and "\n" not in message and len(message) < 500
    remedy = message.rpartition(": ")[2]
    assert remedy in ("change it", "simplify it", "give one", "give a string") or remedy.startswith("leave out")


def test_a_grammar_that_grows_too_large_is_an_error_that_names_it(constraints: Constraints) -> None:
    words = " | ".join(f'"a{number} b"' for number in range(3000))
    place = matcher(constraints, grammar=f'start: pick pick pick words\npick: "x" | "y"\nwords: {words}')
    with pytest.raises(InputError, match=r"grammar fails on this text \(.*items; max is 2000.*\): simplify it"):
        for token in ids("xyxa"):
            assert token in place.allowed() and place.advance(token)
    assert place.complete  # it stays there


def test_a_grammar_needs_a_stop_token_of_the_tokenizer() -> None:
    for stops in ((), (STOP + 1,)):
        with pytest.raises(InputError, match="needs a stop token"):
            Constraints(definition(), STOP + 1, "digest", stops)


@pytest.mark.parametrize("changes", [{"decoder": None}, {"model": {"type": "unknown"}}])
def test_a_tokenizer_that_llguidance_cannot_read_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"llguidance cannot read this tokenizer \(.*\): decode without"):
        Constraints(definition(**changes), STOP + 1, "digest", (STOP,))


def test_without_llguidance_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match=r"need llguidance .*\.\[grammar\]"):
        grammar_source(regex="a")
