"""A grammar that is a function of the answer so far, for tests and programs without llguidance."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from dovetail.runtime.errors import DeviceError
from dovetail.runtime.system.arrays import TokenArray

Rule = Callable[[tuple[int, ...]], Iterable[int]]  # tokens of the answer so far -> tokens that may follow


class ScriptedConstraint:
    """Allows what `rule` returns, and ends a text where that is nothing. Implements Constraint."""

    def __init__(self, rule: Rule, stop_tokens: Iterable[int] = ()) -> None:
        self.rule, self.stop_tokens = rule, frozenset(stop_tokens)

    def begin(self) -> ScriptedMatcher:
        return ScriptedMatcher(self)


class ScriptedMatcher:
    """A place in a text. Misuse raises DeviceError. Implements Matcher."""

    def __init__(self, constraint: ScriptedConstraint) -> None:
        self._constraint = constraint
        self.text: tuple[int, ...] = ()

    @property
    def complete(self) -> bool:
        return (bool(self.text) and self.text[-1] in self._constraint.stop_tokens) or not self._next()

    def allowed(self) -> TokenArray:
        return np.array(self._next(), np.int64)

    def advance(self, token: int) -> bool:
        allowed = not self.complete and token in self._next()
        if allowed:
            self.text += (token,)
        return allowed

    def retreat(self, count: int) -> None:
        if not 0 <= count <= len(self.text):
            raise DeviceError(f"misuse of a matcher: {count} of {len(self.text)} tokens taken back")
        self.text = self.text[: len(self.text) - count]

    def forced(self) -> tuple[int, ...]:
        path, begin = list[int](), self.text
        while not self.complete and len(found := self._next()) == 1 and len(path) < 100:
            if found[0] in self._constraint.stop_tokens:
                break
            path += found
            self.text += tuple(found)
        self.text = begin
        return tuple(path)

    def _next(self) -> list[int]:
        return sorted(self._constraint.rule(self.text))
