"""Engines under load: N users at once on the same weights and prompts, interleaved, one process for each, on the CPU.

    python tests/bench/load.py PAIR PROMPTS.jsonl ... --out load.json --python PEERS/bin/python --gguf MODEL-Q8_0.gguf

PEERS is an environment with openvino-genai and xllamacpp; leave --python out for Dovetail alone.  For each number of
users every engine answers the same prompts, in an order that rotates; only one works at a time.  A kept measurement in
--out is not repeated.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
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
OURS, PEERS, LLAMA = ("dovetail", "dovetail, no drafts"), ("openvino-genai",), "llama.cpp"
WARM_UP = 16  # tokens


@click.command()
@click.argument("pair", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("tasks", type=click.Path(path_type=Path, exists=True, dir_okay=False), nargs=-1, required=True)
@click.option("--python", "peers", type=click.Path(), help="Of the peers' environment.")
@click.option("--gguf", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="The same weights, Q8_0.")
@click.option("--users", type=int, multiple=True, default=(1, 2, 4, 8, 16), show_default=True)
@click.option("--requests", type=int, default=64, show_default=True, help="For each number of users.")
@click.option("-n", "--max-new-tokens", type=int, default=64, show_default=True)
@click.option("--repeats", type=int, default=1, show_default=True, help="Measurements of each engine and load.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    pair: Path, tasks: tuple[Path, ...], peers: str | None, gguf: Path | None, users: tuple[int, ...], requests: int,
    max_new_tokens: int, repeats: int, out: Path,
) -> None:  # fmt: skip
    """Measure and print a Markdown table."""
    tokenizer = Tokenizer.from_folder(pair / "target")
    talks = [[talk.turns[0] for talk in read_prompts(task, None)] for task in tasks]
    mixed = [text for row in zip_longest(*talks) for text in row if text]
    texts = islice(cycle(mixed), requests + 2 * max(users))
    asked = [[*tokenizer.encode_chat([{"role": "user", "content": text}])] for text in texts]
    prompts, first = asked[:requests], asked[requests:]  # others first, so that no engine finds a prompt in its cache
    names = [*OURS, *(PEERS if peers else ()), *((LLAMA,) if peers and gguf else ())]
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if out.exists() else []
    known = {(row["engine"], row["users"], row["repeat"]) for row in rows}
    for repeat in range(repeats):
        for count in users:
            for index in range(len(names)):
                name = names[(index + repeat) % len(names)]
                if (name, count, repeat) in known:
                    continue
                python = sys.executable if name in OURS or not peers else peers
                model = gguf if name == LLAMA and gguf else pair
                result = measured(python, name, model, first[: 2 * count], prompts, count, max_new_tokens)
                rows.append({"engine": name, "users": count, "repeat": repeat, **result})
                click.echo(f"{name}, {count} users: {rate(rows[-1]):.1f} tokens/s", err=True)
                save(out, rows)
    click.echo(table(rows, names, users))


def measured(
    python: str, engine: str, model: Path, first: list[list[int]], prompts: list[list[int]], users: int, count: int
) -> dict[str, Any]:
    """Start an engine, warm it up, and return its answers and their seconds. Raises InputError."""
    command = [python, str(WORKER), engine, str(model), str(users)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin and process.stdout
        results = []
        for asked, new in ((None, 0), (first, WARM_UP), (prompts, count)):
            if asked is not None:
                request = {"prompts": asked, "users": users, "max_new_tokens": new}
                print(json.dumps(request), file=process.stdin, flush=True)
            line = process.stdout.readline()
            if not line:
                raise InputError(f"{engine} ended: run {shlex.join(command)} by hand to see why")
            results.append(json.loads(line))
        process.stdin.close()
    return dict(results[-1])


def rate(row: dict[str, Any]) -> float:
    """Tokens per second of all users together."""
    return float(sum(answer["count"] for answer in row["answers"]) / row["seconds"])


def table(rows: list[dict[str, Any]], names: list[str], users: tuple[int, ...]) -> str:
    """Medians over repeats; ratios against Dovetail without drafts."""
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
            pairs = [
                (answer["tokens"], other["tokens"])
                for row, base in zip(own, plain, strict=False)
                for answer, other in zip(row["answers"], base["answers"], strict=True)
            ]
            same = sum(mine == other for mine, other in pairs)
            speed, base_speed = median(map(rate, own)), median(map(rate, plain))
            lines.append(
                f"| {count} | {name} | {speed:.1f} | {speed / base_speed:.2f}x | {spread(first)} | {spread(between)} | "
                f"{f'{same} of {len(pairs)}' if name != LLAMA else '-'} |"
            )
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """The median and the 95th percentile."""
    if len(values) < 2:
        return "-"
    return f"{median(values):.0f} / {quantiles(values, n=20)[-1]:.0f}"


def save(out: Path, rows: list[dict[str, Any]]) -> None:
    facts = {
        "rows": rows, "machine": machine.describe(), "versions": machine.versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "command": shlex.join(sys.argv),
    }  # fmt: skip
    write_atomically(out, (json.dumps(facts) + "\n").encode())


if __name__ == "__main__":
    main()
