"""Sampling settings of one generation."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

from dovetail.runtime.errors import InputError
from dovetail.runtime.system.bounds import SEED_MOST, TOKEN_MOST, check_whole


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens from logits. The defaults are greedy decoding. Raises InputError."""

    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # 1 is off
    min_p: float = 0.0  # share of the best token's probability, 0 is off
    repetition_penalty: float = 1.0  # 1 is off, above 1 discourages tokens of the prompt and the answer
    seed: int | None = None  # None draws a seed when a generation samples

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, lambda t: t >= 0, "0 (greedy) or more, e.g. 0.7")
        check_whole("top_k", self.top_k, InputError, "give 0 (off) or more, e.g. 40", least=0, most=TOKEN_MOST)
        _check_number("top_p", self.top_p, lambda p: 0 < p <= 1, "more than 0 and at most 1 (off), e.g. 0.95")
        _check_number("min_p", self.min_p, lambda p: 0 <= p <= 1, "from 0 (off) to 1, e.g. 0.05")
        _check_number("repetition_penalty", self.repetition_penalty, lambda r: r > 0, "more than 0; 1 is off, e.g. 1.1")
        if self.seed is not None:
            check_whole("seed", self.seed, InputError, "give another; None is random", least=0, most=SEED_MOST)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def seeded(self) -> SamplingParams:
        """Return these settings with a seed; sampling without a seed draws a seed now."""
        if self.greedy or self.seed is not None:
            return self
        return replace(self, seed=secrets.randbelow(2**32))


def _check_number(name: str, value: float, fits: Callable[[float], bool], remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not fits(value):
        raise InputError(f"{name} {value!r} is out of range: give {remedy}")
