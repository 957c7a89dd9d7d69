"""A real server on a free port of 127.0.0.1, over a target that says what it is told to say."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from dovetail.runtime.async_engine import AsyncEngine
from dovetail.runtime.batch_engine import BatchEngine
from dovetail.runtime.serve.app import make_app
from dovetail.runtime.serve.server import Server, bind
from dovetail.runtime.serve.service import Limits, Service
from dovetail.runtime.testing.scripted import MarkovLogits, ScriptedDrafter, ScriptedTarget
from dovetail.runtime.text.tokenizer import Tokenizer

LEAD = 24  # of the next token's logit: of all other tokens together one in 10**8 is drawn at temperature 1

# Qwen's form: tools in the system turn, calls as <tool_call>{...}</tool_call>.
CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking %}<think>
{% endif %}{% endif %}"""
# The word is no secret: a template must name both marks, to be one whose answers may think.
CHAT_TEMPLATE += "{# <think></think> #}"


def make_tokenizer() -> Tokenizer:
    """One token for each byte, and three special ones."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(mark, special=True) for mark in ("<|im_start|>", "<|im_end|>")])
    return Tokenizer(backend.to_str().encode(), special_tokens={"eos_token": "<|im_end|>"}, chat_template=CHAT_TEMPLATE)


class Parrot:
    """Logits that continue an alphabet, or repeat what the user tells to say, then end the turn.

    "say X" gives X. "noise" gives random letters. Before either "slow " makes each node take 10 ms.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = lru_cache(1024)(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))
        self._decode = lru_cache(1024)(lambda ids: tokenizer.decode(ids, skip_special_tokens=False))
        (self._start,), (self._end,) = self._encode("<|im_start|>"), self._encode("<|im_end|>")
        self._noise = MarkovLogits(tokenizer.vocab_size, seed=1)
        self._letters = [self._encode(chr(code))[0] for code in range(ord("a"), ord("z") + 1)]

    def __call__(self, prefix: tuple[int, ...]) -> NDArray[np.float32]:
        logits = self._noise(prefix) * 0.25
        if self._start not in prefix:
            last = self._letters.index(prefix[-1]) if prefix[-1] in self._letters else -1
            logits[[*self._letters, self._end][last + 1]] += LEAD
            return logits
        begin = max(index for index, token in enumerate(prefix) if token == self._start)
        told, said = self._told(prefix[:begin]), prefix[begin + 1 :]
        for head in map(self._encode, ("assistant\n", "<think>\n")):
            said = said[len(head) :] if said[: len(head)] == head else said
        if told.startswith("slow "):
            time.sleep(0.01)
            told = told.removeprefix("slow ")
        if told.startswith("noise"):
            logits = self._noise(prefix).copy()
            logits[self._letters] += 20
            return logits
        text = (*self._encode(told.partition("say ")[2] or "Hello there."), self._end)
        on = text[: len(said)] == said and len(said) < len(text)
        logits[text[len(said)] if on else self._end] += LEAD
        return logits

    def _told(self, prefix: tuple[int, ...]) -> str:
        turns = self._decode(prefix).split("<|im_start|>")
        users = [
            turn.removeprefix("user\n").removesuffix("<|im_end|>\n") for turn in turns if turn.startswith("user\n")
        ]
        return users[-1] if users else ""


def make_engine(*, slots: int = 4, queue: int = 16, max_context: int = 4096) -> AsyncEngine:
    tokenizer = make_tokenizer()
    logits = Parrot(tokenizer)
    target, drafter = ScriptedTarget(logits, max_context), ScriptedDrafter.copy_of(logits)
    return AsyncEngine(BatchEngine(target, drafter, tokenizer, slots=slots, queue=queue))


@dataclass
class Running:
    """A server that runs in a thread."""

    url: str  # without /v1
    service: Service
    server: Server
    thread: threading.Thread

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, trust_env=False, timeout=30, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        with self.http() as client:
            return client.post(path, json=body, **options)

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds."""
        for _ in range(1000):
            if holds():
                return
            time.sleep(0.01)
        raise AssertionError("it never held")

    def wait_idle(self) -> None:
        self.until(lambda: self.service.engine.stats().running + self.service.engine.stats().waiting == 0)


@contextmanager
def running(
    *,
    limits: Limits | None = None,
    api_key: str | None = None,
    cors: tuple[str, ...] = (),
    local: str | None = "127.0.0.1",
    **engine: Any,
) -> Iterator[Running]:
    """Serve until the end of the block; then every answer must be over."""
    service = Service(make_engine(**engine), "parrot", limits or Limits())
    bound = bind("127.0.0.1", 0)
    server = Server(make_app(service, api_key=api_key, cors=cors, local=local), service)
    thread = threading.Thread(target=lambda: asyncio.run(server.run_engine(bound)))
    thread.start()
    found = Running(f"http://127.0.0.1:{bound.getsockname()[1]}", service, server, thread)
    try:
        found.until(lambda: server.started)
        yield found
    finally:
        server.handle_exit(15, None)
        thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def parrot() -> Iterator[Running]:
    """One server for all tests that leave it as it was."""
    with running() as server:
        yield server


@pytest.fixture(scope="session")
def client(parrot: Running) -> Iterator[openai.OpenAI]:
    with parrot.client() as client:
        yield client


@pytest.fixture
def serve() -> Iterator[Callable[..., Running]]:
    """Starts servers that end with the test."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(running(**options))
