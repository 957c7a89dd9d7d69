"""A real pair behind the server: OpenVINO, ONNX Runtime, and the tokenizer of a folder."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dovetail.runtime.async_engine import AsyncEngine
from dovetail.runtime.engine import Engine
from dovetail.runtime.serve.app import make_app
from dovetail.runtime.serve.server import Server, bind
from dovetail.runtime.serve.service import Service
from dovetail.runtime.tree.limits import TreeLimits

TREE = TreeLimits(width=6, depth=2, top_k=2)
PROMPTS = ["the quick brown fox", "over the lazy dog", "the the the the"]


@pytest.fixture(scope="module")
def server(tiny_full_pair: Path) -> Iterator[httpx.Client]:
    engine = AsyncEngine.from_pretrained(tiny_full_pair, tree=TREE, threads=1, slots=3)
    service = Service(engine, "tiny")
    bound = bind("127.0.0.1", 0)
    running = Server(make_app(service), service)
    thread = threading.Thread(target=lambda: asyncio.run(running.run_engine(bound)))
    thread.start()
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    bound.listen()
    with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
        yield client
    running.handle_exit(15, None)
    thread.join(60)
    assert not thread.is_alive()


def complete(server: httpx.Client, **fields: Any) -> Any:
    reply = server.post("/v1/completions", json={"max_tokens": 30, "temperature": 0, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_answers_side_by_side_are_those_of_one_engine(server: httpx.Client, tiny_full_pair: Path) -> None:
    found = complete(server, prompt=PROMPTS)
    with Engine.from_pretrained(tiny_full_pair, tree=TREE, threads=1) as engine:
        alone = [engine.generate(prompt, 30, raw=True).text for prompt in PROMPTS]
    assert [choice["text"] for choice in found["choices"]] == alone
    assert found["usage"]["completion_tokens_details"]["rejected_prediction_tokens"] > 0


def test_plain_answers_are_the_same(server: httpx.Client) -> None:
    drafted, plain = complete(server, prompt=PROMPTS), complete(server, prompt=PROMPTS, speculate=False)
    assert drafted["choices"] == plain["choices"]
    assert plain["usage"]["completion_tokens_details"]["rejected_prediction_tokens"] == 0


def test_a_prompt_is_cached(server: httpx.Client) -> None:
    prompt = "one two three four five six seven eight nine ten " * 2
    complete(server, prompt=prompt)
    again = complete(server, prompt=prompt)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.mark.parametrize(
    "tree", [{"width": 64, "top_k": 10}, {"width": 1}, {"depth": 0}, {"width": 64, "depth": 64, "lookup": 64}]
)
def test_any_tree_of_a_request_gives_the_same_text(server: httpx.Client, tree: dict[str, int]) -> None:
    assert complete(server, prompt=PROMPTS, tree=tree)["choices"] == complete(server, prompt=PROMPTS)["choices"]


def test_json_of_a_schema(server: httpx.Client) -> None:
    schema = {"enum": ["left", "right"]}
    body = {
        "messages": [{"role": "user", "content": "where?"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "side", "schema": schema}},
    }
    reply = server.post("/v1/chat/completions", json=body).json()
    assert reply["choices"][0]["message"]["content"] in ('"left"', '"right"')
