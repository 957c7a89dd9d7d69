"""Read an answer again with its target: the tokens that the target chooses, and how clearly.

Axes: A tokens of the answer, V target vocabulary.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dovetail.runtime.errors import InputError
from dovetail.runtime.loop.sequence import Sequence
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.system.arrays import FloatArray
from dovetail.runtime.tree.draft_tree import DraftTree

_CHAIN = 12  # nodes per pass: a width of trees, for which the target has prepared kernels


class Choice(NamedTuple):
    """The target's choice in place of a token of an answer."""

    token: int
    margin: float | None  # its logit minus that of the answer's token; None if more than logits decide


def read_again(
    sequence: Sequence, prompt: abc.Sequence[int], answer: abc.Sequence[int], sampler: Sampler
) -> list[Choice]:
    """Return a Choice for each of the A tokens of `answer`. `sequence` then holds this text alone.

    The target reads chains, whose rows have the bits of any tree's. Raises InputError for
    a token id that the target does not have.
    """
    seen, found = list(prompt), list[Choice]()
    for token, logits in zip(answer, _logits(sequence, prompt, answer), strict=True):
        if not 0 <= token < len(logits):
            raise InputError(f"token id {token} is none of the target's {len(logits)}: give an answer of its own")
        chosen = sampler.pick(logits, len(seen), seen)
        clear = sampler.params.greedy and not sampler.params.reshapes
        found.append(Choice(chosen, float(logits[chosen] - logits[token]) if clear else None))
        seen.append(token)
    return found


def _logits(sequence: Sequence, prompt: abc.Sequence[int], answer: abc.Sequence[int]) -> Iterator[FloatArray]:
    """Yield the target's logits [V] for each token of `answer`, valid until the next yield."""
    sequence.forget()
    sequence.tokens, sequence.prompted = list(prompt), len(prompt)
    try:
        yield from sequence.prefill().logits[-1:][: len(answer)]
        for begin in range(0, len(answer) - 1, _CHAIN):
            tokens = np.array(answer[begin : min(begin + _CHAIN, len(answer) - 1)], np.int64)
            passes = sequence.target.verify({sequence.id: DraftTree.chain(tokens)}, rows=_CHAIN)
            yield from passes[sequence.id].logits
            sequence.commit(np.arange(len(tokens)), tokens.tolist())
    finally:
        sequence.rewind()
