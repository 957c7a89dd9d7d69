"""Answers end with their clients, and a server ends with its answers."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from dovetail.runtime.errors import DeviceError
from dovetail.runtime.serve.server import bind
from dovetail.runtime.serve.service import Limits

SLOW = {"messages": [{"role": "user", "content": "slow say " + "a" * 1500}], "temperature": 0}
SHORT = {"messages": [{"role": "user", "content": "slow say " + "a" * 100}], "temperature": 0}


def busy(server: Any) -> bool:
    stats = server.service.engine.stats()
    return bool(stats.running + stats.waiting)


@pytest.mark.parametrize("n", [1, 3])
def test_leaving_a_stream_ends_its_answers(parrot: Any, n: int) -> None:
    body = {**SLOW, "stream": True, "n": n}
    with parrot.http() as client, client.stream("POST", "/v1/chat/completions", json=body) as reply:
        pieces = reply.iter_bytes()  # a reader that is dropped closes the connection
        next(pieces)
        parrot.until(lambda: busy(parrot))
    parrot.wait_idle()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_leaving_before_the_reply_ends_the_answer(parrot: Any, path: str) -> None:
    body = SLOW if "chat" in path else {"input": "slow say " + "a" * 1500, "temperature": 0}
    with parrot.http() as client, pytest.raises(httpx.ReadTimeout):
        client.post(path, json=body, timeout=0.3)
    parrot.wait_idle()


def test_leaving_the_queue(serve: Callable[..., Any]) -> None:
    server = serve(slots=1)
    with server.http() as client, client.stream("POST", "/v1/chat/completions", json={**SLOW, "stream": True}) as reply:
        pieces = reply.iter_bytes()
        next(pieces)
        with server.http() as other, pytest.raises(httpx.ReadTimeout):
            other.post("/v1/chat/completions", json={**SLOW, "stream": True}, timeout=0.3)
        server.until(lambda: server.service.engine.stats().waiting == 0)
        assert busy(server)
    server.wait_idle()


def test_a_server_that_drains(serve: Callable[..., Any]) -> None:
    server = serve()
    with (
        server.http() as client,
        client.stream("POST", "/v1/chat/completions", json={**SHORT, "stream": True}) as reply,
    ):
        lines = reply.iter_lines()
        next(lines)
        server.server.handle_exit(15, None)
        refused = server.post("/v1/chat/completions", SHORT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        with server.http() as other:
            assert other.get("/health").status_code == 503
        rest = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert rest[-1]["choices"][0]["finish_reason"] == "stop"
    server.thread.join(60)
    assert not server.thread.is_alive()


def test_an_upload_that_never_ends_does_not_keep_the_server(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dovetail.runtime.serve.server.GRACE_S", 1)
    server = serve()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 500\r\n\r\n{")
        assert server.post("/v1/chat/completions", SHORT).status_code == 200
        server.server.handle_exit(15, None)
        server.thread.join(60)
        assert not server.thread.is_alive()


def test_two_servers_cannot_have_one_port() -> None:
    with bind("127.0.0.1", 0) as first, pytest.raises(DeviceError, match=r"cannot listen on .* in use"):
        bind("127.0.0.1", first.getsockname()[1])


def test_a_request_that_is_read_while_the_server_drains(serve: Callable[..., Any]) -> None:
    server = serve()
    service = server.service
    kept = service.engine.ask

    def late(*prompt: Any, **options: Any) -> Any:
        found = kept(*prompt, **options)
        server.server.handle_exit(15, None)
        server.until(lambda: service.engine._draining)
        return found

    service.engine.ask = late
    refused = server.post("/v1/chat/completions", SHORT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")


def test_a_second_signal_ends_at_once(serve: Callable[..., Any]) -> None:
    server = serve(slots=1)
    replies = list[Any]()
    bodies = [SLOW, {**SLOW, "stream": True}, SLOW]  # one runs, and two wait
    asking = [
        threading.Thread(target=lambda body=body: replies.append(server.post("/v1/chat/completions", body)))
        for body in bodies
    ]
    for thread in asking:
        thread.start()
    server.until(lambda: server.service.engine.stats().running + server.service.engine.stats().waiting == 3)
    server.server.handle_exit(15, None)
    server.server.handle_exit(15, None)
    server.thread.join(60)
    assert not server.thread.is_alive()
    for thread in asking:
        thread.join(60)
    assert sorted(reply.status_code for reply in replies) == [200, 503, 503]  # the stream has begun
    for reply in replies:
        last = reply.text.strip().splitlines()[-3] if reply.status_code == 200 else reply.text
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down", reply.text


def test_metrics_count_each_end(serve: Callable[..., Any]) -> None:
    server = serve(slots=1, queue=1, limits=Limits(timeout_s=2))
    hi = {"messages": [{"role": "user", "content": "say hi"}], "temperature": 0}
    assert server.post("/v1/chat/completions", {**hi, "n": 2}).status_code == 200
    assert server.post("/v1/chat/completions", {**hi, "max_tokens": 1}).status_code == 200
    assert server.post("/v1/chat/completions", SLOW).status_code == 504
    with server.http() as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json=SLOW, timeout=0.2)
    server.wait_idle()
    with server.http() as client:
        lines = client.get("/metrics").text.splitlines()
    ends = {reason: f'dovetail:request_success_total{{finished_reason="{reason}",model_name="parrot"}} {count}'
            for reason, count in (("stop", "2.0"), ("length", "1.0"), ("error", "1.0"), ("abort", "1.0"))}  # fmt: skip
    assert set(ends.values()) <= set(lines)


def test_metrics_count_refusals(serve: Callable[..., Any]) -> None:
    server = serve(slots=1, queue=1)
    asked = {**SLOW, "n": 2, "stream": True}
    with server.http() as client, client.stream("POST", "/v1/chat/completions", json=asked) as reply:
        pieces = reply.iter_lines()
        next(pieces)
        assert server.post("/v1/chat/completions", SHORT).status_code == 429
        lines = httpx.get(f"{server.url}/metrics", trust_env=False).text.splitlines()
    assert 'dovetail:admission_rejections_total{model_name="parrot"} 1.0' in lines


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_failed_is_unhealthy(serve: Callable[..., Any], capfd: Any) -> None:
    server = serve()

    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    server.service.engine._engine._batch.target.verify = fail
    assert server.post("/v1/chat/completions", SHORT).status_code == 500
    with server.http() as client:
        server.until(lambda: client.get("/health").status_code == 503)
    assert server.post("/v1/chat/completions", SHORT).status_code == 503
