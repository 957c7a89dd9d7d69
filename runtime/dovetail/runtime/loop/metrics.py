"""The record of a generation's costs and drafts. docs/reference/metrics.md has vLLM's names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from time import perf_counter
from typing import Literal

Phase = Literal["prefill", "draft", "verify", "other"]


@dataclass(frozen=True)
class GenerationMetrics:
    """One generation in numbers. Times are milliseconds, without those of a stream's consumer."""

    prompt_tokens: int
    cached_tokens: int  # prompt tokens whose KV was still there
    new_tokens: int  # without a stop token and tokens past the end; the first comes from the prefill
    rounds: int  # passes of the target after the prefill, drafted or not
    drafted: int  # over all rounds
    accepted: int  # over all rounds
    accepted_per_position: tuple[int, ...]  # how often the i-th drafted token of a path was accepted
    acceptance_length: float  # 1 + accepted / rounds; 1 without rounds and with speculate=False
    prefill_ms: float  # target and drafter read the prompt, the drafter after the first token
    draft_ms: float  # extend and propose
    verify_ms: float  # verify and commit
    other_ms: float  # all else, text and sampling included
    total_ms: float  # the sum of these times
    time_to_first_token_ms: float  # decode_ms begins there
    decode_ms: float
    tokens_per_second: float  # tokens after the first, over decode_ms; 0 without such tokens
    bus_bytes: int = 0  # moved between host and GPU in all rounds, both ways; 0 on the CPU
    queue_ms: float = 0.0  # from the request to its first pass, in no other time; 0 for an answer that runs alone


@dataclass
class Meter:
    """Counts and times a running generation. `resume` ... `lap(phase)` surrounds timed work."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    spent_ms: dict[Phase, float] = field(default_factory=lambda: {"prefill": 0, "draft": 0, "verify": 0, "other": 0})
    first_token_ms: float = 0.0
    bus_bytes: int = 0
    queue_ms: float = 0.0
    clock: Callable[[], float] = perf_counter  # seconds
    _mark: float = field(init=False)

    def __post_init__(self) -> None:
        self._mark = self.clock()

    def resume(self) -> None:
        """Restart the clock: the time since the last lap belongs to no phase."""
        self._mark = self.clock()

    def lap(self, phase: Phase) -> float:
        """Add the time since the last lap or resume to `phase` and return it, in ms."""
        now = self.clock()
        took = (now - self._mark) * 1e3
        self.spent_ms[phase] += took
        self._mark = now
        return took

    def add(self, phase: Phase, ms: float) -> None:
        """Add the time of work that several texts share."""
        self.spent_ms[phase] += ms

    def first_token(self) -> None:
        self.first_token_ms = sum(self.spent_ms.values())

    def add_round(self, drafted: int, accepted: int) -> None:
        """Count a verified tree: nodes below its root, and how many the target accepted."""
        self.rounds += 1
        self.drafted += drafted
        pairs = zip_longest(self.accepted_per_position, [1] * accepted, fillvalue=0)
        self.accepted_per_position = [total + one for total, one in pairs]

    def metrics(self) -> GenerationMetrics:
        accepted, total_ms = sum(self.accepted_per_position), sum(self.spent_ms.values())
        decode_ms, later = total_ms - self.first_token_ms, self.new_tokens - 1
        return GenerationMetrics(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            new_tokens=self.new_tokens,
            rounds=self.rounds,
            drafted=self.drafted,
            accepted=accepted,
            accepted_per_position=tuple(self.accepted_per_position),
            acceptance_length=1 + accepted / max(self.rounds, 1),
            prefill_ms=self.spent_ms["prefill"],
            draft_ms=self.spent_ms["draft"],
            verify_ms=self.spent_ms["verify"],
            other_ms=self.spent_ms["other"],
            total_ms=total_ms,
            time_to_first_token_ms=self.first_token_ms,
            decode_ms=decode_ms,
            tokens_per_second=later / decode_ms * 1e3 if later > 0 and decode_ms > 0 else 0.0,
            bus_bytes=self.bus_bytes,
            queue_ms=self.queue_ms,
        )
