"""Choose a token from the target's logits: processors, and noise keyed by position.

Axes: V target vocabulary, A tokens that a grammar allows, S tokens that pass the processors.

The processors, in order: logit bias, repetition penalty, frequency penalty, presence penalty, the
grammar, temperature, top-k, top-p, min-p. transformers' generate has the same order, without the
frequency and presence penalties: sequence bias, repetition penalty, allowed tokens, the warpers.
vLLM adds the logit bias first too. Its `apply_penalties` applies repetition, frequency and presence
in this order, the last two over the tokens of the answer alone.

The sampler draws by the Gumbel-max trick: it takes the token with the best sum of logit and
temperature x noise. A token's noise depends on the seed and the absolute position alone. A seed
therefore draws the same tokens one by one or along the path of a tree. The drafter adds part of the
same noise to its own logits, so that its proposals agree with the target's samples more often.
Source of the shared noise: Daliri, Musco and Suresh, Coupling without Communication and
Drafter-Invariant Speculative Decoding (arXiv 2408.07978).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.errors import DeviceError, InputError
from dovetail.runtime.sampling.noise import Noise, gumbel_noise
from dovetail.runtime.sampling.params import SamplingParams

_KEPT = 16  # positions whose noise is kept: a tree's levels use the noise before the target does
# The share of the noise that a drafter adds to its logits. If the target is surer than the drafter,
# noise decides less, and the drafter's best token is the better guess (docs/results/sampling.md).
TRUST = 0.6
_HOTTEST = 1e4  # highest temperature of a drafter's noise; above it the logits do not matter


class Sampler:
    """Chooses tokens for one generation, and computes only the rows that a caller passes.

    noise: returns a position's noise for the whole vocabulary; by default keyed by params.seed.
    prompt_tokens: of each context, those before the answer. Presence and frequency leave them out.
    """

    def __init__(self, params: SamplingParams, noise: Noise | None = None, *, prompt_tokens: int = 0) -> None:
        self.params, self.prompt_tokens = params.seeded(), prompt_tokens
        self._reshapes, bias = params.reshapes, dict(params.logit_bias)
        self._biased, self._bias = np.array([*bias], np.int64), np.array([*bias.values()], np.float64)
        self._new_noise = noise or gumbel_noise(self.params.seed or 0)
        self._size = 0  # V, 0 until the first sampled token
        self._noise: dict[int, NDArray[np.float32]] = {}  # position -> noise, the newest last
        # Buffers for the whole vocabulary: allocating a megabyte takes longer than filling it.
        self._ids, self._scores = np.empty(0, np.int64), np.empty(0, np.float64)

    def pick(
        self,
        logits: NDArray[np.float32],
        position: int,
        context: Sequence[int],
        allowed: NDArray[np.int64] | None = None,
    ) -> int:
        """Return the token at absolute `position`.

        logits: [V] float32, given `context`. context: every token id before the position, path
        included. allowed: [A], the tokens to choose from, ascending; None for all. Raises DeviceError
        if the logits are not finite, and InputError if no token is allowed.
        """
        scores, params = self._processed(logits, context), self.params
        if allowed is not None:
            allowed = allowed[: allowed.searchsorted(len(logits))]
            if not len(allowed):
                raise InputError("the grammar allows none of the target's tokens here: change the grammar")
            scores = scores[allowed]
        if params.greedy:
            best = int(scores.argmax())
            _check_finite(float(scores[best]))
            return best if allowed is None else int(allowed[best])
        self._size = len(logits)
        if not params.top_k and params.top_p == 1 and params.min_p == 0:
            drawn = self.draw(scores, allowed, position)
            return drawn if allowed is None else int(allowed[drawn])
        kept, _ = self._support(scores)
        ids = kept if allowed is None else allowed[kept]
        return int(ids[self.draw(scores[kept], ids, position)])

    def distribution(self, logits: NDArray[np.float32], context: Sequence[int]) -> NDArray[np.float64]:
        """Return [V] float64, the probability that each token is chosen; one-hot when greedy."""
        probs = np.zeros(len(logits), np.float64)
        if self.params.greedy:
            probs[self.pick(logits, 0, context)] = 1.0
        else:
            ids, kept = self._support(self._processed(logits, context))
            probs[ids] = kept
        return probs

    def draw(self, scores: NDArray[np.floating[Any]], ids: NDArray[np.int64] | None, position: int) -> int:
        """Return an index into `scores` [S], drawn from their softmax at the temperature.

        ids: [S], the tokens of the scores, None for the whole vocabulary. Raises DeviceError if the
        scores are not finite.
        """
        noise = self.noise(position) if ids is None else self.noise(position)[ids]
        heat = np.float64(self.params.temperature)
        # Each form avoids overflow in its range of temperatures.
        perturbed = scores / heat + noise if heat > 1 else scores + heat.astype(np.float32) * noise
        index = int(perturbed.argmax())
        _check_finite(float(perturbed[index]))
        return index

    def noise(self, position: int) -> NDArray[np.float32]:
        """Return [V] float32, the vocabulary's noise at an absolute position, from a cache."""
        found = self._noise.pop(position, None)
        if found is None:
            found = self._new_noise(position, self._size)
            while len(self._noise) >= _KEPT:
                del self._noise[next(iter(self._noise))]
        self._noise[position] = found
        return found

    def ahead(self, position: int, ids: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """Return [K] float32 to add to a drafter's logits of the tokens `ids` [K].

        The result is zeros before the first `pick`, and for greedy decoding.
        """
        if not self._size:
            return np.zeros(len(ids), np.float32)
        scale = np.float32(TRUST * min(self.params.temperature, _HOTTEST))
        noise: NDArray[np.float32] = scale * self.noise(position)[ids]
        return noise

    def _support(self, given: NDArray[np.floating[Any]]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the indices that may be chosen, ascending [S], and their probabilities [S].

        given: [V] or [A], processed logits. Both results are valid until the next call.
        """
        params = self.params
        if len(self._ids) != len(given):
            self._ids, self._scores = np.arange(len(given)), np.empty(len(given), np.float64)
        scores, ids = self._scores, self._ids
        scores[:] = given
        top = float(scores.max())
        _check_finite(top)
        if 0 < params.top_k < len(scores):
            ids = np.flatnonzero(scores >= np.partition(scores, -params.top_k)[-params.top_k])  # keeps ties
            scores = scores[ids]
        with np.errstate(over="ignore", under="ignore"):  # a tiny temperature leaves only the best token
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
        return ids, probs if len(probs) == len(given) else probs / probs.sum()

    def _processed(self, logits: NDArray[np.float32], context: Sequence[int]) -> NDArray[np.floating[Any]]:
        """Return [V], the logits with bias and penalties. `logits` stays as it is.

        Repetition divides positive scores of all tokens in the context and multiplies negative ones.
        """
        if not self._reshapes:
            return logits
        params, scores = self.params, logits.astype(np.float64)
        if len(self._biased):
            if self._biased[-1] >= len(scores):
                raise InputError(
                    f"logit_bias has token id {self._biased[-1]}, the target {len(scores)} tokens: give its ids"
                )
            scores[self._biased] += self._bias
        if params.repetition_penalty != 1:
            seen = np.fromiter(context, np.int64, len(context))
            found = scores[seen]
            scores[seen] = np.where(found < 0, found * params.repetition_penalty, found / params.repetition_penalty)
        if params.frequency_penalty or params.presence_penalty:
            said = np.array(context[self.prompt_tokens :], np.int64)
            ids, counts = np.unique(said, return_counts=True)
            scores[ids] -= params.frequency_penalty * counts + params.presence_penalty
        return scores


def _nucleus(probs: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Return ascending indices of the fewest best tokens that hold top_p of the mass; at least one.

    Tokens below (1 - top_p) / S together hold less than 1 - top_p, so the nucleus needs none of
    them, and only the others are sorted. Half of that bound leaves room for rounding.
    """
    likely: NDArray[np.int64] = np.flatnonzero(probs >= 0.5 * (1 - top_p) / len(probs))
    values = probs[likely]
    ranked = np.sort(values)[::-1]  # sorting values is several times faster than argsort
    count = min(int(ranked.cumsum().searchsorted(top_p)) + 1, len(ranked))  # includes the token that reaches top_p
    last = ranked[count - 1]
    kept = values > last
    kept[np.flatnonzero(values == last)[: count - np.count_nonzero(kept)]] = True  # ties keep the lowest ids
    return likely.compress(kept)


def _check_finite(best: float) -> None:
    if not math.isfinite(best):
        raise DeviceError(f"the target's best logit is {best}: weights or precision are wrong: export the pair again")
