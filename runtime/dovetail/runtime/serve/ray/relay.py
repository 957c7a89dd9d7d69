"""Relays requests to replicas, and asks another replica when one is lost before its reply begins."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dovetail.runtime.errors import QueueFull
from dovetail.runtime.serve.body import read_body
from dovetail.runtime.serve.failures import ApiError, body, failed, reply
from dovetail.runtime.serve.ray.session import session_of
from dovetail.runtime.serve.replies import event

TRIES = 3  # replicas that one request may be lost with
LOST = ApiError(503, "the replica that answered was lost: ask again", code="replica_lost", headers={"retry-after": "1"})
NO_METRICS = ApiError(404, "metrics are those of one replica: scrape Ray's metrics, or dovetail-run serve")


class ReplicaLost(Exception):
    """The replica of a request has ended before its reply has."""


@dataclass(frozen=True)
class Asked:
    """An HTTP request as it goes to a replica."""

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class Replicas(Protocol):
    """Replicas of one server."""

    def ask(self, asked: Asked, session: str) -> AsyncGenerator[Message, None]:
        """Yield the ASGI messages of one replica's reply. Raises ReplicaLost, QueueFull."""


class Relay:
    """An ASGI application that hands requests to replicas. most_bytes: of a body.

    A request that is lost with its replica before the first byte of its reply goes to another
    replica. No client gets parts of two replies. GET /health is answered here: Ray watches replicas.
    """

    def __init__(self, replicas: Replicas, most_bytes: int) -> None:
        self._replicas, self._most = replicas, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == "/health" and scope["method"] == "GET":  # a full queue is no failure
            await JSONResponse({"status": "ok"})(scope, receive, send)
            return
        try:
            asked = await self._read(Request(scope, receive))
        except ClientDisconnect:
            return
        except ApiError as error:
            await reply(error)(scope, receive, send)
            return
        work, gone = asyncio.ensure_future(self._answer(asked, scope, receive, send)), asyncio.ensure_future(receive())
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _read(self, request: Request) -> Asked:
        """Return the whole request. Raises ApiError, ClientDisconnect."""
        if request.url.path == "/metrics":
            raise NO_METRICS
        content = await read_body(request, self._most)
        scope = request.scope
        return Asked(scope["method"], scope["path"], scope["query_string"], tuple(scope["headers"]), content)

    async def _answer(self, asked: Asked, scope: Scope, receive: Receive, send: Send) -> None:
        session = session_of(Headers(raw=list(asked.headers)), asked.body)
        for _ in range(TRIES):
            start: Message | None = None
            begun = False
            try:
                async with aclosing(self._replicas.ask(asked, session)) as messages:
                    async for message in messages:
                        if start is None:
                            start = message  # waits for the first bytes
                            continue
                        if not begun:
                            begun = True
                            await send(start)
                        await send(message)
                return
            except ReplicaLost:
                if begun:
                    assert start is not None
                    await _end(start, send)
                    return
            except QueueFull as error:
                await reply(failed(error))(scope, receive, send)
                return
        await reply(LOST)(scope, receive, send)


async def _end(start: Message, send: Send) -> None:
    """End a reply that has begun: a stream with an error event, any other by breaking it off. Raises ReplicaLost."""
    if not Headers(raw=start["headers"]).get("content-type", "").startswith("text/event-stream"):
        raise ReplicaLost
    told = body(LOST)
    last = event({"type": "error", **told["error"], **told}, "error")
    await send({"type": "http.response.body", "body": last, "more_body": False})


async def answer_in(app: ASGIApp, asked: Asked) -> AsyncGenerator[Message, None]:
    """Yield the messages of an application's reply. Closing the generator disconnects the client."""
    messages, disconnected = asyncio.Queue[Message | None](), asyncio.Event()
    incoming: list[Message] = [{"type": "http.request", "body": asked.body, "more_body": False}]

    async def receive() -> Message:
        if incoming:
            return incoming.pop()
        await disconnected.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(_scope(asked), receive, messages.put)
        finally:
            messages.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        while (message := await messages.get()) is not None:
            yield message
        await task
    finally:
        disconnected.set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _scope(asked: Asked) -> Scope:
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "root_path": "",
        "method": asked.method, "path": asked.path, "raw_path": asked.path.encode(), "query_string": asked.query,
        "headers": list(asked.headers), "client": None, "server": None,
    }  # fmt: skip
