"""Print text on the terminal as it arrives, and keep the part of an answer that Ctrl-C stopped."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import click

from dovetail.runtime.engine import Engine
from dovetail.runtime.front import Chunk, GenerationResult
from dovetail.runtime.loop.metrics import GenerationMetrics
from dovetail.runtime.sampling.constraint import Constraint
from dovetail.runtime.settings import AnswerSettings
from dovetail.runtime.text.encoding import Prompt


@dataclass
class Answer:
    """The streamed text so far. A stopped answer has no metrics: the last chunk brings them."""

    target_device: str
    drafter: str  # where it runs, "none" for a pair without one, "off" for plain decoding
    text: str = ""
    tokens: int = 0
    chunks: int = 0  # the prefill's, then one a round
    first_s: float = 0.0  # when the first chunk came (perf_counter)
    last_s: float = 0.0  # when the last chunk came
    metrics: GenerationMetrics | None = None
    interrupted: bool = False

    def add(self, chunk: Chunk) -> None:
        self.last_s = perf_counter()
        if not self.chunks:
            self.first_s = self.last_s
        self.chunks += 1
        self.text += chunk.text
        self.tokens += len(chunk.token_ids)
        self.metrics = chunk.metrics

    def statistics(self) -> str:
        """Return the statistics line. For a stopped answer the line is computed from the chunks."""
        if (metrics := self.metrics) is not None:
            said = (
                f"{metrics.new_tokens} tokens, {metrics.tokens_per_second:.1f} tok/s, "
                f"acceptance length {metrics.acceptance_length:.2f} over {metrics.rounds} rounds | "
                f"prefill {metrics.prefill_ms:.0f} ms, draft {metrics.draft_ms:.0f} ms, "
                f"verify {metrics.verify_ms:.0f} ms, other {metrics.other_ms:.0f} ms"
            )
        else:
            rounds, seconds = max(self.chunks - 1, 0), self.last_s - self.first_s
            speed = (self.tokens - 1) / seconds if rounds and seconds else 0.0
            length = (self.tokens - 1) / rounds if rounds else 1.0
            said = (
                f"stopped | {self.tokens} tokens, {speed:.1f} tok/s, acceptance length {length:.2f} "
                f"over {rounds} rounds"
            )
        return f"[{said} | target {self.target_device}, drafter {self.drafter}]"


def speaks_unicode() -> bool:
    """Return whether standard output takes every character. If not, `main` replaces some."""
    return (getattr(sys.stdout, "encoding", None) or "").lower().replace("_", "-").startswith("utf")


def stream_answer(
    engine: Engine, prompt: Prompt, request: AnswerSettings, constraint: Constraint | None = None
) -> Answer:
    """Write the answer to stdout as it arrives. After Ctrl-C the engine remains usable.

    Raises the errors of `Engine.stream`.
    """
    answer = Answer(engine.target_device, _drafter(engine, request))
    try:
        with closing(engine.stream(prompt, constraint=constraint, **request.keywords())) as chunks:
            for chunk in chunks:
                answer.add(chunk)
                if chunk.text:
                    click.echo(chunk.text, nl=False)
    except KeyboardInterrupt:
        answer.interrupted = True
    # Both may have moved to the CPU.
    answer.drafter, answer.target_device = _drafter(engine, request), engine.target_device
    if not answer.text.endswith("\n"):
        click.echo()
    return answer


def _drafter(engine: Engine, request: AnswerSettings) -> str:
    return (engine.drafter_device or "none") if request.speculate else "off"


def result_json(result: GenerationResult, engine: Engine, speculate: bool) -> dict[str, Any]:
    """Return the JSON of `generate --json`: the answer, the metrics (times in ms), the devices.

    drafter_device: None for plain decoding, or without a drafter. drafter_note: the device's reason.
    """
    metrics = {
        name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(result.metrics).items()
    }
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "seed": result.seed,
        **metrics,
        "target_device": engine.target_device,
        "drafter_device": engine.drafter_device if speculate else None,
        "drafter_note": engine.drafter_note if speculate else None,
    }
