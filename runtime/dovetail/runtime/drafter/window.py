"""The last context pairs of one text: those that the drafter has not read or must read again.

Axes: n pairs, D feature size. Pair t is the target's feature f[t] and the token x[t+1] after it.

The target computes a feature for every token. The drafter reads pairs when it drafts. The window
keeps the last KEPT pairs on the host. The drafter starts over with them in three cases: its context
is full, more pairs wait than the window keeps, or the drafter moved to another device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dovetail.runtime.drafter.session import KEPT, Ask, Drafter, DraftNoise, DraftsTogether, Moved, ReadsTokens
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.system.arrays import FloatArray, SequenceId, TokenArray
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.growth import Judge
from dovetail.runtime.tree.limits import TreeLimits


class _Kept(NamedTuple):
    """Features [n, D] of the last pairs, in parts as they came. begin, end: numbers of the pairs."""

    begin: int = 0
    end: int = 0
    parts: tuple[FloatArray, ...] = ()

    def last(self, count: int) -> FloatArray:
        """Return the last `count` rows, at least one, in one array."""
        taken = list[FloatArray]()
        for part in reversed(self.parts):
            taken.append(part[-count:])
            count -= len(part)
            if count <= 0:
                break
        return np.concatenate(taken[::-1])

    def without(self, rows: int) -> _Kept:
        begin, parts = self.begin + rows, self.parts
        while rows and rows >= len(parts[0]):
            rows, parts = rows - len(parts[0]), parts[1:]
        return _Kept(begin, self.end, (parts[0][rows:], *parts[1:]) if rows else parts)


class Reading(ABC):
    """How far the drafter has read one text, in pairs.

    start: number of the first pair that the drafter holds. length: pairs that it certainly holds.
    `length` grows after a call of the drafter and shrinks before one. An interrupt at any point
    therefore leaves it right, and `rewind` brings the drafter back to it.
    """

    def __init__(self, drafter: Drafter, seq: SequenceId) -> None:
        self.drafter, self.seq = drafter, seq
        self.start = self.length = 0

    @property
    @abstractmethod
    def waiting(self) -> int:
        """Pairs that the drafter has not read."""

    @abstractmethod
    def add(self, features: FloatArray) -> None:
        """Append pairs. features: [n, D]."""

    @abstractmethod
    def reach(self, pairs: int) -> int:
        """Return the most pairs, up to `pairs`, after which the drafter can go on."""

    @abstractmethod
    def cut(self, keep: int) -> None:
        """Forget pair `keep` and all later ones. The drafter follows at the next `rewind`."""

    @abstractmethod
    def follow(self, other: Reading, pairs: int) -> None:
        """Begin a text with the first `pairs` pairs of another text."""

    @abstractmethod
    def park(self) -> None:
        """Free what the drafter holds. `rewind` follows."""

    @abstractmethod
    def due(self, tokens: Sequence[int]) -> tuple[TokenArray, FloatArray]:
        """Return what the drafter shall read, for its `extend`; `done` follows. tokens: the whole text."""

    @abstractmethod
    def done(self) -> None:
        """Count what `due` returned as read."""

    @abstractmethod
    def start_over(self) -> None:
        """Let a drafter that holds nothing read the last pairs next."""

    def flush(self, tokens: Sequence[int], noise: DraftNoise | None) -> None:
        """Let the drafter read the waiting pairs. tokens: the whole text. noise: see Drafter."""
        self.sync()
        while self.waiting:
            try:
                self.drafter.extend(self.seq, *self.due(tokens), noise)
                self.done()
            except Moved:
                self.start_over()

    def propose(
        self, tokens: Sequence[int], limits: TreeLimits, judge: Judge | None, noise: DraftNoise | None
    ) -> DraftTree:
        """Return the drafter's tree below the last of `tokens`. It reads waiting pairs first."""
        while True:
            self.flush(tokens, noise)
            try:
                return self.drafter.propose(self.seq, limits, judge, noise)
            except Moved:
                self.start_over()

    def rewind(self) -> None:
        """Bring the drafter back to `length` pairs. Raises DeviceError."""
        self.sync()
        self.drafter.rewind(self.seq, self.length)
        if (held := self.drafter.length(self.seq)) != self.length:
            raise DeviceError(f"the drafter holds {held} pairs after a rewind to {self.length}: open the engine again")

    def sync(self) -> None:
        """Start over if the drafter has moved in a call for another text, or before an interrupt."""
        if self.drafter.length(self.seq) < self.length:
            self.start_over()


class Window(Reading):
    """The last pairs of one text, with features, and how many of them its drafter holds."""

    def __init__(self, drafter: Drafter, seq: SequenceId) -> None:
        super().__init__(drafter, seq)
        self._kept = _Kept()

    @property
    def waiting(self) -> int:
        """Pairs that the drafter has not read."""
        return self._kept.end - max(self._read_to, self._kept.begin)

    @property
    def _read_to(self) -> int:
        """Number of the first unread pair. A drafter that holds none can begin with any pair."""
        return self.start + self.length if self.length else self._kept.begin

    def add(self, features: FloatArray) -> None:
        """Append pairs. features: [n, D], of which the window keeps a copy."""
        begin, end, parts = self._kept
        kept = _Kept(begin, end + len(features), (*parts, np.array(features)))
        self._kept = kept.without(max(kept.end - kept.begin - KEPT, 0))

    def reach(self, pairs: int) -> int:
        """Return the most pairs, up to `pairs`, after which the drafter can go on.

        The drafter has read these pairs, or the window keeps the last of them.
        """
        pairs = min(pairs, self._kept.end)
        return pairs if pairs > self._kept.begin else min(pairs, self._read_to)

    def cut(self, keep: int) -> None:
        """Forget pair `keep` and all later ones. The drafter follows at the next `rewind`."""
        self.length = max(min(self.length, keep - self.start), 0)
        self.start = min(self.start, keep)
        kept = self._kept
        if keep <= kept.begin:
            end = min(keep, self._read_to)
            self._kept = _Kept(end, end)
        elif keep < kept.end:
            features = kept.last(kept.end - kept.begin)
            self._kept = _Kept(kept.begin, keep, (features[: keep - kept.begin],))

    def follow(self, other: Reading, pairs: int) -> None:
        """Begin a text with the first `pairs` pairs of another text. The drafter may read those that it keeps."""
        assert isinstance(other, Window)
        kept = other._kept
        self._kept = _Kept(pairs, pairs)
        if kept.begin < pairs <= kept.end:
            features = kept.last(kept.end - kept.begin)
            self._kept = _Kept(kept.begin, pairs, (features[: pairs - kept.begin],))

    def park(self) -> None:
        """Free what the drafter holds; the window keeps its pairs. `rewind` follows."""
        self.length = 0

    def start_over(self) -> None:
        """Let a drafter that holds nothing read the kept pairs next."""
        self.length = 0

    def due(self, tokens: Sequence[int]) -> tuple[TokenArray, FloatArray]:
        """Return the pairs that the drafter shall read, for its `extend`; `done` follows."""
        kept, count, capacity = self._kept, self.waiting, self.drafter.capacity
        if not self.length or kept.begin > self._read_to or self.length + count > capacity:
            self.length = 0
            self.drafter.rewind(self.seq, 0)
            count = min(max(min(KEPT, capacity // 2), min(count, capacity)), kept.end - kept.begin)
            self.start = kept.end - count
        after = tokens[kept.end - count + 1 : kept.end + 1]
        return np.array(after, np.int64), kept.last(count)

    def done(self) -> None:
        """Count the pairs of `due` as read."""
        self.length = self._kept.end - self.start


class TokenWindow(Reading):
    """How far a drafter has read a text that it reads by tokens alone.

    A drafter whose context is full starts over with the last half of it.
    A drafter that moved to another device starts over with the last KEPT pairs.
    """

    def __init__(self, drafter: Drafter, seq: SequenceId) -> None:
        super().__init__(drafter, seq)
        self._known = 0

    @property
    def waiting(self) -> int:
        """Pairs that the drafter has not read."""
        return self._known - self.start - self.length

    def add(self, features: FloatArray) -> None:
        """Count pairs. features: [n, D]."""
        self._known += len(features)

    def reach(self, pairs: int) -> int:
        """Return `pairs`: the drafter can go on after any, because it can read the text again."""
        return pairs

    def cut(self, keep: int) -> None:
        """Forget pair `keep` and all later ones. The drafter follows at the next `rewind`."""
        self.length, self._known = max(min(self.length, keep - self.start), 0), keep
        if not self.length:
            self.start = 0

    def follow(self, other: Reading, pairs: int) -> None:
        """Begin a text with the first `pairs` pairs of another text."""
        self._known = pairs

    def park(self) -> None:
        """Free what the drafter holds. `rewind` follows."""
        self.length = self.start = 0

    def due(self, tokens: Sequence[int]) -> tuple[TokenArray, FloatArray]:
        """Return the tokens that the drafter shall read, for its `extend`; `done` follows."""
        if full := self.length + self.waiting > self.drafter.capacity:
            self.length = 0
            self.start = max(self._known - self.drafter.capacity // 2, 0)
        if full or not self.length:
            self.drafter.rewind(self.seq, 0)
        begin = self.start + self.length + bool(self.length)
        new = np.array(tokens[begin : self._known + 1], np.int64)
        return new, np.zeros((len(new), 0), np.float32)

    def start_over(self) -> None:
        """Let a drafter that holds nothing read the last KEPT pairs next."""
        self.length, self.start = 0, max(self._known - KEPT, 0)

    def done(self) -> None:
        """Count the tokens of `due` as read."""
        self.length = self._known - self.start


def window(drafter: Drafter, seq: SequenceId) -> Reading:
    """Return the window of one text for a drafter."""
    return TokenWindow(drafter, seq) if isinstance(drafter, ReadsTokens) else Window(drafter, seq)


class Drafting(NamedTuple):
    """A text for `propose_together`."""

    window: Reading
    tokens: Sequence[int]  # of the whole text
    ask: Ask


def propose_together(texts: Sequence[Drafting]) -> list[DraftTree]:
    """Return a tree below the last token of each text. Calls of their drafter run rows of all texts."""
    if not texts:
        return []
    drafter = texts[0].window.drafter
    assert isinstance(drafter, DraftsTogether)
    while True:
        try:
            for text in texts:
                text.window.sync()
            waiting = [text for text in texts if text.window.waiting]
            drafter.extend_all({text.window.seq: text.window.due(text.tokens) for text in waiting})
            for text in waiting:
                text.window.done()
            trees = drafter.propose_all({text.window.seq: text.ask for text in texts})
            return [trees[text.window.seq] for text in texts]
        except Moved:
            for text in texts:
                text.window.start_over()
