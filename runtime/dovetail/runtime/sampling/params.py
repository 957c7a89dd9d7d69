"""Sampling settings of one generation."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from dovetail.runtime.errors import InputError
from dovetail.runtime.system.bounds import SEED_MOST, TOKEN_MOST, check_whole

PENALTY_MOST = 2.0  # presence and frequency penalties, either way: the range of OpenAI's API
BIAS_MOST = 100.0  # of a logit, either way: the range of OpenAI's API


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens from logits. The defaults are greedy decoding. Raises InputError."""

    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # 1 is off
    min_p: float = 0.0  # share of the best token's probability, 0 is off
    repetition_penalty: float = 1.0  # 1 is off, above 1 discourages tokens of the prompt and the answer
    presence_penalty: float = 0.0  # subtracted from the logit of each token of the answer
    frequency_penalty: float = 0.0  # subtracted as often as the token occurs in the answer
    # Token id -> value added to its logit. Kept as pairs in the order of the ids, which can be hashed.
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    seed: int | None = None  # None draws a seed when a generation samples

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, lambda t: t >= 0, "0 (greedy) or more, e.g. 0.7")
        check_whole("top_k", self.top_k, InputError, "give 0 (off) or more, e.g. 40", least=0, most=TOKEN_MOST)
        _check_number("top_p", self.top_p, lambda p: 0 < p <= 1, "more than 0 and at most 1 (off), e.g. 0.95")
        _check_number("min_p", self.min_p, lambda p: 0 <= p <= 1, "from 0 (off) to 1, e.g. 0.05")
        _check_number(
            "repetition_penalty",
            self.repetition_penalty,
            lambda r: 0.01 <= r <= 100,
            "from 0.01 to 100; 1 is off, e.g. 1.1",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            remedy = f"{-PENALTY_MOST:g} to {PENALTY_MOST:g}; 0 is off, e.g. 0.5"
            _check_number(name, getattr(self, name), lambda p: abs(p) <= PENALTY_MOST, remedy)
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        if self.seed is not None:
            check_whole("seed", self.seed, InputError, "give another; None is random", least=0, most=SEED_MOST)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def reshapes(self) -> bool:
        """Whether more than the target's logits decides which token is best."""
        penalties = self.presence_penalty, self.frequency_penalty
        return self.repetition_penalty != 1 or any(penalties) or bool(self.logit_bias)

    def seeded(self) -> SamplingParams:
        """Return these settings with a seed; sampling without a seed draws a seed now."""
        if self.greedy or self.seed is not None:
            return self
        return replace(self, seed=secrets.randbelow(2**32))


def _check_number(name: str, value: float, fits: Callable[[float], bool], remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not fits(value):
        raise InputError(f"{name} {value!r} is out of range: give {remedy}")


def _checked_bias(bias: object) -> tuple[tuple[int, float], ...]:
    pairs = tuple(bias.items()) if isinstance(bias, Mapping) else bias
    if not isinstance(pairs, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise InputError(f"logit_bias {bias!r:.60} is no mapping: give token ids and values, e.g. {{42: -100}}")
    for token, value in pairs:
        check_whole("token id of logit_bias", token, InputError, "give ids of the target", least=0, most=TOKEN_MOST)
        remedy = f"{-BIAS_MOST:g} to {BIAS_MOST:g}, e.g. -100 against a token"
        _check_number(f"logit_bias of token {token}", value, lambda b: abs(b) <= BIAS_MOST, remedy)
    return tuple(sorted(dict(pairs).items()))
