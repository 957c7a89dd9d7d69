"""/v1/responses: OpenAI's newer route, without state. Nothing is kept between two requests."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from dovetail.runtime.front import Chunk
from dovetail.runtime.loop.metrics import GenerationMetrics
from dovetail.runtime.serve.conversation import ANY_OBJECT, Conversation, Reader
from dovetail.runtime.serve.failures import ApiError
from dovetail.runtime.serve.openai import (
    FlatNamedTool,
    FlatSchemaFormat,
    InputCall,
    InputMessage,
    ObjectFormat,
    ResponseRequest,
)  # fmt: skip
from dovetail.runtime.serve.replies import EventStream, event, new_id, tokens, unless_gone, usage
from dovetail.runtime.serve.service import Answers, Service
from dovetail.runtime.text.tokenizer import Spelling
from dovetail.runtime.text.tool_calls import Piece

WITH_LOGPROBS = "message.output_text.logprobs"
_PARTS = {
    "input_text": "text",
    "output_text": "text",
    "text": "text",
    "refusal": "refusal",
}  # where a part has its text


async def respond(service: Service, request: Request, asked: ResponseRequest) -> Response:
    """Answer. Raises ApiError and DovetailError before the first byte of a reply."""
    service.check_model(asked.model)
    if asked.stream_options is not None and asked.stream_options.include_usage is not None:
        raise ApiError(400, "include_usage has no meaning here: a response always has its usage",
                       param="stream_options.include_usage", code="unknown_parameter")  # fmt: skip
    conversation = conversation_of(asked)
    talk = await service.talk(conversation)
    reader = conversation.reader(talk.style)
    logprobs = (asked.top_logprobs or 0) if WITH_LOGPROBS in (asked.include or ()) else asked.top_logprobs
    ask = await service.ask(
        conversation.messages, asked, most=service.room(asked.max_output_tokens, "max_output_tokens"),
        constraint=talk.constraint, template_options=conversation.template_options(), logprobs=logprobs,
    )  # fmt: skip
    answers = await service.answer([ask])
    texts = None if logprobs is None else service.spellings
    writer = ResponseWriter(service.name, asked, reader, conversation.parallel, texts)
    if asked.stream:
        return EventStream(answers, writer.events(answers), done=False)
    return await unless_gone(request, writer.whole(answers))


def conversation_of(asked: ResponseRequest) -> Conversation:
    """Return what a request says, in the terms of both chat routes."""
    form = asked.text.format if asked.text else None
    schema = None
    if isinstance(form, ObjectFormat):
        schema = ANY_OBJECT
    elif isinstance(form, FlatSchemaFormat):
        schema = form.schema_ or ANY_OBJECT
    return Conversation(
        messages=messages_of(asked),
        tools=asked.tools or (),
        choice=asked.tool_choice,
        parallel=asked.parallel_tool_calls is not False,
        schema=schema,
        schema_field="text.format",
        template=asked.chat_template_kwargs or {},
    )


def messages_of(asked: ResponseRequest) -> list[dict[str, Any]]:
    """Return the inputs as messages of a conversation. Raises ApiError for parts that are no text."""
    found: list[dict[str, Any]] = []
    if asked.instructions is not None:
        found.append({"role": "system", "content": asked.instructions})
    if isinstance(asked.input, str):
        return [*found, {"role": "user", "content": asked.input}]
    for item in asked.input:
        if isinstance(item, InputMessage):
            role = "system" if item.role == "developer" else item.role
            found.append({"role": role, "content": _text(item.content)})
        elif isinstance(item, InputCall):
            call = {"id": item.call_id, "type": "function",
                    "function": {"name": item.name, "arguments": item.arguments}}  # fmt: skip
            if not (found and found[-1]["role"] == "assistant"):
                found.append({"role": "assistant", "content": ""})
            found[-1].setdefault("tool_calls", []).append(call)
        else:
            found.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
    return found


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    texts = [part.get(_PARTS.get(str(part.get("type")), "")) for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise ApiError(400, "input has a part that is no text: this model reads texts alone", param="input")
    return "\n".join(map(str, texts))


class ResponseWriter:
    """Writes one answer as items: messages, reasoning and calls, in their order."""

    def __init__(
        self, model: str, asked: ResponseRequest, reader: Reader, parallel: bool, texts: Mapping[int, Spelling] | None
    ) -> None:
        self._reader, self._parallel, self._texts = reader, parallel, texts
        self._items: list[dict[str, Any]] = []
        self._number = 0  # of the next event
        self._response = _response(model, asked)

    async def whole(self, answers: Answers) -> Response:
        async with answers:
            async for _, chunk in answers.chunks():
                for _event in self._take(chunk):
                    pass
        return JSONResponse(self._response)

    async def events(self, answers: Answers) -> AsyncGenerator[bytes, None]:
        yield self._encoded("response.created", response=self._response)
        yield self._encoded("response.in_progress", response=self._response)
        async for _, chunk in answers.chunks():
            for kind, fields in self._take(chunk):
                yield self._encoded(kind, **fields)

    def _encoded(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **fields}, kind)

    def _take(self, chunk: Chunk) -> Iterator[tuple[str, dict[str, Any]]]:
        """Take a chunk, and yield the events that it makes: kinds, and fields."""
        pieces = self._reader.add(chunk.text)
        if chunk.finish_reason:
            pieces += self._reader.flush()
        entries = tokens(chunk.logprobs, self._texts) if self._texts else []
        for piece in pieces:
            if piece.kind != "broken" and (self._parallel or piece.index == 0):
                yield from self._piece(piece, entries if piece.kind == "content" else [])
                entries = [] if piece.kind == "content" else entries
        if chunk.finish_reason:
            assert chunk.metrics
            status = "completed" if chunk.finish_reason == "stop" else "incomplete"
            yield from self._end(status)
            self._response["usage"] = _usage(chunk.metrics)
            self._response["status"], self._response["output"] = status, self._items
            if status == "incomplete":
                self._response["incomplete_details"] = {"reason": "max_output_tokens"}
            yield f"response.{status}", {"response": self._response}

    def _piece(self, piece: Piece, entries: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
        kind = {"content": "message", "reasoning": "reasoning"}.get(piece.kind, "function_call")
        if piece.kind == "call" or not self._items or self._items[-1]["type"] != kind:
            yield from self._end("completed")
            yield from self._begin(kind, piece)
        if piece.kind == "call":
            return
        item, place = self._items[-1], self._place()
        if kind == "function_call":
            item["arguments"] += piece.text
            yield "response.function_call_arguments.delta", {**place, "delta": piece.text}
            return
        part = item["content"][0]
        part["text"] += piece.text
        if kind == "reasoning":
            yield "response.reasoning_text.delta", {**place, "content_index": 0, "delta": piece.text}
            return
        part["logprobs"] += entries
        yield "response.output_text.delta", {**place, "content_index": 0, "delta": piece.text, "logprobs": entries}

    def _begin(self, kind: str, piece: Piece) -> Iterator[tuple[str, dict[str, Any]]]:
        """Open an item at the end of the output."""
        item: dict[str, Any] = {"id": new_id(_PREFIXES[kind]), "type": kind, "status": "in_progress"}
        if kind == "function_call":
            item |= {"call_id": new_id("call_"), "name": piece.text, "arguments": ""}
        elif kind == "message":
            item |= {"role": "assistant", "content": []}
        else:
            item |= {"summary": [], "content": []}
        self._items.append(item)
        yield "response.output_item.added", {"output_index": len(self._items) - 1, "item": dict(item)}
        if kind != "function_call":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            if kind == "reasoning":
                part = {"type": "reasoning_text", "text": ""}
            item["content"] = [part]
            yield "response.content_part.added", {**self._place(), "content_index": 0, "part": dict(part)}

    def _end(self, status: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Close the last item, if one is open."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return
        item, place = self._items[-1], self._place()
        item["status"] = status
        if item["type"] == "function_call":
            yield "response.function_call_arguments.done", {
                **place, "name": item["name"], "arguments": item["arguments"],
            }  # fmt: skip
        else:
            part = item["content"][0]
            place = {**place, "content_index": 0}
            if item["type"] == "message":
                yield "response.output_text.done", {**place, "text": part["text"], "logprobs": part["logprobs"]}
            else:
                yield "response.reasoning_text.done", {**place, "text": part["text"]}
            yield "response.content_part.done", {**place, "part": part}
        yield "response.output_item.done", {"output_index": len(self._items) - 1, "item": item}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}


_PREFIXES = {"function_call": "fc_", "message": "msg_", "reasoning": "rs_"}


def _response(model: str, asked: ResponseRequest) -> dict[str, Any]:
    """Return a response that has just begun."""
    choice = asked.tool_choice or ("auto" if asked.tools else "none")
    form = asked.text.format if asked.text and asked.text.format else None
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "metadata": asked.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": None,
        "store": False,
        "temperature": asked.temperature,
        "text": {"format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}},
        "tool_choice": choice.model_dump() if isinstance(choice, FlatNamedTool) else choice,
        "tools": [{"strict": None, **tool.model_dump()} for tool in asked.tools or ()],
        "top_logprobs": asked.top_logprobs or 0,
        "top_p": asked.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": asked.user,
    }


def _usage(metrics: GenerationMetrics) -> dict[str, Any]:
    """Return the usage with this route's names, and the counts of drafted tokens."""
    found = usage([metrics])
    return {
        "input_tokens": found["prompt_tokens"],
        "input_tokens_details": {**found["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": found["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0, **found["completion_tokens_details"]},
        "total_tokens": found["total_tokens"],
    }
