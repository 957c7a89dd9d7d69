"""Requests reach a replica, and another one when that is lost; no client gets two replies.

Two real applications answer, in this process. A lost replica is one whose messages end early.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

import httpx
import pytest
from starlette.types import Message
from tests.runtime.serve.conftest import make_engine

from dovetail.runtime.errors import QueueFull
from dovetail.runtime.serve.app import make_app
from dovetail.runtime.serve.ray.relay import TRIES, Asked, Relay, ReplicaLost, answer_in
from dovetail.runtime.serve.service import Service

CHAT = "/v1/chat/completions"


class Here:
    """Replicas in this process. fates: how many messages each asked replica gives before it is lost; None is all."""

    def __init__(self) -> None:
        self.services = [Service(make_engine(), "parrot") for _ in range(2)]
        self.apps = [make_app(service) for service in self.services]
        self.fates: list[int | None] = []
        self.sessions: list[str] = []

    async def ask(self, asked: Asked, session: str) -> AsyncGenerator[Message, None]:
        number, fate = len(self.sessions), self.fates.pop(0) if self.fates else None
        self.sessions.append(session)
        async with aclosing(answer_in(self.apps[number % 2], asked)) as messages:
            given = 0
            async for message in messages:
                if given == fate:
                    raise ReplicaLost
                given += 1
                yield message

    def busy(self) -> int:
        stats = [service.engine.stats() for service in self.services]
        return sum(each.running + each.waiting for each in stats)


@pytest.fixture
def here() -> Iterator[Here]:
    replicas = Here()
    yield replicas
    for service in replicas.services:
        asyncio.run(service.engine.close())


def post(replicas: Any, path: str = CHAT, **asked: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Relay(replicas, 10_000))
        async with httpx.AsyncClient(transport=transport, base_url="http://relay") as client:
            return await client.post(path, json=asked)

    return asyncio.run(ask())


def say(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"say {text}"}], **more}


def events(reply: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]


@pytest.mark.parametrize("fates", [[], [0], [1], [0, 1]])
@pytest.mark.parametrize("stream", [False, True])
def test_a_lost_request_is_asked_again_and_answered_once(here: Here, fates: list[int | None], stream: bool) -> None:
    here.fates = [*fates]
    reply = post(here, **say("figs", stream=stream))
    assert reply.status_code == 200 and len(here.sessions) == len(fates) + 1 and len(set(here.sessions)) == 1
    if not stream:
        assert reply.json()["choices"][0]["message"]["content"] == "figs"
        return
    *told, done = events(reply)
    assert done == "[DONE]"
    chunks = [json.loads(each)["choices"][0]["delta"].get("content") or "" for each in told]
    assert "".join(chunks) == "figs"


def test_a_stream_that_has_begun_ends_with_an_error(here: Here) -> None:
    here.fates = [3]
    reply = post(here, **say("a long answer about figs", stream=True))
    *_, last = events(reply)
    assert json.loads(last)["error"]["code"] == "replica_lost" and "[DONE]" not in reply.text
    assert len(here.sessions) == 1


def test_a_request_that_is_lost_again_and_again_is_refused(here: Here) -> None:
    here.fates = [0] * TRIES
    reply = post(here, **say("figs"))
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "replica_lost")
    assert len(here.sessions) == TRIES and reply.headers["retry-after"]


def test_full_replicas_are_429() -> None:
    class Full:
        async def ask(self, asked: Asked, session: str) -> AsyncGenerator[Message, None]:
            raise QueueFull("too many requests wait: ask again later")
            yield {}

    reply = post(Full(), **say("figs"))
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "queue_full")


def test_health_asks_no_replica(here: Here) -> None:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(Relay(here, 10_000)), base_url="http://relay"
        ) as client:
            return await client.get("/health")

    reply = asyncio.run(ask())
    assert (reply.status_code, reply.json()) == (200, {"status": "ok"})
    assert here.sessions == []


def test_refusals_of_a_replica_come_through(here: Here) -> None:
    assert post(here, **say("figs", temprature=1)).json()["error"]["param"] == "temprature"
    assert post(here, "/v1/nothing").status_code == 404


def test_a_large_body_reaches_no_replica(here: Here) -> None:
    assert post(here, **say("a" * 10_000)).status_code == 413
    assert post(here, "/metrics").status_code == 404
    assert here.sessions == []


def test_a_slow_body_reaches_no_replica(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dovetail.runtime.serve.body.BODY_S", 0.2, raising=False)

    async def ask() -> None:
        sent = list[Message]()

        async def receive() -> Message:
            await asyncio.sleep(0.01)
            return {"type": "http.request", "body": b" ", "more_body": True}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "headers": []}
        await asyncio.wait_for(Relay(here, 10_000)(scope, receive, send), 5)
        assert sent[0]["status"] == 408

    asyncio.run(ask())
    assert here.sessions == []


def test_a_client_that_leaves_frees_the_replica(here: Here) -> None:
    async def ask_and_leave() -> None:
        sent, incoming = list[Message](), asyncio.Queue[Message]()
        body = json.dumps(say("x" * 4000, stream=True)).encode()
        await incoming.put({"type": "http.request", "body": body, "more_body": False})

        async def send(message: Message) -> None:
            sent.append(message)
            if len(sent) == 3:
                assert here.busy() == 1
                await incoming.put({"type": "http.disconnect"})

        scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "headers": [
            (b"content-type", b"application/json")]}  # fmt: skip
        await asyncio.wait_for(Relay(here, 10_000)(scope, incoming.get, send), 30)
        assert len(sent) < 1000
        while here.busy():
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(ask_and_leave(), 60))
