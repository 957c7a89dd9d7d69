"""What the routes share: the engine, its limits, and the answers to one HTTP request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dovetail.runtime.async_engine import AnswerStream, AsyncEngine
from dovetail.runtime.errors import DeviceError, InputError, IntegrityError, QueueFull
from dovetail.runtime.front import Ask, Chunk
from dovetail.runtime.sampling.constraint import Constraint
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.serve.conversation import Conversation
from dovetail.runtime.serve.failures import NEVER_AGAIN, ApiError, shutting_down
from dovetail.runtime.serve.metrics import RequestMetrics, ServerMetrics
from dovetail.runtime.serve.openai import Choices, Sampling
from dovetail.runtime.system.bounds import SEED_MOST, check_whole
from dovetail.runtime.system.files import read_object
from dovetail.runtime.text.encoding import Prompt
from dovetail.runtime.text.tokenizer import Spelling, Tokenizer
from dovetail.runtime.text.tool_calls import AnswerStyle
from dovetail.runtime.tree.limits import TreeLimits

# vLLM's: the fields of a model's generation_config.json that replace these defaults.
DEFAULTS: Mapping[str, float] = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. None is no limit but the target's context. Raises InputError."""

    body_bytes: int = 4 << 20
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    timeout_s: float | None = None  # its wait in the queue included

    def __post_init__(self) -> None:
        for name in ("body_bytes", "prompt_tokens", "new_tokens"):
            if (value := getattr(self, name)) is not None:
                check_whole(name, value, InputError, "give another limit", most=2**40)
        if self.timeout_s is not None and not 0 < self.timeout_s < 1e9:
            raise InputError(f"timeout {self.timeout_s} is out of range: give seconds above 0, or none")


@dataclass(frozen=True)
class Talk:
    """How a conversation is answered."""

    style: AnswerStyle
    constraint: Constraint | None


@dataclass
class Service:
    """One engine under a name, and the limits of its requests."""

    engine: AsyncEngine
    name: str
    limits: Limits = field(default_factory=Limits)
    defaults: Mapping[str, float] = field(default_factory=lambda: DEFAULTS)
    draining: bool = False
    metrics: ServerMetrics = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = ServerMetrics(self.name, self.engine.stats)

    @property
    def ending(self) -> bool:
        """Whether nothing new is accepted: the server drains, or its engine has failed."""
        return self.draining or self.engine.closed

    @property
    def tokenizer(self) -> Tokenizer:
        tokenizer = self.engine.tokenizer
        assert isinstance(tokenizer, Tokenizer)  # of a pair folder
        return tokenizer

    @cached_property
    def spellings(self) -> Mapping[int, Spelling]:
        """The bytes of each token id."""
        return self.tokenizer.spellings()

    def check_model(self, asked: str | None) -> None:
        if asked is not None and asked != self.name:
            raise ApiError(
                404, f"the model {asked!r:.100} is not served here: ask for {self.name!r}",
                param="model", code="model_not_found",
            )  # fmt: skip

    async def talk(self, conversation: Conversation) -> Talk:
        """Return how a conversation is answered. Raises InputError, ApiError."""
        options, schema = conversation.template_options(), conversation.constraint()
        style = await asyncio.to_thread(self.tokenizer.answer_style, options)
        constraint = None
        if schema is not None:
            try:
                constraint = await asyncio.to_thread(self.engine.constraint, json_schema=schema)
            except InputError as error:
                field = "tools" if conversation.forced else conversation.schema_field
                raise ApiError(400, str(error), param=field) from None
        return Talk(style, constraint)

    async def ask(self, prompt: Prompt, request: Sampling, *, most: int, **options: Any) -> Ask:
        """Return a checked request for the engine, encoded in a thread. most: tokens of the answer.

        options: further keywords of AsyncEngine.stream. Raises InputError, ApiError.
        """
        ask = await asyncio.to_thread(self.engine.ask, prompt, most, **self._options(request), **options)
        count, limit = len(ask.request.prompt), self.limits.prompt_tokens
        if limit is not None and count > limit:
            raise ApiError(
                400, f"the prompt has {count} tokens and may have {limit}: shorten the prompt",
                code="context_length_exceeded",
            )  # fmt: skip
        return ask

    async def answer(self, asks: Sequence[Ask], n: int = 1) -> Answers:
        """Queue `n` answers to each prompt. None of them runs if not all find room.

        Raises QueueFull, and ApiError if the server has begun to shut down meanwhile, or for more
        answers than it ever has room for.
        """
        if (count := n * len(asks)) > self.engine.places:
            most = self.engine.places
            raise ApiError(400, f"{count} answers at once are too many: ask for {most} at most", param="n")
        answers = Answers(self)
        try:
            for ask in asks:
                for index in range(n):
                    answers.streams.append(self.engine.submit(_with_seed(ask, index)))
        except QueueFull:
            await answers.close()
            if self.ending:
                raise shutting_down() from None
            self.metrics.reject()
            raise
        answers.record(self.metrics, asks[0].request.max_new_tokens)
        return answers

    def room(self, asked: int | None, name: str, default: int | None = None) -> int:
        """Return the tokens that an answer may have. name: of the field that asks. Raises ApiError."""
        most = self.limits.new_tokens or self.engine.max_context
        if asked is None:
            return min(default or most, most)
        if self.limits.new_tokens and asked > most:
            raise ApiError(400, f"{name} {asked} is above this server's limit: ask for {most} at most",
                           param=name, code="invalid_value")  # fmt: skip
        return asked

    def _options(self, request: Sampling) -> dict[str, Any]:
        """Return the keywords of AsyncEngine.stream that every route has."""
        options: dict[str, Any] = {}
        if request.seed is not None:
            options["seed"] = request.seed & SEED_MOST
        for name, default in self.defaults.items():
            given = getattr(request, name)
            options[name] = default if given is None else given
        options["top_k"] = max(options["top_k"], 0)
        for name in ("presence_penalty", "frequency_penalty", "speculate"):
            if (given := getattr(request, name)) is not None:
                options[name] = given
        if request.tree is not None:
            options["tree"] = TreeLimits(**request.tree.model_dump(exclude_none=True))
        if isinstance(request, Choices):
            options["stop"] = request.stop or ()
            options["logit_bias"] = self._bias(request.logit_bias or {})
        return options

    def _bias(self, given: Mapping[str, float]) -> dict[int, float]:
        for token in given:
            if not (token.isdecimal() and token.isascii() and len(token) < 11 and self.tokenizer.has_token(int(token))):
                raise ApiError(400, f"logit_bias names the token {token!r:.40}: give ids of the model's tokens",
                               param="logit_bias", code="invalid_value")  # fmt: skip
        return {int(token): bias for token, bias in given.items()}


def sampling_defaults(target: Path) -> Mapping[str, float]:
    """Return vLLM's defaults: those of the model's generation_config.json, then OpenAI's. Raises IntegrityError."""
    file = target / "generation_config.json"
    own = read_object(file, IntegrityError, "export the target again")
    found = {name: own[name] for name in DEFAULTS if own.get(name) is not None}
    try:
        SamplingParams(**found)
    except InputError as error:
        raise IntegrityError(f"{file}: {error}") from None
    return {**DEFAULTS, **found}


def _with_seed(ask: Ask, index: int) -> Ask:
    """Return the same request for another answer: greedy ones are equal, others have the next seeds."""
    sampling = ask.request.sampling
    if not index or sampling.seed is None:
        return ask
    seeded = replace(sampling, seed=(sampling.seed + index) & SEED_MOST)
    return replace(ask, request=replace(ask.request, sampling=seeded))


class Answers:
    """The answers to one HTTP request: streams of the engine, merged as their chunks come.

    `async with` frees whatever still runs at its end.
    """

    def __init__(self, service: Service) -> None:
        self.streams: list[AnswerStream] = []
        self._service, self._timeout_s = service, service.limits.timeout_s
        self._deadline = None if self._timeout_s is None else asyncio.get_running_loop().time() + self._timeout_s
        self._next: dict[asyncio.Future[Chunk], int] = {}
        self._records, self._ended = list[RequestMetrics](), ExitStack()  # of each answer

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End every answer. A second call does nothing."""
        for task in self._next:
            task.cancel()
        await asyncio.gather(*self._next, return_exceptions=True)
        for stream in self.streams:
            await stream.aclose()
        self._ended.close()

    def record(self, metrics: ServerMetrics, most: int) -> None:
        """Count these answers. most: tokens that each may have."""
        self._records = [self._ended.enter_context(metrics.request(most)) for _ in self.streams]

    async def chunks(self) -> AsyncIterator[tuple[int, Chunk]]:
        """Yield every chunk with the number of its answer.

        Raises ApiError when the time is over or a second signal stops the server, and DeviceError.
        """
        with self._ended:
            for index in range(len(self.streams)):
                self._ask(index)
            while self._next:
                left = None if self._deadline is None else self._deadline - asyncio.get_running_loop().time()
                done, _ = await asyncio.wait(self._next, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    raise ApiError(
                        504, f"the answer took more than {self._timeout_s:g} seconds: ask for fewer tokens",
                        code="timeout", headers=NEVER_AGAIN,
                    )  # fmt: skip
                for task in sorted(done, key=self._next.__getitem__):
                    index, chunk = self._next.pop(task), self._chunk(task)
                    if not chunk.finish_reason:
                        self._ask(index)
                    self._records[index].add(chunk)
                    yield index, chunk

    def _chunk(self, task: asyncio.Future[Chunk]) -> Chunk:
        try:
            return task.result()
        except DeviceError:
            if self._service.draining and self._service.engine.closed:
                raise shutting_down() from None
            raise

    def _ask(self, index: int) -> None:
        self._next[asyncio.ensure_future(anext(self.streams[index]))] = index
