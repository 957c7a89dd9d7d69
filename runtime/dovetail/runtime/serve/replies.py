"""What all routes write: events of a stream, usage, logprobs, and replies that end with their client."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Coroutine, Iterable, Mapping, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from dovetail.runtime.errors import DovetailError
from dovetail.runtime.front import Chunk
from dovetail.runtime.loop.metrics import GenerationMetrics
from dovetail.runtime.sampling.logprobs import TokenLogprobs
from dovetail.runtime.serve.failures import ApiError, body, failed
from dovetail.runtime.serve.service import Answers
from dovetail.runtime.text.tokenizer import Spelling

CLIENT_GONE = 499  # nginx's number; nobody reads it
LEAST_LOGPROB = -9999.0  # OpenAI's mark of a token that is very unlikely
DONE = b"data: [DONE]\n\n"


def new_id(kind: str) -> str:
    """Return a name that nothing else has. kind: its beginning."""
    return f"{kind}{secrets.token_hex(12)}"


def event(data: Mapping[str, Any], kind: str | None = None) -> bytes:
    """Return one server-sent event."""
    named = f"event: {kind}\n" if kind else ""
    return f"{named}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class EventStream(StreamingResponse):
    """Events of some answers, which are freed at the end, even if the stream never began.

    An error in the middle becomes the last event. done: whether an event says that it was the last.
    """

    def __init__(self, answers: Answers, events: AsyncGenerator[bytes, None], *, done: bool = True) -> None:
        super().__init__(self._guarded(events), media_type="text/event-stream",
                         headers={"cache-control": "no-cache", "x-accel-buffering": "no"})  # fmt: skip
        self._answers, self._done = answers, done

    async def _guarded(self, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        try:
            async for one in events:
                yield one
        except (DovetailError, ApiError) as error:
            told = body(failed(error))
            yield event({"type": "error", **told["error"], **told}, "error")
        if self._done:
            yield DONE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._answers:
            await super().__call__(scope, receive, send)


async def unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Return the result of `work`, which is cancelled when the client disconnects."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else Response(status_code=CLIENT_GONE)
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


def usage(all_metrics: Sequence[GenerationMetrics], n: int = 1) -> dict[str, Any]:
    """Return the usage of all answers. Each prompt has `n` answers in a row, and counts once."""
    prompts = all_metrics[::n]
    prompt_tokens = sum(each.prompt_tokens for each in prompts)
    new_tokens = sum(each.new_tokens for each in all_metrics)
    accepted = sum(each.accepted for each in all_metrics)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(each.cached_tokens for each in prompts)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": sum(each.drafted for each in all_metrics) - accepted,
        },
    }


def round_of(chunk: Chunk, spellings: Mapping[int, Spelling]) -> dict[str, Any]:
    """Return what a round did: how many tokens came, its tree, and its times."""
    found: dict[str, Any] = {"tokens": len(chunk.token_ids)}
    if done := chunk.round:
        texts = [_text(token, spellings) for token in done.tokens]
        following = None if done.next is None else _text(done.next, spellings)
        found["tree"] = {"tokens": texts, "parents": done.parents, "accepted": done.accepted, "next": following}
        found |= {"draft_ms": done.draft_ms, "verify_ms": done.verify_ms}
    return found


def tokens(logprobs: Iterable[TokenLogprobs], spellings: Mapping[int, Spelling]) -> list[dict[str, Any]]:
    """Return tokens and their alternatives as OpenAI writes them."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        spelled = spellings[token].text if token in spellings else b""
        return {"token": _text(token, spellings), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(spelled)}

    return [{**one(each.token_id, each.logprob), "top_logprobs": [one(*top) for top in each.top]} for each in logprobs]


def _text(token: int, spellings: Mapping[int, Spelling]) -> str:
    return spellings[token].text.decode(errors="replace") if token in spellings else ""
