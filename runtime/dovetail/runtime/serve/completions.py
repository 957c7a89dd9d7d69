"""/v1/completions: texts or token ids, continued."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from dovetail.runtime.front import Chunk
from dovetail.runtime.loop.metrics import GenerationMetrics
from dovetail.runtime.serve.openai import CompletionRequest
from dovetail.runtime.serve.replies import EventStream, event, new_id, tokens, unless_gone, usage
from dovetail.runtime.serve.service import Answers, Service
from dovetail.runtime.text.tokenizer import Spelling

DEFAULT_TOKENS = 16  # OpenAI's and vLLM's max_tokens of this route


async def complete(service: Service, request: Request, asked: CompletionRequest) -> Response:
    """Answer. Raises ApiError and DovetailError before the first byte of a reply."""
    service.check_model(asked.model)
    most = service.room(asked.max_tokens, "max_tokens", DEFAULT_TOKENS)
    asks = [
        await service.ask(prompt, asked, most=most, raw=True, logprobs=asked.logprobs) for prompt in prompts_of(asked)
    ]
    answers = await service.answer(asks, asked.n or 1)
    texts = None if asked.logprobs is None else service.spellings
    writer = CompletionWriter(service.name, [Choice(texts) for _ in answers.streams], asked.n or 1)
    if asked.stream:
        with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return EventStream(answers, writer.events(answers, with_usage))
    return await unless_gone(request, writer.whole(answers))


def prompts_of(asked: CompletionRequest) -> Sequence[str | Sequence[int]]:
    """Return the prompts, each a text or token ids."""
    if isinstance(asked.prompt, str) or isinstance(asked.prompt[0], int):
        return [asked.prompt]
    return asked.prompt


@dataclass
class Choice:
    """One answer as it grows. logprobs: as the API writes them, None if nobody asked."""

    texts: Mapping[int, Spelling] | None
    text: str = ""
    entries: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None
    metrics: GenerationMetrics | None = None
    _offset: int = 0  # characters of the tokens so far

    def add(self, chunk: Chunk) -> list[dict[str, Any]]:
        """Take a chunk, and return the entries of its tokens."""
        self.text += chunk.text
        self.finish, self.metrics = chunk.finish_reason, chunk.metrics
        entries = tokens(chunk.logprobs, self.texts) if self.texts else []
        for entry in entries:
            entry["offset"] = self._offset
            self._offset += len(entry["token"])
        self.entries += entries
        return entries

    def logprobs(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """Return entries as lists by their kind."""
        if self.texts is None:
            return None
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
            "text_offset": [entry["offset"] for entry in entries],
        }


class CompletionWriter:
    """Writes the answers to one request, whole or as they grow. n: answers to each prompt."""

    def __init__(self, model: str, choices: Sequence[Choice], n: int) -> None:
        self._head = {"id": new_id("cmpl-"), "object": "text_completion", "created": int(time.time()), "model": model}
        self._choices, self._n = choices, n

    async def whole(self, answers: Answers) -> Response:
        async with answers:
            async for index, chunk in answers.chunks():
                self._choices[index].add(chunk)
        choices = [
            _choice(index, each.text, each.finish, each.logprobs(each.entries))
            for index, each in enumerate(self._choices)
        ]
        return JSONResponse({**self._head, "choices": choices, "usage": self._usage()})

    async def events(self, answers: Answers, with_usage: bool) -> AsyncGenerator[bytes, None]:
        async for index, chunk in answers.chunks():
            choice = self._choices[index]
            entries = choice.add(chunk)
            if chunk.text or entries or chunk.finish_reason:
                one = _choice(index, chunk.text, chunk.finish_reason, choice.logprobs(entries))
                yield event({**self._head, "choices": [one]})
        if with_usage:
            yield event({**self._head, "choices": [], "usage": self._usage()})

    def _usage(self) -> dict[str, Any]:
        return usage([choice.metrics for choice in self._choices if choice.metrics], self._n)


def _choice(index: int, text: str, finish: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": index, "text": text, "finish_reason": finish, "logprobs": logprobs}
