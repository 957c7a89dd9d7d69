"""Constraints on the text of an answer: the tokens that a grammar allows, and those that it forces.

Axes: A allowed tokens. llguidance parses grammars and text. A constraint is compiled once for a
tokenizer. Each answer has a matcher of its own, which stands at one place of the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from dovetail.runtime.errors import InputError, install_extra, one_line
from dovetail.runtime.system.arrays import TokenArray
from dovetail.runtime.system.files import check_text, shown

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_KEPT = 64  # compiled grammars of a tokenizer: a server's clients repeat their schemas
# Blanks between the tokens of JSON, as llama.cpp allows them. JSON allows blanks without end, and
# small models then write little else. "x-guidance" in a schema changes this.
_BLANKS = r"(?: |\n{1,2}[ \t]{0,20})?"


class Matcher(Protocol):
    """One answer's place in its grammar."""

    @property
    def complete(self) -> bool:
        """Whether the text is at its end: nothing can follow, or a stop token came."""

    def allowed(self) -> TokenArray:
        """Return the tokens that may come next, ascending [A], stop tokens included."""

    def advance(self, token: int) -> bool:
        """Go on by `token` if it is allowed. Return whether it is."""

    def retreat(self, count: int) -> None:
        """Take the last `count` tokens back."""

    def forced(self) -> tuple[int, ...]:
        """Return the tokens that must come next, none if there is a choice or the text ends."""


@runtime_checkable
class Constraint(Protocol):
    """A grammar for answers. It may be shared by any number of them."""

    def begin(self) -> Matcher:
        """Return a matcher at the beginning of an answer."""


class Constraints:
    """Compiles the grammars of one tokenizer, each once."""

    def __init__(self, tokenizer_json: str, vocab_size: int, digest: str, stop_tokens: Iterable[int]) -> None:
        """digest: names the tokenizer. stop_tokens: end an answer where its grammar allows an end.

        Raises InputError without llguidance, for a tokenizer that it cannot read, and without a
        stop token of the tokenizer.
        """
        self.digest, self._stops = digest, frozenset(token for token in stop_tokens if token < vocab_size)
        if not self._stops:
            raise InputError("a grammar needs a stop token, and this engine has none: give stop_tokens")
        self._tokenizer = _read_tokenizer(tokenizer_json, self._stops)
        self._compiled: dict[str, Grammar] = {}
        self._lock = Lock()

    def compile(self, source: str) -> Grammar:
        """Return the constraint of a `grammar_source`. Raises InputError with llguidance's reason."""
        from llguidance import LLMatcher

        with self._lock:
            found = self._compiled.pop(source, None)
            if found is None:
                matcher = LLMatcher(self._tokenizer, source, log_level=0)
                if matcher.is_error():
                    raise InputError(f"the grammar cannot be used ({_reason(matcher.get_error())}): change it")
                found = Grammar(matcher, self._stops, self._tokenizer.vocab_size, self.digest)
                found.check_retreat()
                while len(self._compiled) >= _KEPT:
                    del self._compiled[next(iter(self._compiled))]
            self._compiled[source] = found
        return found


class Grammar:
    """A compiled grammar. Implements Constraint."""

    def __init__(self, matcher: LLMatcher, stops: frozenset[int], size: int, digest: str) -> None:
        self._matcher, self._stops, self._size, self.digest = matcher, stops, size, digest

    def begin(self) -> GrammarMatcher:
        return GrammarMatcher(self._matcher.deep_copy(), self._stops, self._size)

    def check_retreat(self) -> None:
        """Raise InputError if tokens cannot be taken back, as with max_tokens= in Lark."""
        place = self.begin()
        if first := [token for token in place.allowed().tolist() if token not in self._stops][:1]:
            place.advance(first[0])
            place.retreat(1)


class GrammarMatcher:
    """A place in a grammar. Implements Matcher."""

    def __init__(self, matcher: LLMatcher, stops: frozenset[int], size: int) -> None:
        self._matcher, self._stops, self._size = matcher, stops, size
        self._stopped = False  # by a stop token, which ends an answer whatever the grammar says
        self._forced: list[tuple[int, ...] | None] = [None]  # before each token and after the last; None is unknown

    @property
    def complete(self) -> bool:
        return self._stopped or bool(self._matcher.is_stopped())

    def allowed(self) -> TokenArray:
        if self._stopped:
            return np.array(sorted(self._stops), np.int64)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.flatnonzero(np.unpackbits(bits, bitorder="little"))

    def advance(self, token: int) -> bool:
        if self.complete or token >= self._size:
            return False
        if token in self._stops:
            self._stopped = token in self.allowed()
            self._forced += [None] * self._stopped
            return self._stopped
        if (forced := self.forced()) and token != forced[0]:  # another spelling of the same text
            return False
        taken: int = self._matcher.try_consume_tokens([token])
        self._check()
        self._forced += [None] * taken
        return taken == 1

    def retreat(self, count: int) -> None:
        if not count:
            return
        del self._forced[-count:]
        self._matcher.rollback(count - self._stopped)
        self._stopped = False
        self._check()

    def forced(self) -> tuple[int, ...]:
        known = self._forced[-1]
        if known is None:
            known = self._forced[-1] = () if self.complete else tuple(self._matcher.compute_ff_tokens())
            self._check()
        return known

    def _check(self) -> None:
        """Raise InputError if llguidance has given up, for example on a grammar that is too complex."""
        if self._matcher.is_error():
            raise InputError(f"the grammar fails on this text ({_reason(self._matcher.get_error())}): simplify it")


def grammar_source(
    *,
    json_schema: str | Mapping[str, Any] | None = None,
    regex: str | None = None,
    grammar: str | None = None,
) -> str:
    """Return the source that `Constraints.compile` takes, checked without a tokenizer.

    Give one of the three. json_schema: a schema, or its JSON text; {"type": "object"} is any
    object. regex: for the whole answer. grammar: in llguidance's variant of Lark. Raises InputError.
    """
    given = [
        name
        for name, value in (("json_schema", json_schema), ("regex", regex), ("grammar", grammar))
        if value is not None
    ]
    if len(given) != 1:
        said = " and ".join(given) or "none of json_schema, regex and grammar"
        raise InputError(f"a constraint needs one grammar, and {said} are given: give one")
    kind, text = given[0], regex if regex is not None else grammar
    if json_schema is None and not isinstance(text, str):
        raise InputError(f"{kind} {text!r:.60} is no text: give a string")
    if isinstance(text, str):
        check_text(kind, text, InputError)
    matcher = _llguidance().LLMatcher
    if json_schema is not None:
        source = _schema_source(json_schema)
    else:
        source = matcher.grammar_from_regex(text) if regex is not None else matcher.grammar_from_lark(text)
    if reason := matcher.validate_grammar(source):
        raise InputError(f"{kind} cannot be used ({_reason(reason)}): change it")
    return str(source)


def _schema_source(schema: str | Mapping[str, Any]) -> str:
    try:
        read = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(read, Mapping):
            raise ValueError('a schema is an object, e.g. {"type": "object"}')
        own = read.get("x-guidance")
        chosen = isinstance(own, Mapping) and "whitespace_flexible" in own  # llguidance would prefer the pattern
        options = {} if chosen else {"whitespace_pattern": _BLANKS}
        return str(_llguidance().LLMatcher.grammar_from_json_schema(json.dumps(dict(read)), defaults=options))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"json_schema {schema!r:.60} is no JSON schema ({_reason(one_line(error))}): change it"
        ) from error


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise InputError(f"grammars need llguidance ({error}): {install_extra('grammar')}") from None
    return llguidance


def _read_tokenizer(text: str, stops: frozenset[int]) -> LLTokenizer:
    make = _llguidance().LLTokenizer
    try:
        tokenizer: LLTokenizer = make(text, eos_token=sorted(stops))
    except BaseException as error:
        # ValueError for a kind of tokenizer that llguidance does not know. Other surprises are
        # PanicException, which is no Exception, nor importable.
        if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
            raise
        raise InputError(
            f"llguidance cannot read this tokenizer ({_reason(one_line(error))}): decode without a grammar"
        ) from error
    return tokenizer


def _reason(message: str) -> str:
    """Return llguidance's message in one line, without its dump of state, grammar or stack."""
    return shown(re.split("<(?:state|backtrace)>", message)[0])
