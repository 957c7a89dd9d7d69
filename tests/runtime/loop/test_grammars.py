"""The loop under grammars of llguidance, on a vocabulary of bytes and a few longer tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runtime.loop.constrained import DRAFTERS, LIMITS, autoregressive, run

from dovetail.runtime.errors import InputError
from dovetail.runtime.loop.sequence import Request
from dovetail.runtime.sampling.constraint import Constraints, grammar_source
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.testing.policy import ScriptedPolicy
from dovetail.runtime.testing.scripted import MarkovLogits, ScriptedDrafter, ScriptedTarget
from dovetail.runtime.text.tokenizer import Tokenizer
from dovetail.runtime.tree.limits import TreeLimits

PIECES = ("th", "tr", "true", '":', '",', "nu", "in", "it", "name", ': "', '{"', "  ")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelled = [
        level.pre_tokenize_str(piece)[0][0] if " " not in piece else piece.replace(" ", "\u0120") for piece in PIECES
    ]
    alphabet = sorted(level.alphabet())
    merges, known = [], set(alphabet)
    for piece in spelled:
        while piece not in known:
            best = next(end for end in range(len(piece) - 1, 0, -1) if piece[:end] in known)
            longer = piece[: best + 1]
            merges.append((piece[:best], piece[best]))
            known.add(longer)
    vocabulary = [*alphabet, *dict.fromkeys(left + right for left, right in merges)]
    backend = Backend(models.BPE({piece: index for index, piece in enumerate(vocabulary)}, merges))
    backend.pre_tokenizer, backend.decoder = level, decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    return Tokenizer(backend.to_str().encode(), eos_token_ids=(len(vocabulary),))


@pytest.fixture(scope="module")
def constraints(tokenizer: Tokenizer) -> Constraints:
    return Constraints(tokenizer.definition(), tokenizer.vocab_size, tokenizer.digest(), tokenizer.eos_token_ids)


Schema = tuple[dict[str, Any], Callable[[Any], bool]]  # a JSON schema, and what it means


def of_type(value: object, kind: type) -> bool:
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)


def whole(low: int, span: int) -> Schema:
    schema = {"type": "integer", "minimum": low, "maximum": low + span}
    return schema, lambda value: of_type(value, int) and low <= value <= low + span


def text(most: int) -> Schema:
    return {"type": "string", "maxLength": most}, lambda value: isinstance(value, str) and len(value) <= most


def one_of(values: list[Any]) -> Schema:
    return {"enum": values}, lambda value: any(type(value) is type(each) and value == each for each in values)


def array(item: Schema, most: int) -> Schema:
    schema = {"type": "array", "items": item[0], "minItems": 1, "maxItems": most}
    return schema, lambda value: isinstance(value, list) and 1 <= len(value) <= most and all(map(item[1], value))


def record(members: dict[str, Schema], optional: int) -> Schema:
    required = sorted(members)[optional:]
    schema = {
        "type": "object", "properties": {name: member[0] for name, member in members.items()}, "required": required,
        "additionalProperties": False,
    }  # fmt: skip

    def fits(value: Any) -> bool:
        known = isinstance(value, dict) and set(required) <= set(value) <= set(members)
        return known and all(members[name][1](each) for name, each in value.items())

    return schema, fits


SIMPLE = st.one_of(
    st.builds(whole, st.integers(-50, 50), st.integers(0, 300)),
    st.builds(text, st.integers(0, 8)),
    st.builds(
        one_of, st.lists(st.sampled_from(["true", "name", True, None, 12, "a\u00e9"]), min_size=1, unique_by=repr)
    ),
    st.just(({"type": "boolean"}, lambda value: isinstance(value, bool))),
)
SCHEMAS = st.recursive(
    SIMPLE,
    lambda inner: (
        st.builds(array, inner, st.integers(1, 3))
        | st.builds(
            record,
            st.dictionaries(st.sampled_from(["name", "it", "\u00fc", "in th"]), inner, max_size=3),
            st.integers(0, 2),
        )
    ),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(
    schema=SCHEMAS,
    seed=st.integers(0, 1000),
    drafter=st.sampled_from(sorted(DRAFTERS)),
    temperature=st.sampled_from([0.0, 1.0]),
    scheduled=st.booleans(),
)
def test_answers_follow_random_schemas_and_drafts_change_none(
    tokenizer: Tokenizer,
    constraints: Constraints,
    schema: Schema,
    seed: int,
    drafter: str,
    temperature: float,
    scheduled: bool,
) -> None:
    rows = tokenizer.vocab_size + 3  # the target has more rows than the tokenizer has tokens
    logits = MarkovLogits(rows, seed, order=1)
    constraint = constraints.compile(grammar_source(json_schema=schema[0]))
    request = Request(
        (1, 2), 400, SamplingParams(temperature=temperature, seed=seed), frozenset(tokenizer.eos_token_ids),
        TreeLimits(12, 5, 3), ScriptedPolicy(seed) if scheduled else None, constraint,
    )  # fmt: skip
    made = DRAFTERS[drafter](logits)
    tokens, finish, _ = run(ScriptedTarget(logits), made, request)
    plain = run(ScriptedTarget(logits), None, replace(request, limits=None, scheduler=None))
    assert (tokens, finish) == plain[:2] == autoregressive(logits, request)
    assert finish == "stop" and schema[1](json.loads(tokenizer.decode(tokens)))


@settings(max_examples=30, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 1000))
def test_a_matcher_advances_by_allowed_tokens_alone(
    tokenizer: Tokenizer, constraints: Constraints, schema: Schema, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    matcher = constraints.compile(grammar_source(json_schema=schema[0])).begin()
    for _ in range(12):
        if matcher.complete:
            break
        allowed, forced = matcher.allowed(), matcher.forced()
        for token in range(tokenizer.vocab_size + 2):
            went = matcher.advance(token)
            assert went == (token in allowed)
            if went:
                matcher.forced()  # of the place after the token
                matcher.retreat(1)
        assert matcher.allowed().tolist() == allowed.tolist() and matcher.forced() == forced
        assert not forced or allowed.tolist() == [forced[0]]
        assert all(matcher.advance(token) for token in forced)
        matcher.retreat(len(forced))
        assert matcher.advance(int(rng.choice(allowed)))


@pytest.mark.parametrize(
    ("grammar", "texts"),
    [
        ({"regex": "[ab]{2}c?"}, {"aa", "ab", "ba", "bb", "aac", "abc", "bac", "bbc"}),
        (
            {"grammar": 'start: "x" item ("," item)?\nitem: "th" | "in"'},
            {"xth", "xin", "xth,th", "xth,in", "xin,th", "xin,in"},
        ),
    ],
)
def test_every_kind_of_grammar_is_followed(
    tokenizer: Tokenizer, constraints: Constraints, grammar: dict[str, str], texts: set[str]
) -> None:
    found = set()
    constraint = constraints.compile(grammar_source(**grammar))
    for seed in range(200):
        logits = MarkovLogits(tokenizer.vocab_size, 1, sharpness=0.5)
        sampling = SamplingParams(temperature=1.0, seed=seed)
        request = Request((1, 2), 50, sampling, frozenset(tokenizer.eos_token_ids), LIMITS, constraint=constraint)
        tokens, finish, _ = run(ScriptedTarget(logits), ScriptedDrafter.copy_of(logits), request)
        assert finish == "stop"
        found.add(tokenizer.decode(tokens))
    assert found == texts


def test_a_token_that_nothing_allows_is_an_error(tokenizer: Tokenizer, constraints: Constraints) -> None:
    logits = MarkovLogits(10)  # a target with fewer rows than the grammar's first token
    constraint = constraints.compile(grammar_source(regex="true"))
    with pytest.raises(InputError, match="allows none of the target's tokens"):
        run(ScriptedTarget(logits), None, Request((1, 2), 9, constraint=constraint))
