"""Every refusal has OpenAI's form, the right status, and names what to change."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import openai
import pytest

from dovetail.runtime.serve.service import Limits

SAY = {"messages": [{"role": "user", "content": "say hi"}], "temperature": 0}


def error_of(reply: Any) -> dict[str, Any]:
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"]
    found: dict[str, Any] = error
    return found


def chat(server: Any, **fields: Any) -> Any:
    return server.post("/v1/chat/completions", {**SAY, **fields})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_token": 5}, "max_token"),
        ({"stop": ""}, "stop"),
        ({"seed": "one"}, "seed"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tree": {"width": 0}}, "tree.width"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, None),
        ({"messages": [{"role": "king", "content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a"}}] * 2}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a"}}],
          "tool_choice": {"type": "function", "function": {"name": "b"}}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a"}}], "response_format": {"type": "json_object"}},
         "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "odd"}}}},
         "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "odd"}}}],
          "tool_choice": "required"}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
        ({"store": True}, "store"),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_used(parrot: Any, fields: dict[str, Any], param: str | None) -> None:
    reply = chat(parrot, **fields)
    assert reply.status_code == 400, reply.text
    error = error_of(reply)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert ": " in error["message"].removeprefix(f"{param}: ")  # what is wrong, and what to do


@pytest.mark.parametrize("given", [{"content": b"{}", "headers": {"content-type": "text/plain"}}, {"content": b""}])
def test_a_body_that_is_not_sent_as_json(parrot: Any, given: dict[str, Any]) -> None:
    reply = parrot.post("/v1/chat/completions", None, **given)
    assert reply.status_code == 400, reply.text
    assert error_of(reply)["message"] == "the body is no JSON object: send one with Content-Type: application/json"


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([-1], "prompt.0: Input should be greater than or equal to 0: send another value"),
        ([1.5], "prompt.0: Input should be a valid string: send another value"),
        ([], "prompt: List should have at least 1 item after validation, not 0: send another value"),
        (5, "prompt: Input should be a valid string: send another value"),
    ],
)
def test_a_prompt_of_another_kind_names_the_fitting_branch(parrot: Any, prompt: Any, said: str) -> None:
    assert error_of(parrot.post("/v1/completions", {"prompt": prompt}))["message"] == said


def test_a_field_that_is_missing(parrot: Any) -> None:
    error = error_of(parrot.post("/v1/completions", {}))
    assert (error["param"], error["code"]) == ("prompt", "missing_required_parameter")
    assert error["message"] == "the field prompt is missing: send it"


@pytest.mark.parametrize("tools", [[], [{"type": "function", "name": "a"}]])
def test_the_form_of_a_response_that_cannot_be_used(parrot: Any, tools: list[Any]) -> None:
    form = {"type": "json_schema", "name": "x", "schema": {"type": "odd"}}
    reply = parrot.post("/v1/responses", {"input": "say hi", "text": {"format": form}, "tools": tools})
    assert (reply.status_code, error_of(reply)["param"]) == (400, "text.format")


def test_a_load_balancer_may_ask_for_the_head_alone(parrot: Any) -> None:
    with parrot.http() as client:
        assert client.head("/health").status_code == 200


@pytest.mark.parametrize("stop", ["", [""], ["a", ""]])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_an_empty_stop_string(parrot: Any, path: str, stop: Any) -> None:
    prompt = {"prompt": "abc"} if path == "/v1/completions" else SAY
    error = error_of(parrot.post(path, {**prompt, "stop": stop}))
    assert error["param"] == "stop"
    assert error["message"] == "stop: an empty text cannot end an answer: leave it out"


@pytest.mark.parametrize("stream", [{}, {"stream": None}, {"stream": False}])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_stream_options_without_a_stream(parrot: Any, path: str, stream: dict[str, Any]) -> None:
    prompt = {"/v1/completions": {"prompt": "abc"}, "/v1/responses": {"input": "say hi"}}.get(path, SAY)
    reply = parrot.post(path, {**prompt, **stream, "stream_options": {"include_obfuscation": False}})
    assert reply.status_code == 400, reply.text
    assert error_of(reply)["message"] == "stream_options: needs stream: true: send that too, or leave it out"
    reply = parrot.post(path, {**prompt, **stream, "stream_options": None})
    assert reply.status_code == 200, reply.text


def test_hints_of_openais_clients_are_taken(parrot: Any) -> None:
    hints = {"user": "me", "metadata": {"a": "b"}, "service_tier": "auto", "store": False, "prediction": None}
    assert chat(parrot, **hints).status_code == 200


def test_an_unknown_model(parrot: Any) -> None:
    reply = chat(parrot, model="gpt-6")
    assert (reply.status_code, error_of(reply)["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/page/none", 404),
        ("POST", "/", 405),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/health", 405),
    ],
)
def test_an_unknown_path_or_method(parrot: Any, method: str, path: str, status: int) -> None:
    with parrot.http() as client:
        reply = client.request(method, path)
    assert reply.status_code == status
    error_of(reply)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"messages": NaN}', b'{"messages": [], "temperature": 1e999}',
        b'{"temperature": -Infinity}', b"[" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000, b'{"x": "\\ud800"}',
        b'{"n": ' + b"9" * 5000 + b"}", b'{"messages": [{"role": "user", "content": "a\\u0000b"}], "n": 0}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"])
def test_a_body_that_is_no_request(parrot: Any, path: str, content: bytes) -> None:
    reply = parrot.post(path, content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 400, reply.text
    error_of(reply)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
@pytest.mark.parametrize(
    "place",
    [
        '"temperature": %s', '"seed": %s', '"metadata": {"a": [%s]}', '"chat_template_kwargs": {"a": %s}',
        '"tools": [{"type": "function", "function": {"name": "f", "parameters": {"minimum": %s}}}]',
        '"messages": [{"role": "assistant", "tool_calls": [{"function": '
        '{"name": "f", "arguments": "{\\"a\\": %s}"}}]}]',
        '"messages": [{"role": "user", "content": "hi", "more": %s}]',
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_a_number_that_is_not_finite(parrot: Any, path: str, place: str, number: str) -> None:
    rest = "" if "messages" in place else ', "messages": [{"role": "user", "content": "hi"}]'
    content = "{" + place % number + rest + "}"
    reply = parrot.post(path, content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 400, reply.text
    assert f"{number} is no finite number" in error_of(reply)["message"]


def test_arguments_of_a_response_that_are_not_finite(parrot: Any) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": 1e999}'}
    reply = parrot.post("/v1/responses", {"input": [call]})
    assert reply.status_code == 400, reply.text
    assert "1e999 is no finite number" in error_of(reply)["message"]


def test_a_body_of_another_type(parrot: Any) -> None:
    reply = parrot.post("/v1/chat/completions", content=json.dumps(SAY), headers={"content-type": "text/plain"})
    assert reply.status_code == 400
    error_of(reply)


def test_a_prompt_without_room(parrot: Any) -> None:
    reply = chat(parrot, messages=[{"role": "user", "content": "a" * 5000}])
    assert (reply.status_code, error_of(reply)["code"]) == (400, "context_length_exceeded")


def test_special_tokens_in_messages_are_text(parrot: Any) -> None:
    said = {"messages": [{"role": "user", "content": "a<|im_end|>b"}]}
    found = parrot.post("/tokenize", said).json()["tokens"]
    (mark,) = parrot.service.tokenizer.encode("<|im_end|>")
    assert found.count(mark) == 1


def test_limits_of_a_server(serve: Callable[..., Any]) -> None:
    server = serve(limits=Limits(body_bytes=1000, prompt_tokens=60, new_tokens=5))
    assert chat(server).json()["choices"][0]["message"]["content"] == "hi"
    assert error_of(chat(server, max_tokens=6))["param"] == "max_tokens"
    long = chat(server, messages=[{"role": "user", "content": "say " + "a" * 60}])
    assert error_of(long)["code"] == "context_length_exceeded"
    cut = server.post("/v1/completions", {"prompt": "abc", "temperature": 0})
    assert cut.json()["choices"][0]["text"] == "defgh"
    large = chat(server, messages=[{"role": "user", "content": "a" * 1000}])
    assert (large.status_code, error_of(large)["code"]) == (413, "request_too_large")


def test_a_body_of_unknown_size_is_cut_off(serve: Callable[..., Any]) -> None:
    server = serve(limits=Limits(body_bytes=1000))

    def pieces() -> Any:
        yield from [b"a" * 500] * 3

    reply = server.post("/v1/completions", content=pieces(), headers={"content-type": "application/json"})
    assert reply.status_code == 413
    error_of(reply)


def test_a_body_that_comes_byte_by_byte_is_cut_off(parrot: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dovetail.runtime.serve.body.BODY_S", 0.5, raising=False)
    host, port = parrot.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=0.05) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: 500\r\n\r\n"
        )
        answer, end = b"", time.monotonic() + 5
        while not answer and time.monotonic() < end:
            connection.sendall(b" ")
            with suppress(TimeoutError):
                answer = connection.recv(10_000)
        connection.settimeout(5)
        while part := connection.recv(10_000):  # up to the end of the connection
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert json.loads(body)["error"]["code"] == "request_timeout"


def test_a_large_body_for_no_route(serve: Callable[..., Any]) -> None:
    server = serve(limits=Limits(body_bytes=1000))
    error_of(server.post("/nothing", {"a": "b" * 2000}))


def test_a_slow_answer_is_stopped(serve: Callable[..., Any]) -> None:
    server = serve(limits=Limits(timeout_s=0.2))
    slow = {"messages": [{"role": "user", "content": "slow say " + "a" * 400}]}
    reply = chat(server, **slow)
    assert (reply.status_code, error_of(reply)["code"]) == (504, "timeout")
    assert reply.headers["x-should-retry"] == "false"
    server.wait_idle()
    with pytest.raises(openai.APIError, match="seconds"), server.client() as client:
        list(client.chat.completions.create(model="parrot", stream=True, temperature=0, **slow))
    server.wait_idle()


def test_a_full_queue(serve: Callable[..., Any]) -> None:
    server = serve(slots=1, queue=1)
    slow = {"messages": [{"role": "user", "content": "slow say " + "a" * 400}], "temperature": 0}
    asked = {"model": "parrot", "stream": True, "n": 2, **slow}
    with server.client() as client, client.chat.completions.create(**asked) as stream:
        next(iter(stream))
        refused = chat(server)
        assert (refused.status_code, error_of(refused)["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
    server.wait_idle()
    assert chat(server, n=2).status_code == 200


def test_more_answers_than_there_will_ever_be_room_for(serve: Callable[..., Any]) -> None:
    refused = chat(serve(slots=1, queue=1), n=3)
    assert (refused.status_code, error_of(refused)["param"]) == (400, "n")
    assert "ask for 2 at most" in error_of(refused)["message"]


def test_a_key(serve: Callable[..., Any]) -> None:
    server = serve(api_key="s3cret")
    for path in ("/v1/models", "/v1/nothing", "/metrics"):
        with server.http() as client:
            assert client.get(path).status_code == 401
            assert client.get("/health").status_code == 200
            assert "<title>" in client.get("/").text
    with server.client(api_key="wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key" and caught.value.response.headers["www-authenticate"] == "Bearer"
    with server.client(api_key="s3cret") as client:
        assert [model.id for model in client.models.list()] == ["parrot"]
    reply = server.post("/v1/completions", content=b"a" * 10, headers={"authorization": b"Bearer \xff"})
    assert reply.status_code == 401


def test_web_pages_are_refused_by_default(parrot: Any, serve: Callable[..., Any]) -> None:
    ask = {"origin": "http://page.example", "access-control-request-method": "POST"}
    with parrot.http() as client:
        assert "access-control-allow-origin" not in client.get("/health", headers=ask).headers
        assert client.options("/v1/chat/completions", headers=ask).status_code == 405
    server = serve(cors=("http://page.example",), api_key="s3cret")
    with server.http() as client:
        allowed = client.options("/v1/chat/completions", headers=ask)
        assert allowed.headers["access-control-allow-origin"] == "http://page.example"
        other = client.options("/v1/chat/completions", headers={**ask, "origin": "http://other.example"})
        assert "access-control-allow-origin" not in other.headers
        refused = client.get("/v1/models", headers=ask)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "http://page.example"


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/v1/nothing"])
@pytest.mark.parametrize(
    "host", ["page.example", "page.example:80", "127.0.0.1.page.example", "10.0.0.1", "[::2]:1", ""]
)
def test_a_host_header_of_another_server(parrot: Any, path: str, host: str) -> None:
    with parrot.http() as client:
        reply = client.get(path, headers={"host": host})
    assert (reply.status_code, error_of(reply)["code"]) == (403, "unknown_host")


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8080", "a.localhost", "127.0.0.1:1", "127.8.8.8", "[::1]:80", "my-box:8080", "My-Box"],
)
def test_a_host_header_of_this_machine(serve: Callable[..., Any], host: str) -> None:
    with serve(local="My-box").http() as client:
        assert client.get("/v1/models", headers={"host": host}).status_code == 200


def test_a_request_that_is_no_http(parrot: Any) -> None:
    host, port = parrot.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"\x00\x01 nonsense\r\n\r\n")
        assert b"400" in connection.recv(1000)


def test_a_failing_engine_is_no_secret_and_no_end(serve: Callable[..., Any], capfd: Any) -> None:
    server = serve()
    broken = server.service.engine.tokenizer
    kept, broken.encode_chat = broken.encode_chat, lambda *_, **__: 1 / 0
    reply = chat(server)
    assert (reply.status_code, error_of(reply)["type"]) == (500, "server_error")
    assert "division" not in reply.text
    broken.encode_chat = kept
    assert chat(server).status_code == 200
    assert "ZeroDivisionError" in capfd.readouterr().err
