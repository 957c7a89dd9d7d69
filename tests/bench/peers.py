"""Dovetail against other engines on the same weights and prompts: interleaved, one process for each, on the CPU.

    python tests/bench/peers.py PAIR PROMPTS.jsonl --python PEERS/bin/python --gguf MODEL-Q8_0.gguf --out results.json

PEERS is an environment with openvino-genai and xllamacpp; leave --gguf out to leave llama.cpp out.  Every prompt is
answered by all engines in turn, in an order that rotates, greedily; only one works at a time.  What is compared is the
speed after the first token, and the time to it.  `--chart FILE.svg` draws the table.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from math import nan
from pathlib import Path
from statistics import median
from typing import Any

import click

from dovetail.runtime.errors import InputError
from dovetail.runtime.pair.files import write_atomically
from dovetail.runtime.system import machine
from dovetail.runtime.text.prompts import read_prompts
from dovetail.runtime.text.tokenizer import Tokenizer

WORKER = Path(__file__).with_name("peer_worker.py")
OURS = ("dovetail, plain", "dovetail", "dovetail, plain, not exact", "dovetail, not exact")
GENAI = (
    "openvino-genai, plain", "openvino-genai, prompt lookup 5", "openvino-genai, prompt lookup 10",
    "openvino-genai, plain, same properties", "openvino-genai, prompt lookup 3, same properties",
    "openvino-genai, prompt lookup 5, same properties", "openvino-genai, prompt lookup 10, same properties",
)  # fmt: skip
DRAFT_MODEL = (
    "dovetail, draft model", "openvino-genai, draft model 3, same properties",
    "openvino-genai, draft model 5, same properties",
)  # fmt: skip
LLAMA = (
    "llama.cpp, plain", "llama.cpp, ngram-simple", "llama.cpp, ngram-simple 3/10", "llama.cpp, ngram-mod",
    "llama.cpp, ngram-map-k",
)  # fmt: skip
LLAMA_DRAFT = "llama.cpp, draft model"
WARM_UP_TOKENS = 16


@dataclass
class Worker:
    """A running engine."""

    process: subprocess.Popen[str]

    @classmethod
    def start(cls, python: str, engine: str, model: Path, draft: Path | None = None, context: int = 4096) -> Worker:
        """context: tokens that an engine which asks for their number has room for."""
        command = [python, str(WORKER), engine, str(model), *([str(draft)] if draft else [])]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PEER_CONTEXT": str(context)},
        )
        worker = cls(process)
        if worker._line() != {}:
            worker.stop()
            raise InputError(f"{engine} does not start: run {python} {WORKER} {engine!r} {model} to see why")
        return worker

    def ask(self, ids: list[int], count: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps({"ids": ids, "max_new_tokens": count}), file=self.process.stdin, flush=True)
        answer = self._line()
        if answer is None:
            raise InputError(f"{shlex.join(self.process.args)} ended: run it by hand to see why")  # type: ignore[arg-type]  # a list
        return answer

    def _line(self) -> dict[str, Any] | None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return dict(json.loads(line)) if line else None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *failure: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


@click.command()
@click.argument("pair", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("prompts", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--python", "peers", type=click.Path(), required=True, help="Of the peers' environment.")
@click.option("--gguf", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="The same weights, Q8_0.")
@click.option(
    "--engine",
    "engines",
    multiple=True,
    type=click.Choice((*OURS, *GENAI, *DRAFT_MODEL, *LLAMA, LLAMA_DRAFT)),
    help="Only these.",
)
@click.option(
    "--draft-model", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Pair of a small model."
)
@click.option(
    "--draft-gguf", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="The small model, Q8_0."
)
@click.option("--limit", type=int, help="Only the first prompts.")
@click.option("-n", "--max-new-tokens", type=int, default=128, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--chart", type=click.Path(path_type=Path), help="SVG or PNG; needs matplotlib.")
def main(
    pair: Path, prompts: Path, peers: str, gguf: Path | None, engines: tuple[str, ...], draft_model: Path | None,
    draft_gguf: Path | None, limit: int | None, max_new_tokens: int, out: Path, chart: Path | None,
) -> None:  # fmt: skip
    """Measure and print a Markdown table."""
    conversations = read_prompts(prompts, limit)
    tokenizer = Tokenizer.from_folder(pair / "target")
    asked = [list(tokenizer.encode_chat([{"role": "user", "content": talk.turns[0]}])) for talk in conversations]
    context = max(4096, max(map(len, asked)) + max_new_tokens)
    if not gguf and set(engines) & {*LLAMA, LLAMA_DRAFT}:
        raise click.UsageError("llama.cpp needs the same weights as a GGUF: give --gguf")
    if not draft_model and set(engines) & set(DRAFT_MODEL):
        raise click.UsageError("a draft model is needed: give --draft-model")
    if not draft_gguf and LLAMA_DRAFT in engines:
        raise click.UsageError("llama.cpp's draft model is needed: give --draft-gguf")
    every = (*OURS, *GENAI, *(DRAFT_MODEL if draft_model else ()), *(LLAMA if gguf else ()))
    every += (LLAMA_DRAFT,) if gguf and draft_gguf else ()
    names = [name for name in every if name in (engines or every)]
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name in names:
            python = sys.executable if name.startswith("dovetail") else peers
            model = gguf if name in (*LLAMA, LLAMA_DRAFT) else pair
            assert model is not None
            draft = draft_model if name in DRAFT_MODEL else draft_gguf if name == LLAMA_DRAFT else None
            workers[name] = stack.enter_context(Worker.start(python, name, model, draft, context))
            workers[name].ask(asked[0][::-1], WARM_UP_TOKENS)  # backwards: some keep the KV of what they have read
        rows = []
        for index, ids in enumerate(asked):
            order = names[index % len(names) :] + names[: index % len(names)]
            answers = {name: workers[name].ask(ids, max_new_tokens) for name in order}
            for answer in answers.values():
                answer.setdefault("text", tokenizer.decode(answer.pop("tokens", [])))
            rows.append(answers)
            click.echo(f"{index + 1}/{len(asked)}  {line(rows, names)}", err=True)
            save(out, summary(rows, names), rows)
    click.echo(table(summary(rows, names)))
    if chart:
        draw(summary(rows, names), chart)


def speed(answer: dict[str, Any]) -> float:
    """Tokens per second after the first; 0 where there was none."""
    return 1e3 * (answer["count"] - 1) / answer["later_ms"] if answer["count"] > 1 else 0.0


def summary(rows: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """Per engine: medians over prompts, ratios to Dovetail's plain decoding paired by prompt."""
    base = OURS[0] if OURS[0] in names else names[0]
    out = []
    for name in names:
        pairs = [(row[name], row[base]) for row in rows if speed(row[name]) and speed(row[base])]
        ratios = [speed(ours) / speed(plain) for ours, plain in pairs] or [nan]
        out.append(
            {
                "engine": name,
                "tokens_per_second": median([speed(ours) for ours, _ in pairs] or [nan]),
                "to_plain": median(ratios),
                "least": min(ratios),
                "first_ms": median(row[name]["first_ms"] for row in rows),
                "rss_mb": rows[-1][name]["rss_mb"],
                "same_text": sum(row[name]["text"].strip() == row[base]["text"].strip() for row in rows),
                "prompts": len(rows),
            }
        )
    return out


def line(rows: list[dict[str, Any]], names: list[str]) -> str:
    return "  ".join(f"{row['engine']} {row['to_plain']:.2f}x" for row in summary(rows, names))


def table(scores: list[dict[str, Any]]) -> str:
    lines = [
        "| engine | tokens/s | against plain | least | first token, ms | peak RSS, MiB | same text |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in scores:
        lines.append(
            f"| {row['engine']} | {row['tokens_per_second']:.1f} | {row['to_plain']:.2f}x | {row['least']:.2f}x | "
            f"{row['first_ms']:.0f} | {row['rss_mb']} | {row['same_text']} of {row['prompts']} |"
        )
    return "\n".join(lines)


def save(out: Path, scores: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    facts = {
        "scores": scores,
        "rows": rows,
        "machine": machine.describe(),
        "versions": machine.versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
    }
    write_atomically(out, (json.dumps(facts, indent=1) + "\n").encode())


def draw(scores: list[dict[str, Any]], chart: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.4 * len(scores) + 0.8), layout="constrained")
    names = [row["engine"] for row in reversed(scores)]
    bars = axes.barh(names, [row["to_plain"] for row in reversed(scores)], color="#4878d0")
    axes.bar_label(bars, fmt="%.2fx", padding=3)
    axes.set_xlabel("tokens per second against Dovetail's plain decoding, median over prompts")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(chart)


if __name__ == "__main__":
    main()
