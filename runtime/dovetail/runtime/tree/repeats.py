"""Repeated text as paths of the draft tree: tokens that followed the same run of tokens earlier.

A drafter of one block cannot copy. Models that quote their prompt or repeat themselves do copy. The
paths need no pass of an engine. Their probabilities come from how often repeats were right in this
conversation, so text without repetition loses nothing. Source: prompt lookup decoding (A. Saxena,
2023), here as branches of the tree instead of the whole draft. Earlier texts may be searched too:
suffix decoding (2411.04975), here with runs of a few lengths instead of a suffix tree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from dovetail.runtime.errors import InputError
from dovetail.runtime.system.bounds import check_whole

SIZES = (16, 8, 4, 3, 2, 1)  # lengths of the run of tokens that must have occurred before, longest first

# How often the repeated token was right, before the conversation gives counts of its own. Each pair
# is for the first token of a path and for later tokens. The key is the run's length, and 0 for the
# first path found or 1 for a path that begins with another token. Paths from earlier texts, which
# are right less often, have 2 and 3. The rates are rounded counts over 600 answers that
# SmolLM2-135M-Instruct and Qwen2.5-Coder-0.5B-Instruct wrote for training. The two models agree
# within some hundredths. Rates of earlier texts are counts over 1,024 answers of SmolLM2, each
# after up to 50,000 tokens of the others. A rate weighs as much as PRIOR_TRIES observations.
PRIOR = {
    (16, 0): (0.97, 0.97), (8, 0): (0.9, 0.93), (4, 0): (0.74, 0.89),
    (3, 0): (0.6, 0.84), (2, 0): (0.5, 0.8), (1, 0): (0.23, 0.72),
    (16, 1): (0.2, 0.95), (8, 1): (0.17, 0.92), (4, 1): (0.12, 0.87),
    (3, 1): (0.09, 0.75), (2, 1): (0.1, 0.7), (1, 1): (0.07, 0.67),
    (16, 2): (0.72, 0.73), (8, 2): (0.6, 0.69), (4, 2): (0.39, 0.46),
    (3, 2): (0.31, 0.36), (2, 2): (0.21, 0.28), (1, 2): (0.13, 0.21),
    (16, 3): (0.33, 0.7), (8, 3): (0.28, 0.68), (4, 3): (0.17, 0.44),
    (3, 3): (0.13, 0.39), (2, 3): (0.09, 0.33), (1, 3): (0.08, 0.19),
}  # fmt: skip
PRIOR_TRIES = 4.0
EARLIER = 2  # what a path from earlier texts adds to the second part of its key
LOOKUP_CACHE_MOST = 10**6  # tokens, which take about 1 GB

Run = tuple[int, ...]  # as many tokens as one of SIZES


@dataclass(frozen=True)
class Repeat:
    """A repeated path below the root."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # of the path down to each token, descending
    kind: tuple[int, int]  # the key of PRIOR


@dataclass
class EarlierTexts:
    """The newest texts that an engine has left, and the last two places of each run in them."""

    capacity: int  # tokens of all texts; 0 keeps none
    _texts: dict[int, list[int]] = field(default_factory=dict)  # number -> tokens, the oldest text first
    _ends: dict[Run, tuple[tuple[int, int], ...]] = field(default_factory=dict)  # run -> numbers and ends, newest first
    _opened: int = 0

    def add(self, tokens: Sequence[int]) -> None:
        """Keep a text. The oldest texts go until all fit; a text that is too long loses its beginning."""
        text = list(tokens[-self.capacity :]) if self.capacity else []
        while self._texts and sum(map(len, self._texts.values())) + len(text) > self.capacity:
            self._drop(next(iter(self._texts)))
        if len(text) > 1:
            self._opened += 1
            self._texts[self._opened] = text
            for end in range(1, len(text)):
                for run in _runs(text, end):
                    self._ends[run] = ((self._opened, end), *self._ends.get(run, ())[:1])

    def after(self, run: Run, count: int) -> list[Run]:
        """Return the tokens, at most `count`, that followed the last two occurrences of `run`, newest first."""
        return [tuple(self._texts[number][end : end + count]) for number, end in self._ends.get(run, ())]

    def _drop(self, number: int) -> None:
        """Forget a text. An interrupt leaves the text, and some of its runs unknown."""
        text = self._texts[number]
        for end in range(1, len(text)):
            for run in _runs(text, end):
                if kept := tuple(place for place in self._ends.get(run, ()) if place[0] != number):
                    self._ends[run] = kept
                else:
                    self._ends.pop(run, None)
        del self._texts[number]


@dataclass
class RepeatIndex:
    """The last places of short runs of tokens in a conversation, and counts of right repeats."""

    _tokens: list[int] = field(default_factory=list)
    _ends: dict[Run, tuple[int, ...]] = field(default_factory=dict)  # run -> ends of its last two
    _indexed: int = 0  # runs that end at or before this index are indexed
    _tallies: dict[tuple[int, int], list[list[float]]] = field(default_factory=dict)  # kind -> 2 x [hits, tries]

    def find(
        self, tokens: Sequence[int], count: int, earlier: EarlierTexts | None = None, least: float = 0.0
    ) -> list[Repeat]:
        """Return paths of at most `count` tokens that may follow `tokens`, each with a probability of `least` or more.

        Paths after the longest run come first. No two paths begin with the same token. Paths from
        `earlier` texts are found where the run is longer than any in `tokens`.
        """
        self._follow(tokens)
        found: dict[int, Repeat] = {}
        for size in SIZES:
            pays = self._can_pay((size, min(len(found), 1)), least)
            if not pays and earlier and earlier.capacity and not found:
                pays = self._can_pay((size, EARLIER), least)
            if not pays or len(run := tuple(self._tokens[-size:])) < size:
                continue
            paths, far = [self._copy(end, count) for end in self._ends.get(run, ())], 0
            if earlier and not paths and not found:  # own text first
                paths, far = earlier.after(run, count), EARLIER
            for path in paths:
                if path[0] not in found:
                    kind = size, min(len(found), 1) + far
                    if logprobs := self._logprobs(kind, len(path), least):
                        found[path[0]] = Repeat(path[: len(logprobs)], logprobs, kind)
        return list(found.values())

    def learn(self, repeat: Repeat, truth: Sequence[int]) -> None:
        """Count how many tokens of `repeat` were right. truth: the known tokens that followed."""
        for index, (guess, token) in enumerate(zip(repeat.tokens, truth, strict=False)):
            tally = self._tally(repeat.kind)[min(index, 1)]
            tally[0] += guess == token
            tally[1] += 1
            if guess != token:
                return

    def _follow(self, tokens: Sequence[int]) -> None:
        """Index the new tokens. Start over if the text is another one."""
        known = len(self._tokens)
        if self._tokens != list(tokens[:known]):
            self._tokens, self._ends, self._indexed = [], {}, 0
            known = 0
        self._tokens += tokens[known:]
        # `find` looks for the run at the very end: a run is indexed only once a token follows.
        for end in range(self._indexed + 1, len(self._tokens)):
            for run in _runs(self._tokens, end):
                self._ends[run] = (end, *self._ends.get(run, ())[:1])
        self._indexed = max(self._indexed, len(self._tokens) - 1)

    def _copy(self, start: int, count: int) -> tuple[int, ...]:
        """Return `count` tokens from `start`. Past the end the copy repeats itself like a loop."""
        path = self._tokens[start : start + count]
        for index in range(count - len(path)):
            path.append(path[index])
        return tuple(path)

    def _can_pay(self, kind: tuple[int, int], least: float) -> bool:
        """Whether first tokens of paths of this kind are as probable as `least`."""
        hits, tries = self._tally(kind)[0]
        return hits >= least * tries

    def _logprobs(self, kind: tuple[int, int], count: int, least: float) -> tuple[float, ...]:
        """Return those of a path's first tokens, at most `count`, that are as probable as `least`."""
        first, later = (math.log(hits / tries) for hits, tries in self._tally(kind))
        floor = math.log(least) if least else -math.inf
        return tuple(takewhile(floor.__le__, (first + later * index for index in range(count))))

    def _tally(self, kind: tuple[int, int]) -> list[list[float]]:
        return self._tallies.setdefault(kind, [[rate * PRIOR_TRIES, PRIOR_TRIES] for rate in PRIOR[kind]])


def _runs(tokens: list[int], end: int) -> Iterator[Run]:
    """Yield the runs that end before index `end`."""
    for size in SIZES:
        if end >= size:
            yield tuple(tokens[end - size : end])


def check_lookup_cache(tokens: int) -> None:
    """Raise InputError unless `tokens` is a capacity of EarlierTexts."""
    check_whole("lookup_cache", tokens, InputError, "give tokens to keep, e.g. 50000", least=0, most=LOOKUP_CACHE_MOST)
