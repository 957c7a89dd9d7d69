"""What the server adds to the engine: the same answers from `dovetail-run serve` and from AsyncEngine, in turn.

    python tests/bench/overhead.py PAIR

The server has a process of its own, and the engine works in this one; only one of both answers at a time.  Answers
are greedy and have equal tokens.  Prints the median of the paired ratios of their times, with and without a stream.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from urllib.request import Request, urlopen

import click

from dovetail.runtime.async_engine import AsyncEngine
from dovetail.runtime.errors import DeviceError

TEXT = "Write a story about the number {}."


@click.command()
@click.argument("pair", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--requests", type=click.IntRange(1), default=12, show_default=True)
@click.option("-n", "--max-new-tokens", "count", type=click.IntRange(1), default=128, show_default=True)
@click.option("--drafter-device", default="cpu", show_default=True)
def main(pair: Path, requests: int, count: int, drafter_device: str) -> None:
    flags = ["-m", str(pair), "--drafter-device", drafter_device]
    with serving(flags) as url:
        asyncio.run(compare(url, pair, requests, count, drafter_device))


async def compare(url: str, pair: Path, requests: int, count: int, drafter_device: str) -> None:
    """Ask both in turn, each first every other time."""
    ratios: dict[str, list[float]] = {"one body": [], "a stream": []}
    async with AsyncEngine.from_pretrained(pair, drafter_device=drafter_device) as engine:
        for number in range(-2, requests):  # two to warm up
            message = [{"role": "user", "content": TEXT.format(number)}]
            for name, found in ratios.items():
                took = {}
                for who in ("server", "engine") if number % 2 else ("engine", "server"):
                    begin = perf_counter()
                    if who == "server":
                        await asyncio.to_thread(ask, url, message, count, stream="stream" in name)
                    else:
                        await engine.generate(message, count, temperature=0.0)
                    took[who] = perf_counter() - begin
                if number >= 0:
                    found.append(took["server"] / took["engine"])
    for name, found in ratios.items():
        click.echo(f"{name}: {median(found):.3f} of the engine's time ({min(found):.3f} to {max(found):.3f})")


def ask(url: str, messages: list[dict[str, str]], count: int, *, stream: bool) -> None:
    body = {"messages": messages, "max_tokens": count, "temperature": 0, "stream": stream}
    request = Request(f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request) as answer:
        answer.read()


@contextmanager
def serving(flags: list[str]) -> Iterator[str]:
    """Yield the address of a server. Raises DeviceError if it does not start."""
    command = [sys.executable, "-m", "dovetail.runtime.cli.main", "serve", *flags, "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr
    try:
        said = ""
        for said in server.stderr:  # it may measure the machine first
            if found := re.search(r"http://\S+/v1", said):
                yield found[0]
                return
        raise DeviceError(f"the server did not start ({said.strip()}): run {' '.join(command)} by hand to see why")
    finally:
        server.terminate()
        server.communicate()


if __name__ == "__main__":
    main()
