"""Log-probabilities of chosen tokens and of their best alternatives.

Axes: V target vocabulary. The distribution is the target's own: the log-softmax of its logits,
before bias, penalties, grammar and temperature. OpenAI's API and vLLM's `raw_logprobs` report it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dovetail.runtime.system.arrays import FloatArray


@dataclass(frozen=True)
class TokenLogprobs:
    """A token of an answer, with natural logarithms of probabilities."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # the best token ids and theirs, best first; equal ones by id


def token_logprobs(logits: FloatArray, token: int, count: int) -> TokenLogprobs:
    """Return the log-probability of `token`, and of the `count` best tokens. logits: [V]."""
    scores = logits.astype(np.float64)
    scores -= scores.max()
    scores -= np.log(np.exp(scores).sum())
    return TokenLogprobs(token, float(scores[token]), _best(scores, min(count, len(scores))))


def _best(scores: np.ndarray[tuple[int], np.dtype[np.float64]], count: int) -> tuple[tuple[int, float], ...]:
    if not count:
        return ()
    candidates = np.flatnonzero(scores >= np.partition(scores, -count)[-count])
    ranked = candidates[np.argsort(-scores[candidates], kind="stable")][:count]
    return tuple(zip(ranked.tolist(), scores[ranked].tolist(), strict=True))
