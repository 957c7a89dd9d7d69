"""Repeated text: what followed the last tokens when they occurred before, as paths for the draft tree.

A drafter of one block cannot copy; models that quote their prompt, or repeat themselves, do.  The paths cost no
engine anything.  They enter the tree by what such paths were worth so far in this conversation, so text that does not
repeat itself is not charged for them.
Source: prompt lookup decoding (A. Saxena, 2023), here as branches of the tree instead of the whole draft.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

SIZES = (16, 8, 4, 3, 2, 1)  # tokens that must have occurred before, longest first

# How often the repeated token came, before a conversation says otherwise: (first, later ones) of a path, by the length
# of the run and whether its first token is the first guess (0) or another than that of a path found before it (1).
# Rounded from counts on 600 answers that SmolLM2-135M-Instruct and Qwen2.5-Coder-0.5B-Instruct wrote for training, in
# which the two agree within some hundredths.  A rate counts as much as PRIOR_TRIES observations.
PRIOR = {
    (16, 0): (0.97, 0.97), (8, 0): (0.9, 0.93), (4, 0): (0.74, 0.89),
    (3, 0): (0.6, 0.84), (2, 0): (0.5, 0.8), (1, 0): (0.23, 0.72),
    (16, 1): (0.2, 0.95), (8, 1): (0.17, 0.92), (4, 1): (0.12, 0.87),
    (3, 1): (0.09, 0.75), (2, 1): (0.1, 0.7), (1, 1): (0.07, 0.67),
}  # fmt: skip
PRIOR_TRIES = 4.0


@dataclass(frozen=True)
class Repeat:
    """A repeated path below the root.

    tokens: what may come.  logprobs: of the path down to each, descending.  kind: run length, and 0 for the first guess
    or 1 for one that begins otherwise than one found before it.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    kind: tuple[int, int]


@dataclass
class RepeatIndex:
    """Where every short run of tokens of one conversation occurred last, and what repeats were worth."""

    _tokens: list[int] = field(default_factory=list)
    _ends: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)  # run -> after its last occurrences
    _indexed: int = 0  # runs that end at or before this index are known
    _tallies: dict[tuple[int, int], list[list[float]]] = field(default_factory=dict)  # kind -> 2 x [hits, tries]

    def find(self, tokens: Sequence[int], count: int) -> list[Repeat]:
        """What may follow `tokens`, `count` tokens each: of the longest run first, no two with the same first token."""
        self._follow(tokens)
        found: dict[int, Repeat] = {}
        for size in SIZES:
            ends = self._ends.get(tuple(self._tokens[-size:]), ()) if len(self._tokens) > size else ()
            for end in ends:
                first = self._tokens[end]
                if first not in found:
                    kind = size, min(len(found), 1)
                    found[first] = Repeat(self._copy(end, count), self._logprobs(kind, count), kind)
        return list(found.values())

    def judge(self, repeat: Repeat, truth: Sequence[int]) -> None:
        """Learn from what came: `truth` are the tokens that followed, as far as they are known."""
        for index, (guess, token) in enumerate(zip(repeat.tokens, truth, strict=False)):
            tally = self._tally(repeat.kind)[min(index, 1)]
            tally[0] += guess == token
            tally[1] += 1
            if guess != token:
                return

    def _follow(self, tokens: Sequence[int]) -> None:
        """Index what is new; start over when the text is another one."""
        known = len(self._tokens)
        if self._tokens != list(tokens[:known]):
            self._tokens, self._ends, self._indexed = [], {}, 0
            known = 0
        self._tokens += tokens[known:]
        # The run at the very end is what is looked for: it is indexed once there is a token after it.
        for end in range(self._indexed + 1, len(self._tokens)):
            for size in SIZES:
                if end >= size:
                    run = tuple(self._tokens[end - size : end])
                    self._ends[run] = (end, *self._ends.get(run, ())[:1])
        self._indexed = max(self._indexed, len(self._tokens) - 1)

    def _copy(self, start: int, count: int) -> tuple[int, ...]:
        """`count` tokens from `start` on; past the end it goes on with what it has copied, as a loop does."""
        path = self._tokens[start : start + count]
        for index in range(count - len(path)):
            path.append(path[index])
        return tuple(path)

    def _logprobs(self, kind: tuple[int, int], count: int) -> tuple[float, ...]:
        first, later = (math.log(hits / tries) for hits, tries in self._tally(kind))
        return tuple(first + later * index for index in range(count))

    def _tally(self, kind: tuple[int, int]) -> list[list[float]]:
        return self._tallies.setdefault(kind, [[rate * PRIOR_TRIES, PRIOR_TRIES] for rate in PRIOR[kind]])
