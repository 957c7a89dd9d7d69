"""Many texts that share the passes of one target. When a text ends, the next begins at once.

Axes: n rows of one text in a pass, D feature size.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from dovetail.runtime.loop.sequence import Found, Request, Sequence, Step
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.system.arrays import FloatArray
from dovetail.runtime.target.session import Target

PROMPT_TOKENS = 512  # prompt tokens admitted to a pass, so that running answers do not wait


@dataclass(frozen=True, eq=False)
class Advance:
    """The result of a pass for one text."""

    sequence: Sequence
    step: Step
    features: FloatArray  # [n, D], a copy, of the tokens that were run


class SequenceBatch:
    """Continuous batching: one token per text and pass. slots: the most texts at a time."""

    def __init__(self, target: Target, slots: int) -> None:
        self.target = target
        self._slots: list[Sequence | None] = [None] * slots

    def run(
        self, requests: Iterable[Request], new_sampler: Callable[[Request], Sampler] | None = None
    ) -> Generator[Advance, None, None]:
        """Answer every request. Yield the advances pass by pass, in the order of the slots.

        Prompts are read whole. new_sampler: makes the sampler of each request in place of its own.
        Raises ContextOverflow, and the target's errors.
        """
        waiting = iter(requests)
        try:
            while True:
                self._admit(waiting, new_sampler)
                if not (active := [sequence for sequence in self._slots if sequence]):
                    return
                for advance in self._step(active):
                    if advance.step.finish:
                        self._evict(advance.sequence)
                    yield advance
        finally:
            for sequence in filter(None, self._slots):
                self._evict(sequence)

    def _admit(self, waiting: Iterator[Request], new_sampler: Callable[[Request], Sampler] | None) -> None:
        budget = PROMPT_TOKENS
        for index, held in enumerate(self._slots):
            if held or budget <= 0:
                continue
            if (request := next(waiting, None)) is None:
                return
            self._slots[index] = sequence = Sequence(self.target)
            sequence.begin(request, new_sampler(request) if new_sampler else None)
            budget -= len(request.prompt)

    def _step(self, active: list[Sequence]) -> list[Advance]:
        """Run one pass. Choose all tokens before a commit, which may reuse the pass's memory."""
        prompts = {each.id: np.array(each.tokens, np.int64) for each in active if not each.length}
        offers = {each.id: each.draft().tree for each in active if each.length}
        passes = self.target.verify(offers, prompts)
        advances, found = list[Advance](), list[tuple[Sequence, Found]]()
        for each in active:
            if each.id in prompts:
                features = np.array(passes[each.id].features)
                advances.append(Advance(each, each.first(passes[each.id]), features))
            else:
                found.append((each, each.accept(offers[each.id], passes[each.id])))
                advances.append(Advance(each, found[-1][1].step, found[-1][1].features))
        for each, one in found:
            each.commit(one.verdict.path[: len(one.step.tokens) + 1], one.step.tokens)
        return advances

    def _evict(self, sequence: Sequence) -> None:
        sequence.close()
        self._slots[self._slots.index(sequence)] = None
