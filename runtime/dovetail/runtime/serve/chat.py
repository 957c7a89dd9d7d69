"""/v1/chat/completions: one conversation, one or several answers."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from dovetail.runtime.front import Chunk
from dovetail.runtime.loop.metrics import GenerationMetrics
from dovetail.runtime.serve.conversation import ANY_OBJECT, Conversation, Reader, as_dicts
from dovetail.runtime.serve.failures import ApiError
from dovetail.runtime.serve.openai import ChatRequest, JsonSchemaFormat, NamedTool, ObjectFormat
from dovetail.runtime.serve.replies import EventStream, event, new_id, round_of, tokens, unless_gone, usage
from dovetail.runtime.serve.service import Answers, Service
from dovetail.runtime.text.tokenizer import Spelling
from dovetail.runtime.text.tool_calls import Piece, collect

_FIELDS = {"content": "content", "reasoning": "reasoning_content"}  # of a piece, in a message


async def chat(service: Service, request: Request, asked: ChatRequest) -> Response:
    """Answer. Raises ApiError and DovetailError before the first byte of a reply."""
    service.check_model(asked.model)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    conversation = conversation_of(asked)
    talk = await service.talk(conversation)
    readers = [conversation.reader(talk.style) for _ in range(asked.n or 1)]
    limit = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
    with_rounds = bool(asked.stream_options and asked.stream_options.include_rounds)
    ask = await service.ask(
        conversation.messages, asked, most=service.room(getattr(asked, limit), limit), constraint=talk.constraint,
        template_options=conversation.template_options(), trace=with_rounds,
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
    )  # fmt: skip
    answers = await service.answer([ask], asked.n or 1)
    texts = service.spellings if asked.logprobs else None
    choices = [ChatChoice(reader, conversation.parallel, texts) for reader in readers]
    writer = ChatWriter(service.name, choices, service.spellings if with_rounds else None)
    if asked.stream:
        with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return EventStream(answers, writer.events(answers, with_usage))
    return await unless_gone(request, writer.whole(answers))


def conversation_of(asked: ChatRequest) -> Conversation:
    """Return what a request says, in the terms of both chat routes."""
    schema = None
    if isinstance(asked.response_format, ObjectFormat):
        schema = ANY_OBJECT
    elif isinstance(asked.response_format, JsonSchemaFormat):
        schema = asked.response_format.json_schema.schema_ or ANY_OBJECT
    choice = asked.tool_choice.function if isinstance(asked.tool_choice, NamedTool) else asked.tool_choice
    return Conversation(
        messages=as_dicts(asked.messages),
        tools=[tool.function for tool in asked.tools or ()],
        choice=choice,
        parallel=asked.parallel_tool_calls is not False,
        schema=schema,
        template=asked.chat_template_kwargs or {},
    )


@dataclass
class ChatChoice:
    """One answer as it grows."""

    reader: Reader
    parallel: bool
    texts: Mapping[int, Spelling] | None
    pieces: list[Piece] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish: str = ""
    metrics: GenerationMetrics | None = None

    def add(self, chunk: Chunk) -> tuple[list[Piece], list[dict[str, Any]]]:
        """Return what a chunk adds: pieces, and entries of logprobs."""
        pieces = self.reader.add(chunk.text)
        if chunk.finish_reason:
            pieces += self.reader.flush()
        if not self.parallel:
            pieces = [piece for piece in pieces if piece.index == 0]
        entries = tokens(chunk.logprobs, self.texts) if self.texts else []
        self.pieces += pieces
        self.logprobs += entries
        if chunk.finish_reason:
            calls = chunk.finish_reason == "stop" and bool(collect(self.pieces).calls)
            self.finish, self.metrics = "tool_calls" if calls else chunk.finish_reason, chunk.metrics
        return pieces, entries


class ChatWriter:
    """Writes the answers to one request, whole or as they grow. rounds: texts of tokens, if rounds are shown."""

    def __init__(self, model: str, choices: Sequence[ChatChoice], rounds: Mapping[int, Spelling] | None = None) -> None:
        self._head = {"id": new_id("chatcmpl-"), "created": int(time.time()), "model": model}
        self._choices, self._rounds = choices, rounds

    async def whole(self, answers: Answers) -> Response:
        async with answers:
            async for index, chunk in answers.chunks():
                self._choices[index].add(chunk)
        choices = [
            {
                "index": index, "message": _message(choice), "finish_reason": choice.finish,
                "logprobs": None if choice.texts is None else {"content": choice.logprobs, "refusal": None},
            }
            for index, choice in enumerate(self._choices)
        ]  # fmt: skip
        return JSONResponse({**self._head, "object": "chat.completion", "choices": choices, "usage": self._usage()})

    async def events(self, answers: Answers, with_usage: bool) -> AsyncGenerator[bytes, None]:
        for index in range(len(self._choices)):
            yield self._event(index, {"role": "assistant", "content": ""})
        async for index, chunk in answers.chunks():
            choice = self._choices[index]
            pieces, entries = choice.add(chunk)
            own = round_of(chunk, self._rounds) if self._rounds is not None else None
            deltas = list(_deltas(pieces)) or [{"content": ""}] * bool(entries or own)
            for delta in deltas:
                yield self._event(index, delta, logprobs=entries, own=own)
                entries, own = [], None  # the first event of a chunk has them
            if chunk.finish_reason:
                assert chunk.metrics
                ended = {"tokens": 0, "metrics": asdict(chunk.metrics)} if self._rounds is not None else None
                yield self._event(index, {}, finish=choice.finish, own=ended)
        if with_usage:
            yield event({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage()})

    def _event(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        finish: str | None = None,
        logprobs: Sequence[Any] = (),
        own: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {
            "index": index, "delta": delta, "finish_reason": finish,
            "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
        }  # fmt: skip
        rounds = {"dovetail": own} if own else {}
        return event({**self._head, "object": "chat.completion.chunk", "choices": [choice], **rounds})

    def _usage(self) -> dict[str, Any]:
        return usage([choice.metrics for choice in self._choices if choice.metrics], len(self._choices))


def _message(choice: ChatChoice) -> dict[str, Any]:
    answer = collect(choice.pieces)
    calls = [
        {"id": new_id("call_"), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in answer.calls
    ]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": answer.content or (None if calls else ""),
        "refusal": None,
    }
    if calls:
        message["tool_calls"] = calls
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    return message


def _deltas(pieces: Sequence[Piece]) -> Iterator[dict[str, Any]]:
    for piece in pieces:
        if piece.kind == "call":
            function = {"name": piece.text, "arguments": ""}
            call = {"index": piece.index, "id": new_id("call_"), "type": "function", "function": function}
            yield {"tool_calls": [call]}
        elif piece.kind == "arguments":
            yield {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
        elif piece.kind != "broken":  # a call that was streamed cannot be taken back
            yield {_FIELDS[piece.kind]: piece.text}
