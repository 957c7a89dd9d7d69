"""The settings of one answer, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dovetail.runtime.errors import InputError
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.text.stop_strings import check_stop_strings


@dataclass(frozen=True)
class AnswerSettings:
    """The keywords of `Engine.stream`, checked before a pair is built or loaded."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: tuple[str, ...]
    speculate: bool = True
    raw: bool = False
    template_options: Mapping[str, Any] = field(default_factory=dict)
    parse_special: bool = False
    presence_penalty: float = SamplingParams.presence_penalty
    frequency_penalty: float = SamplingParams.frequency_penalty
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = SamplingParams.logit_bias

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens {self.max_new_tokens} is out of range: give 1 or more")
        check_stop_strings(self.stop)
        self.sampling()

    def sampling(self) -> SamplingParams:
        return SamplingParams(**{each.name: getattr(self, each.name) for each in fields(SamplingParams)})

    def keywords(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}
