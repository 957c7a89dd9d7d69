"""Engines under load: N users at once on the same weights and prompts, interleaved, one process for each, on the CPU.

    python tests/bench/load.py PAIR PROMPTS.jsonl ... --out load.json --python PEERS/bin/python --gguf MODEL-Q8_0.gguf

PEERS is an environment with openvino-genai and xllamacpp; leave --python out for Dovetail alone.  For each number of
users every engine answers the same prompts, a part of them at a time, in an order that rotates; only one works at a
time.  A number of users that --out has is not measured again.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import cycle, islice, zip_longest
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click

from dovetail.runtime.errors import InputError
from dovetail.runtime.pair.files import write_atomically
from dovetail.runtime.system import machine
from dovetail.runtime.text.prompts import read_prompts
from dovetail.runtime.text.tokenizer import Tokenizer

WORKER = Path(__file__).with_name("load_worker.py")
Row = dict[str, Any]  # the answers of an engine to a part of the prompts
OURS, PEERS, LLAMA = ("dovetail", "dovetail, no drafts"), ("openvino-genai",), "llama.cpp"
WARM_UP = 16  # tokens


@click.command()
@click.argument("pair", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("tasks", type=click.Path(path_type=Path, exists=True, dir_okay=False), nargs=-1, required=True)
@click.option("--python", "peers", type=click.Path(), help="Of the peers' environment.")
@click.option("--gguf", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="The same weights, Q8_0.")
@click.option("--users", type=int, multiple=True, default=(1, 2, 4, 8, 16), show_default=True)
@click.option("--requests", type=int, default=64, show_default=True, help="For each number of users.")
@click.option("-n", "--max-new-tokens", type=int, default=64, show_default=True, help="Mean; 0.5 to 1.5 times as many.")
@click.option("--parts", type=int, default=4, show_default=True, help="Of the requests; engines take turns after each.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    pair: Path, tasks: tuple[Path, ...], peers: str | None, gguf: Path | None, users: tuple[int, ...], requests: int,
    max_new_tokens: int, parts: int, out: Path,
) -> None:  # fmt: skip
    """Measure and print a Markdown table."""
    tokenizer = Tokenizer.from_folder(pair / "target")
    talks = [[talk.turns[0] for talk in read_prompts(task, None)] for task in tasks]
    mixed = [text for row in zip_longest(*talks) for text in row if text]
    texts = islice(cycle(mixed), requests + 2 * max(users))
    asked = [[*tokenizer.encode_chat([{"role": "user", "content": text}])] for text in texts]
    prompts, first = asked[:requests], asked[requests:]  # others first, so that no engine finds a prompt in its cache
    # Answers of equal length would let all users ask at the same moments.
    counts = [max_new_tokens // 2 + 17 * index % (max_new_tokens + 1) for index in range(requests)]
    names = [*OURS, *(PEERS if peers else ()), *((LLAMA,) if peers and gguf else ())]
    rows: list[Row] = json.loads(out.read_text())["rows"] if out.exists() else []
    for count in users:
        if any(row["users"] == count for row in rows):
            continue
        with ExitStack() as stack:
            engines = {}
            for name in names:
                python = sys.executable if name in OURS or not peers else peers
                model = gguf if name == LLAMA and gguf else pair
                engines[name] = stack.enter_context(Engine(python, name, model, count))
            for engine in engines.values():
                engine.ask(first[: 2 * count], [WARM_UP] * 2 * count)
            size = -(-requests // parts)
            for index in range(parts):
                for turn in range(len(names)):
                    name = names[(turn + index) % len(names)]
                    part = slice(index * size, (index + 1) * size)
                    result = engines[name].ask(prompts[part], counts[part])
                    rows.append({"engine": name, "users": count, "part": index, **result})
                    click.echo(f"{name}, {count} users: {rate(rows[-1]):.1f} tokens/s", err=True)
        save(out, rows)
    click.echo(table(rows, names, users))


class Engine:
    """An engine in a process of its own, for a `with` block. Raises InputError if it ends early."""

    def __init__(self, python: str, name: str, model: Path, users: int) -> None:
        self.name, self.users = name, users
        self._command = [python, str(WORKER), name, str(model), str(users)]
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def __enter__(self) -> Engine:
        self._line()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def ask(self, prompts: list[list[int]], counts: list[int]) -> dict[str, Any]:
        """Return the answers of up to `counts` tokens, and their seconds."""
        assert self._process.stdin
        request = {"prompts": prompts, "users": self.users, "max_new_tokens": counts}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._line()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._process.communicate()
            raise InputError(f"{self.name} ended: run {shlex.join(self._command)} by hand to see why")
        return dict(json.loads(line))


def rate(row: Row) -> float:
    """Tokens per second of all users together."""
    return float(sum(answer["count"] for answer in row["answers"]) / row["seconds"])


def table(rows: list[Row], names: list[str], users: tuple[int, ...]) -> str:
    """Medians over parts; ratios are paired with Dovetail's answers without drafts to the same prompts."""
    lines = [
        "| users | engine | tokens/s | to no drafts | first token p50 / p95, ms | between p50 / p95, ms | same text |",
        "|--:|---|--:|--:|--:|--:|--:|",
    ]
    for count in users:
        plain = [row for row in rows if row["users"] == count and row["engine"] == OURS[1]]
        for name in names:
            own = [row for row in rows if row["users"] == count and row["engine"] == name]
            if not own or not plain:
                continue
            answers = [answer for row in own for answer in row["answers"]]
            first = [answer["first_ms"] for answer in answers]
            between = [each for answer in answers for each in answer["between_ms"]]
            both = [*zip(own, plain, strict=True)]
            pairs = [
                (answer["tokens"], other["tokens"])
                for row, base in both
                for answer, other in zip(row["answers"], base["answers"], strict=True)
            ]
            same = sum(mine == other for mine, other in pairs)
            ratio = median(rate(row) / rate(base) for row, base in both)
            lines.append(
                f"| {count} | {name} | {median(map(rate, own)):.1f} | {ratio:.2f}x | {spread(first)} | "
                f"{spread(between)} | {f'{same} of {len(pairs)}' if name != LLAMA else '-'} |"
            )
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """The median and the 95th percentile."""
    if len(values) < 2:
        return "-"
    return f"{median(values):.0f} / {quantiles(values, n=20)[-1]:.0f}"


def save(out: Path, rows: list[Row]) -> None:
    facts = {
        "rows": rows, "machine": machine.describe(), "versions": machine.versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "command": shlex.join(sys.argv),
    }  # fmt: skip
    write_atomically(out, (json.dumps(facts) + "\n").encode())


if __name__ == "__main__":
    main()
