"""Two replicas on a Ray of this machine, one of which is killed under load: every request has one right answer.

Needs the extra `ray`, which the lock leaves out. The other tests of this folder need no Ray.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from dovetail.runtime.engine import Engine

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")

SERVE = """
import sys, time
import ray
from ray import serve
from dovetail.runtime.serve.ray import app
pair, port = sys.argv[1:]
ray.init(num_cpus=2, include_dashboard=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
properties = "KV_CACHE_PRECISION=u8"  # changes most texts
serve.run(app({"pair": pair, "min_replicas": 2, "max_replicas": 2, "cpus": 1, "slots": 3, "ov_config": properties}))
print("ready", flush=True)
sys.stdin.read()
"""
TEXT = "quick brown fox jumps over the lazy dog and sleeps under the old tree, day by day by day"  # some KV blocks
PROMPTS = [f"{word} {TEXT}" for word in ("the", "a", "one", "that", "this", "any", "some", "no")]
TOKENS = 60


@pytest.fixture(scope="module")
def url(tiny_full_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("home")  # where Ray keeps a token
    own = {"HOME": str(home), "DOVETAIL_CACHE": str(home / "cache"), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", SERVE, str(tiny_full_pair), str(port)]
    with (
        (home / "log").open("w") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **own}
        ) as process,
    ):
        assert process.stdout is not None
        while (line := process.stdout.readline()) != "ready\n":
            assert line, (home / "log").read_text()
        yield f"http://127.0.0.1:{port}"
        process.communicate(timeout=60)


def replica_processes() -> list[int]:
    """The processes of this machine's replicas, as Ray names them."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if entry.read_bytes().startswith(b"ray::ServeReplica:default:replicas"):
                found.append(int(entry.parent.name))
        except OSError:  # it has just ended
            continue
    return found


async def complete(client: httpx.AsyncClient, prompt: str) -> tuple[str, int]:
    """The text of an answer, and how much of its prompt was cached."""
    reply = await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": TOKENS, "temperature": 0})
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    return choice["text"], reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.fixture(scope="module")
def alone(tiny_full_pair: Path) -> dict[str, str]:
    """The texts of one engine."""
    with Engine.from_pretrained(tiny_full_pair, threads=1, ov_config={"KV_CACHE_PRECISION": "u8"}) as engine:
        return {prompt: engine.generate(prompt, TOKENS, raw=True).text for prompt in PROMPTS}


def test_a_session_meets_its_prefix_again(url: str, alone: dict[str, str]) -> None:
    async def ask() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:
            for prompt in PROMPTS[:4]:
                for again in range(3):
                    text, cached = await complete(client, prompt)
                    assert text == alone[prompt] and bool(cached) is bool(again), (prompt, again, cached)

    asyncio.run(ask())


def test_a_replica_that_is_killed_under_load_loses_no_request(url: str, alone: dict[str, str]) -> None:
    async def ask() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:
            asked = [asyncio.create_task(complete(client, prompt)) for prompt in PROMPTS * 6]
            while sum(task.done() for task in asked) < 8:
                await asyncio.sleep(0.01)
            before = replica_processes()
            assert len(before) == 2
            os.kill(before[0], signal.SIGKILL)
            answers = [text for text, _ in await asyncio.gather(*asked)]
            assert answers == [alone[prompt] for prompt in PROMPTS * 6]
        while set(replica_processes()) <= set(before[1:]):  # Ray starts another one
            time.sleep(0.1)

    asyncio.run(asyncio.wait_for(ask(), 300))
