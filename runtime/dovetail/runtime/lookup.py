"""Repeated text: what followed the last tokens when they occurred before, as a path for the draft tree.

A drafter of one block cannot copy; models that quote their prompt, or repeat themselves, do.  The path costs no
engine anything.  It enters the tree by what such paths were worth so far in this conversation, so text that does not
repeat itself is not charged for it.
Source: prompt lookup decoding (A. Saxena, 2023), here as a branch of the tree instead of the whole draft.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

SIZES = (4, 3, 2)  # tokens that must have occurred before, longest first

# How often the repeated token came, before a conversation says otherwise: (first, later ones) of a path, by run length.
# Counted on answers of SmolLM2-135M-Instruct and Qwen2.5-Coder-0.5B-Instruct to prompts of their own; each counts as
# PRIOR_TRIES observations.
PRIOR = {2: (0.5, 0.7), 3: (0.6, 0.75), 4: (0.85, 0.92)}
PRIOR_TRIES = 4.0


@dataclass(frozen=True)
class Repeat:
    """A repeated path below the root.  tokens: what may come.  logprobs: of the path down to each, descending."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    size: int


@dataclass
class RepeatIndex:
    """Where every short run of tokens of one conversation occurred last, and what repeats were worth."""

    _tokens: list[int] = field(default_factory=list)
    _ends: dict[tuple[int, ...], int] = field(default_factory=dict)  # run -> index after its last occurrence
    _indexed: int = 0  # runs that end at or before this index are known
    _counts: dict[int, list[list[float]]] = field(default_factory=dict)  # size -> [first, later] x [hits, tries]

    def find(self, tokens: Sequence[int], count: int) -> Repeat | None:
        """At most `count` tokens that may follow `tokens`: those after the longest run that occurred before."""
        self._follow(tokens)
        for size in SIZES:
            end = self._ends.get(tuple(self._tokens[-size:])) if len(self._tokens) > size else None
            if end is not None:
                found = self._tokens[end : end + count]
                return Repeat(tuple(found), tuple(self._logprobs(size, len(found))), size)
        return None

    def judge(self, repeat: Repeat, truth: Sequence[int]) -> None:
        """Learn from what came: `truth` are the tokens that followed, as far as they are known."""
        for index, (guess, token) in enumerate(zip(repeat.tokens, truth, strict=False)):
            tally = self._tally(repeat.size)[min(index, 1)]
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
                    self._ends[tuple(self._tokens[end - size : end])] = end
        self._indexed = max(self._indexed, len(self._tokens) - 1)

    def _logprobs(self, size: int, count: int) -> list[float]:
        first, later = (math.log(hits / tries) for hits, tries in self._tally(size))
        return [first + later * index for index in range(count)]

    def _tally(self, size: int) -> list[list[float]]:
        return self._counts.setdefault(size, [[rate * PRIOR_TRIES, PRIOR_TRIES] for rate in PRIOR[size]])
