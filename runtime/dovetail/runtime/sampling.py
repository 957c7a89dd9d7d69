"""From the target's logits to a token: processors, and noise keyed by position.

Axes: V target vocabulary, S tokens that survived the processors.
Processors and their order are those of transformers' generate: repetition penalty, temperature, top-k,
top-p, min-p. The noise of a token depends on the seed and the token's absolute position alone, so a seed
draws the same whether tokens are found one by one or as the path of a tree.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DeviceError, InputError

Noise = Callable[[int], float]

_SEED_LIMIT = 2**63
_BLOCK = 1024  # probabilities that are summed before one is looked for among them


@dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen from the target's logits. The defaults are greedy decoding.

    temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. min_p: share of the best token's probability,
    0 is off. repetition_penalty: 1 is off, above 1 discourages tokens of the prompt and the answer.
    seed: None draws one when a generation samples.
    Raises InputError that names the value.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, lambda t: t >= 0, "0 (greedy) or more, e.g. 0.7")
        _check_whole("top_k", self.top_k, None, "0 (off) or more, e.g. 40")
        _check_number("top_p", self.top_p, lambda p: 0 < p <= 1, "more than 0 and at most 1 (off), e.g. 0.95")
        _check_number("min_p", self.min_p, lambda p: 0 <= p <= 1, "from 0 (off) to 1, e.g. 0.05")
        _check_number("repetition_penalty", self.repetition_penalty, lambda r: r > 0, "more than 0; 1 is off, e.g. 1.1")
        if self.seed is not None:
            _check_whole("seed", self.seed, _SEED_LIMIT, "from 0 to 2**63 - 1, or None for a random one")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def seeded(self) -> SamplingParams:
        """The same with a seed: drawn now if sampling needs one and none was given."""
        if self.greedy or self.seed is not None:
            return self
        return replace(self, seed=secrets.randbelow(2**32))


def _check_number(name: str, value: float, fits: Callable[[float], bool], remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not fits(value):
        raise InputError(f"{name} {value!r} is out of range: give {remedy}")


def _check_whole(name: str, value: int, limit: int | None, remedy: str) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < 0 or (limit is not None and value >= limit):
        raise InputError(f"{name} {value!r} is out of range: give a whole number {remedy}")


def philox_noise(seed: int) -> Noise:
    """One uniform in [0, 1) per absolute position: position is the counter, seed the key."""

    def noise(position: int) -> float:
        return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())

    return noise


@dataclass(frozen=True, eq=False)
class Support:
    """The tokens that may be chosen.  ids: [S] int64, ascending.  probs: [S] float64, sum 1.

    Both may be the sampler's own memory: valid until its next call.
    """

    ids: NDArray[np.int64]
    probs: NDArray[np.float64]


class Sampler:
    """Chooses tokens for one generation; works on the rows it is asked for, nothing ahead.

    noise: uniform in [0, 1) for an absolute position; the default is keyed by params.seed.
    """

    def __init__(self, params: SamplingParams, noise: Noise | None = None) -> None:
        self.params = params.seeded()
        self.noise = noise or philox_noise(self.params.seed or 0)
        # Of the whole vocabulary, kept: fresh memory of a megabyte is slower to get than to fill.
        self._ids, self._scores = np.empty(0, np.int64), np.empty(0, np.float64)

    def pick(self, logits: NDArray[np.float32], position: int, context: Sequence[int]) -> int:
        """The token at absolute `position`.

        logits: [V] float32, given `context`: every token id before the position, path included.
        Raises DeviceError when the logits are not finite.
        """
        if not self.params.greedy:
            support = self.support(logits, context)
            return int(support.ids[self.draw(support.probs, position)])
        scores = self._penalised(logits, context)
        token = int(scores.argmax())
        _check_finite(float(scores[token]))
        return token

    def distribution(self, logits: NDArray[np.float32], context: Sequence[int]) -> NDArray[np.float64]:
        """[V] float64: the probability of each token to be chosen; one-hot when greedy."""
        probs = np.zeros(len(logits), np.float64)
        if self.params.greedy:
            probs[self.pick(logits, 0, context)] = 1.0
        else:
            support = self.support(logits, context)
            probs[support.ids] = support.probs
        return probs

    def draw(self, probs: NDArray[np.float64], position: int) -> int:
        """Index into probs [S] by inverse CDF of the position's noise: index i has the interval of length probs[i].

        The CDF is that of blocks, and within one of them: a running sum over a whole vocabulary takes longer than all
        else here.
        """
        blocks = np.add.reduceat(probs, np.arange(0, len(probs), _BLOCK)).cumsum()
        sought = self.noise(position) * blocks[-1]
        block = _interval(blocks, sought)
        begin = block * _BLOCK
        before = blocks[block - 1] if block else 0.0
        return begin + _interval(probs[begin : begin + _BLOCK].cumsum(), sought - before)

    def support(self, logits: NDArray[np.float32], context: Sequence[int]) -> Support:
        """The processed distribution at a temperature above 0."""
        params = self.params
        if len(self._ids) != len(logits):
            self._ids, self._scores = np.arange(len(logits)), np.empty(len(logits), np.float64)
        scores, ids = self._scores, self._ids
        scores[:] = self._penalised(logits, context)
        top = float(scores.max())
        _check_finite(top)
        if 0 < params.top_k < len(scores):
            ids = np.flatnonzero(scores >= np.partition(scores, -params.top_k)[-params.top_k])  # keeps ties
            scores = scores[ids]
        with np.errstate(over="ignore", under="ignore"):  # a tiny temperature leaves the best token alone
            scores -= top
            scores /= params.temperature
            probs = np.exp(scores, out=scores)
        probs /= probs.sum()
        if params.top_p < 1:
            kept = _nucleus(probs, params.top_p)
            ids, probs = ids[kept], probs[kept]
        if params.min_p > 0:
            kept = np.flatnonzero(probs >= params.min_p * probs.max())
            ids, probs = ids[kept], probs[kept]
        return Support(ids, probs if len(probs) == len(logits) else probs / probs.sum())

    def _penalised(self, logits: NDArray[np.float32], context: Sequence[int]) -> NDArray[np.floating[Any]]:
        """Scores of tokens in the context, divided by the penalty, or multiplied when negative."""
        penalty = self.params.repetition_penalty
        if penalty == 1:
            return logits
        seen = np.fromiter(context, np.int64, len(context))
        penalised = logits.astype(np.float64)
        scores = penalised[seen]
        penalised[seen] = np.where(scores < 0, scores * penalty, scores / penalty)
        return penalised


def _interval(cdf: NDArray[np.float64], sought: float) -> int:
    """Index of the interval of a CDF that `sought` lies in; the last that is not empty where rounding leaves none."""
    index = int(cdf.searchsorted(sought, side="right"))
    return index if index < len(cdf) else int(cdf.searchsorted(cdf[-1]))


def _nucleus(probs: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Indices, ascending, of the fewest best tokens that hold top_p of the mass; at least one.

    Tokens below (1 - top_p) / S hold less than 1 - top_p together, so none of them is needed: only the rest,
    a few hundred of a large vocabulary, is sorted. Half of it as the bound leaves room for rounding.
    """
    likely: NDArray[np.int64] = np.flatnonzero(probs >= 0.5 * (1 - top_p) / len(probs))
    values = probs[likely]
    ranked = np.sort(values)[::-1]  # values alone: several times faster than argsort
    count = min(int(ranked.cumsum().searchsorted(top_p)) + 1, len(ranked))  # the token that reaches top_p is in
    last = ranked[count - 1]
    kept = values > last
    kept[np.flatnonzero(values == last)[: count - np.count_nonzero(kept)]] = True  # of ties the first ids
    return likely.compress(kept)


def _check_finite(best: float) -> None:
    if not math.isfinite(best):
        raise DeviceError(f"the target's best logit is {best}: its weights or its precision are broken, check the pair")
