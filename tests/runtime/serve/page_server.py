"""Serves the page, and answers as `dovetail-run serve` does, from a script: for the tests of the page in a browser."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dovetail.runtime.serve.page import HEADERS, page_files

ANSWER = (
    "Here is a function that **merges** two sorted lists:\n\n```python\ndef merge(left, right):\n    merged = []\n"
    "    while left and right:\n        source = left if left[0] <= right[0] else right\n"
    "        merged.append(source.pop(0))\n    return merged + left + right\n```\n\n"
    "It has three steps:\n\n1. Compare the first items.\n2. Take the *smaller* one.\n3. Append what is left.\n\n"
    "The lists are emptied, so pass copies: `merge(a[:], b[:])`. <img src=x onerror=alert(1)> stays text.\n"
)


def pieces(text: str) -> list[str]:
    """Tokens of a text: words with the space before them."""
    found, word = list[str](), ""
    for character in text:
        if (character in " \n" and word.strip()) or character == "\n":
            found.append(word)
            word = ""
        word += character
    return [each for each in [*found, word] if each]


class PageServer(ThreadingHTTPServer):
    """delay: seconds of a round. requests: the bodies that came."""

    daemon_threads = True

    def __init__(self, delay: float = 0.0, key: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.delay, self.key, self.requests, self.fail = delay, key, list[dict[str, Any]](), False
        self.gone = threading.Event()  # a client left in the middle of an answer
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.gone.set()


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if file := page_files().get(self.path):
            return self._send(200, file.content, {**HEADERS, "content-type": file.media_type})
        if self.path != "/v1/models":
            return self._fail(404, "there is no such page")
        if self._allowed():
            self._json(200, {"data": [{"id": "smollm2-135m"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self._allowed():
            return
        self.server.requests.append(body)
        if self.server.fail:
            return self._fail(429, "8 requests wait already: ask again in a moment")
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        for event in answer(body, self.server.delay):
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _allowed(self) -> bool:
        if self.server.key in (None, self.headers.get("authorization", "").removeprefix("Bearer ")):
            return True
        self._fail(401, "the API key is missing or wrong: send Authorization: Bearer KEY")
        return False

    def _fail(self, status: int, message: str) -> None:
        self._json(status, {"error": {"message": message}})

    def _json(self, status: int, content: Any) -> None:
        self._send(status, json.dumps(content).encode(), {"content-type": "application/json"})

    def _send(self, status: int, content: bytes, headers: Any) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *what: object) -> None:
        pass


def answer(body: dict[str, Any], delay: float) -> Iterator[dict[str, Any]]:
    """Yield the events of an answer: with drafts a round has up to four tokens, without them one."""
    tokens, at, number = pieces(ANSWER), 0, 0
    yield _event({"role": "assistant", "content": ""})
    while at < len(tokens):
        accepted = min([3, 0, 2, 4, 1][number % 5], len(tokens) - at - 1) if body["speculate"] and at else 0
        new = tokens[at : at + accepted + 1]
        time.sleep(delay * (1.25 if body["speculate"] else 1))
        own: dict[str, Any] = {"tokens": len(new)}
        if at:
            own |= {"tree": _tree(tokens[at - 1], new, number) if body["speculate"] else _plain(tokens[at - 1], new)}
            own |= {"draft_ms": 3.1 if body["speculate"] else 0.1, "verify_ms": 21.4}
        yield _event({"content": "".join(new)}, own)
        at += len(new)
        number += 1
    speed = 98.5 if body["speculate"] else 44.25
    metrics = {"tokens_per_second": speed, "decode_ms": (len(tokens) - 1) / speed * 1e3}
    yield {**_event({}, {"tokens": 0, "metrics": metrics}), "choices": [{"delta": {}, "finish_reason": "stop"}]}
    yield {"choices": [], "usage": {"completion_tokens": len(tokens)}}


def _event(delta: dict[str, Any], own: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": delta, "finish_reason": None}], **({"dovetail": own} if own else {})}


def _plain(root: str, new: list[str]) -> dict[str, Any]:
    return {"tokens": [root], "parents": [-1], "accepted": [], "next": new[-1]}


def _tree(root: str, new: list[str], number: int) -> dict[str, Any]:
    """A tree that holds the accepted tokens, and others beside and behind them."""
    tokens, parents, accepted, tip = [root], [-1], list[int](), 0
    for depth, token in enumerate(new[:-1]):
        tokens += [token, [" the", " a", " list", " two"][(depth + number) % 4]]
        parents += [tip, tip]
        tip = len(tokens) - 2
        accepted.append(tip)
    for token in (" of", " in")[: 1 + number % 2]:
        tokens += [token, "\n    item"]
        parents += [tip, len(tokens) - 2]
    return {"tokens": tokens, "parents": parents, "accepted": accepted, "next": new[-1]}
