"""An EAGLE-3 checkpoint that `dovetail-export train` wrote, in openvino-genai's pipeline and in Dovetail.

    python -m tests.bench.eagle3_peers PAIR CHECKPOINT --python PEERS/bin/python --work FOLDER --out results.json

PAIR is a target with CHECKPOINT as its drafter.  FOLDER gets the target with an OpenVINO tokenizer, and the checkpoint
as `optimum-cli export openvino` converts it.  PEERS is an environment with openvino-genai.  Both engines draft chains
of a fixed length for the same prompts, greedily, in turn; only one works at a time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import click
from tests.bench.peers import WARM_UP_TOKENS, Worker, save, speed

from dovetail.runtime.errors import InputError
from dovetail.runtime.text.prompts import read_prompts
from dovetail.runtime.text.tokenizer import Tokenizer

PROMPTS = Path(__file__).with_name("own_prompts.jsonl")
ENGINES = (
    "dovetail, EAGLE-3 plain", "dovetail, EAGLE-3 chain 3", "openvino-genai, EAGLE-3 chain 3",
    "dovetail, EAGLE-3 chain 5", "openvino-genai, EAGLE-3 chain 5",
)  # fmt: skip


@click.command()
@click.argument("pair", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--prompts", type=click.Path(path_type=Path, exists=True, dir_okay=False), default=PROMPTS)
@click.option("--python", "peers", type=click.Path(), required=True, help="Of the peers' environment.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="For what openvino-genai loads.")
@click.option("--engine", "engines", multiple=True, type=click.Choice(ENGINES), help="Only these.")
@click.option("-n", "--max-new-tokens", type=int, default=128, show_default=True)
@click.option("--group-size", type=int, help="DYNAMIC_QUANTIZATION_GROUP_SIZE of all engines; 0 for float activations.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    pair: Path, checkpoint: Path, prompts: Path, peers: str, work: Path, engines: tuple[str, ...], max_new_tokens: int,
    group_size: int | None, out: Path,
) -> None:  # fmt: skip
    """Measure and print a Markdown table."""
    if group_size is not None:
        os.environ["PEER_GROUP_SIZE"] = str(group_size)  # for the workers
    target, drafter = prepare(pair, checkpoint, work)
    tokenizer = Tokenizer.from_folder(pair / "target")
    asked = [
        list(tokenizer.encode_chat([{"role": "user", "content": each.turns[0]}])) for each in read_prompts(prompts)
    ]
    names = [name for name in ENGINES if name in (engines or ENGINES)]
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name in names:
            ours = name.startswith("dovetail")
            python, model = (sys.executable, pair) if ours else (peers, target)
            workers[name] = stack.enter_context(Worker.start(python, name, model, drafter))
            workers[name].ask(asked[0][::-1], WARM_UP_TOKENS)
        rows = []
        for index, ids in enumerate(asked):
            order = names[index % len(names) :] + names[: index % len(names)]
            rows.append({name: workers[name].ask(ids, max_new_tokens) for name in order})
            click.echo(f"{index + 1}/{len(asked)}", err=True)
            save(out, summary(rows, names), rows)
    click.echo(table(summary(rows, names)))


def prepare(pair: Path, checkpoint: Path, work: Path) -> tuple[Path, Path]:
    """The folders of target and drafter that openvino-genai loads, made once."""
    target, drafter = work / "pair", work / "drafter"
    if not target.exists():
        shutil.copytree(pair / "target", target / "target")
        folder = str(target / "target")
        command("convert_tokenizer", folder, "-o", folder, "--with-detokenizer")
    if not drafter.exists():
        # transformers imports what the file of optimum's model classes names; EAGLE-3's class uses neither package.
        stubs = work / "stubs"
        stubs.mkdir(exist_ok=True)
        for package in ("diffusers", "einops"):
            (stubs / f"{package}.py").touch()
        model = ["-m", str(checkpoint), "--trust-remote-code", "--task", "text-generation-with-past"]
        command(
            "optimum-cli", "export", "openvino", *model, "--weight-format", "int8", str(work / "exported"), path=stubs
        )
        for file in (target / "target").glob("openvino_*tokenizer.*"):  # genai opens a drafter with its tokenizer
            shutil.copy(file, work / "exported")
        (work / "exported").rename(drafter)
    return target, drafter


def command(name: str, *arguments: str, path: Path | None = None) -> None:
    """Run a command of this environment, with modules from `path` too. Raises InputError."""
    found = Path(sys.executable).with_name(name)
    modules = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(path) if path else None]))
    if subprocess.run([str(found), *arguments], check=False, env={**os.environ, "PYTHONPATH": modules}).returncode:
        raise InputError(f"{found} {' '.join(arguments)} failed: see above")


def acceptance_length(rows: list[dict[str, Any]], name: str) -> float:
    """Tokens per pass of the target after the first token, over all prompts."""
    return sum(row[name]["count"] - 1 for row in rows) / max(1, sum(row[name]["rounds"] for row in rows))


def summary(rows: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    base = names[0]
    return [
        {
            "engine": name,
            "acceptance_length": acceptance_length(rows, name),
            "tokens_per_second": median(speed(row[name]) for row in rows),
            "same_text": sum(row[name]["tokens"] == row[base]["tokens"] for row in rows),
            "prompts": len(rows),
        }
        for name in names
    ]


def table(scores: list[dict[str, Any]]) -> str:
    lines = ["| engine | acceptance length | tokens/s | same text |", "|---|---:|---:|---:|"]
    for row in scores:
        lines.append(
            f"| {row['engine']} | {row['acceptance_length']:.3f} | {row['tokens_per_second']:.1f} | "
            f"{row['same_text']} of {row['prompts']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
