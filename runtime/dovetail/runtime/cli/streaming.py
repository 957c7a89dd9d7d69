"""Text on the terminal as it comes, and what is left of an answer that Ctrl-C stopped."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from time import perf_counter

import click

from ..engine import Chunk, Engine, Prompt
from ..metrics import GenerationMetrics
from .options import RequestFlags
from .report import statistics_line


@dataclass
class Answer:
    """What was streamed so far; the engine's metrics come with the last chunk, so a stopped answer has none.

    first_s, last_s: when the first and the last chunk came (perf_counter). chunks: the prefill's, then one a round.
    """

    target_device: str
    drafter_device: str | None
    text: str = ""
    tokens: int = 0
    chunks: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
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
        """The statistics line; of a stopped answer, what was seen from outside."""
        if self.metrics is not None:
            return statistics_line(self.metrics, self.target_device, self.drafter_device)
        rounds, seconds = max(self.chunks - 1, 0), self.last_s - self.first_s
        speed = (self.tokens - 1) / seconds if rounds and seconds else 0.0
        length = (self.tokens - 1) / rounds if rounds else 1.0
        return (
            f"[stopped | {self.tokens} tokens, {speed:.1f} tok/s, acceptance length {length:.2f} over {rounds} rounds"
            f" | target {self.target_device}, drafter {self.drafter_device or 'off'}]"
        )


def speaks_unicode() -> bool:
    """Whether standard output takes every character; else `main` has others replaced."""
    return (getattr(sys.stdout, "encoding", None) or "").lower().replace("_", "-").startswith("utf")


def stream_answer(engine: Engine, prompt: Prompt, request: RequestFlags) -> Answer:
    """Write the answer to stdout while it comes; Ctrl-C ends it early and leaves the engine usable.

    Raises what `Engine.stream` raises.
    """
    answer = Answer(engine.target_device, engine.drafter_device if request.speculate else None)
    try:
        write(engine.stream(prompt, **request.keywords()), answer)
    except KeyboardInterrupt:
        answer.interrupted = True
    if request.speculate:
        answer.drafter_device = engine.drafter_device  # it may have moved
    if not answer.text.endswith("\n"):
        click.echo()
    return answer


def write(chunks: Generator[Chunk, None, None], answer: Answer) -> None:
    """Write the chunks to stdout and note them in `answer`; the stream is closed whatever happens."""
    with closing(chunks):
        for chunk in chunks:
            answer.add(chunk)
            if chunk.text:
                click.echo(chunk.text, nl=False)
