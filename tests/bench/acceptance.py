"""Acceptance lengths of a pair on a folder of tasks: every *.jsonl at each temperature, through one opened engine.

    python tests/bench/acceptance.py PAIR FOLDER --out results.json --temperature 0 --temperature 1

results.json is written after every prompt; the same command goes on where it was stopped. A Markdown table of tasks
goes to stdout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from typing import Any

import click

from dovetail.runtime.bench.compare import Totals, converse, warm_up
from dovetail.runtime.cli.main import fail
from dovetail.runtime.cli.options import DEVICES, EngineFlags
from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import DovetailError, InputError, PairError
from dovetail.runtime.pair.files import sha256_file, write_atomically
from dovetail.runtime.pair.known import resolve_pair
from dovetail.runtime.pair.layout import MANIFEST_NAME
from dovetail.runtime.settings import AnswerSettings
from dovetail.runtime.system import machine
from dovetail.runtime.system.telemetry import decline_telemetry
from dovetail.runtime.text.prompts import PromptTurns, read_prompts


@dataclass(frozen=True)
class Score:
    """One line of the table; figures as in `dovetail-run bench --json`."""

    task: str
    temperature: float
    acceptance_length: float
    acceptance_per_depth: tuple[float, ...]
    tokens_per_second: float
    prompts: int


@dataclass
class Results:
    """What `path` holds. identity: what the figures depend on; rows: "task@temperature" -> a row per prompt."""

    path: Path
    identity: dict[str, Any]
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, identity: dict[str, Any]) -> Results:
        """Go on with `path` if it is there. Raises InputError: no results, or those of other settings."""
        if not path.parent.is_dir():
            raise InputError(f"--out {path}: there is no folder {path.parent}, make it first")
        identity = json.loads(json.dumps(identity))  # as it is read back
        if not path.exists():
            return cls(path, identity)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            found, rows = dict(data["identity"]), {key: list(rows) for key, rows in data["rows"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"--out {path} holds no results of this benchmark: name another file") from None
        for key in identity:
            if found.get(key) != identity[key]:
                raise InputError(f"--out {path} was measured with {key} {found.get(key)}: name another file")
        return cls(path, identity, rows)

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Append a row and save. Raises OSError."""
        self.rows.setdefault(key, []).append(row)
        self.save([])

    def save(self, scores: Sequence[Score]) -> None:
        """scores: of the finished benchmark, else none."""
        data = {"identity": self.identity, "scores": [asdict(score) for score in scores], "rows": self.rows}
        write_atomically(self.path, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())


@click.command()
@click.argument("pair")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Results; an unfinished file goes on.")
@click.option("--limit", type=int, help="Only the first prompts of each task.")
@click.option("-n", "--max-new-tokens", type=int, default=256, show_default=True, help="Tokens per answer at most.")
@click.option("--temperature", "temperatures", type=float, multiple=True, default=(0.0,), show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the first prompt; each has its own.")
@click.option("--width", type=int, default=16, show_default=True)
@click.option("--depth", type=int, default=6, show_default=True)
@click.option("--tree-top-k", type=int, default=4, show_default=True)
@click.option(
    "--lookup", type=int, default=12, show_default=True, help="Tokens of repeated text in the tree; 0 is off."
)
@click.option("--drafter-device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option("-t", "--threads", type=int)
def acceptance(
    pair: str, folder: Path, out: Path, limit: int | None, max_new_tokens: int, temperatures: tuple[float, ...],
    seed: int, width: int, depth: int, tree_top_k: int, lookup: int, drafter_device: str, threads: int | None,
) -> None:  # fmt: skip
    """Measure PAIR on every *.jsonl of FOLDER; both turns of a two-turn conversation are answered."""
    tasks = {file.stem: read_prompts(file, limit) for file in sorted(folder.glob("*.jsonl"))}
    if not tasks:
        raise InputError(f"{folder} holds no *.jsonl: name a folder of tasks")
    requests = [
        AnswerSettings(max_new_tokens, temperature, 0, 1.0, 0.0, 1.0, seed, ())
        for temperature in dict.fromkeys(temperatures)
    ]
    flags = EngineFlags(pair, drafter_device, threads, width, depth, tree_top_k, lookup)
    with flags.open() as engine:
        results = Results.open(out, circumstances(engine, flags, max_new_tokens, seed))
        scores = list(measure(engine, tasks, requests, results))
    scores += [mean(scores, request.temperature) for request in requests]
    results.save(scores)
    click.echo(table(scores))


def circumstances(engine: Engine, flags: EngineFlags, max_new_tokens: int, seed: int) -> dict[str, Any]:
    """What must be the same for two rows to belong to one table. Raises PairError without a drafter."""
    if engine.drafter_device is None:
        raise PairError(f"{flags.pair} has no drafter, so there is nothing to measure: add one first")
    return {
        "pair": str(flags.pair),
        "pair_sha256": sha256_file(resolve_pair(flags.pair) / MANIFEST_NAME),
        "tree": asdict(engine.tree),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "target_device": engine.target_device,
        "drafter_device": engine.drafter_device,
        "threads": flags.threads,
        "machine": machine.describe(),
        "versions": machine.versions(),
    }


def measure(
    engine: Engine, tasks: dict[str, list[PromptTurns]], requests: Sequence[AnswerSettings], results: Results
) -> Iterator[Score]:
    """Answer what has no row yet, telling each on stderr; yields each task's score when it is complete."""
    warm = False
    for request in requests:
        for task, conversations in tasks.items():
            key = f"{task}@{request.temperature:g}"
            done = results.rows.get(key, [])
            check_same(results.path, key, done, conversations)
            for index in range(len(done), len(conversations)):
                if not warm:
                    warm_up(engine, conversations[index], request, speculate=True)
                    warm = True
                own = replace(request, seed=(request.seed or 0) + index)
                totals = converse(engine, conversations[index].turns, own, speculate=True).totals
                results.add(key, {"prompt": fingerprint(conversations[index]), "totals": asdict(totals)})
                said = f"acceptance {totals.acceptance_length:.2f}, {totals.tokens_per_second:.1f} tok/s"
                click.echo(f"{key} {index + 1}/{len(conversations)}: {said}", err=True)
            yield score(task, request.temperature, results.rows[key][: len(conversations)])


def check_same(path: Path, key: str, rows: list[dict[str, Any]], conversations: Sequence[PromptTurns]) -> None:
    """Rows are in the order of the task's file. Raises InputError when the file is another one by now."""
    for number, (row, conversation) in enumerate(zip(rows, conversations, strict=False), 1):
        if row.get("prompt") != fingerprint(conversation):
            raise InputError(f"{path}: prompt {number} of {key} is another one by now: name another --out file")


def fingerprint(conversation: PromptTurns) -> str:
    return f"{conversation.name}:{sha256(json.dumps(conversation.turns).encode()).hexdigest()[:12]}"


def score(task: str, temperature: float, rows: list[dict[str, Any]]) -> Score:
    """Of all rounds of a task together. Raises InputError for rows of another version."""
    total = Totals()
    try:
        for row in rows:
            sums: dict[str, Any] = row["totals"]
            total += Totals(**{**sums, "accepted_per_position": tuple(sums["accepted_per_position"])})
    except (KeyError, TypeError) as err:
        raise InputError(f"a row of {task} cannot be read ({err}): name another --out file") from None
    per_depth = tuple(round(rate, 4) for rate in total.acceptance_per_depth)
    length, speed = round(total.acceptance_length, 4), round(total.tokens_per_second, 4)
    return Score(task, temperature, length, per_depth, speed, len(rows))


def mean(scores: Sequence[Score], temperature: float) -> Score:
    """The plain mean of the tasks at one temperature; prompts are added up."""
    chosen = [score for score in scores if score.temperature == temperature]
    count = len(chosen)
    per_depth = zip_longest(*(score.acceptance_per_depth for score in chosen), fillvalue=0.0)
    return Score(
        "mean of tasks",
        temperature,
        round(sum(score.acceptance_length for score in chosen) / count, 4),
        tuple(round(sum(rates) / count, 4) for rates in per_depth),
        round(sum(score.tokens_per_second for score in chosen) / count, 4),
        sum(score.prompts for score in chosen),
    )


def table(scores: Sequence[Score]) -> str:
    """Markdown."""
    lines = ["| task | T | acceptance length | acceptance per depth | tokens/s | prompts |",
             "|---|--:|--:|---|--:|--:|"]  # fmt: skip
    for row in scores:
        rates = " ".join(f"{rate:.2f}" for rate in row.acceptance_per_depth)
        lines.append(
            f"| {row.task} | {row.temperature:g} | {row.acceptance_length:.2f} | {rates} "
            f"| {row.tokens_per_second:.1f} | {row.prompts} |"
        )
    return "\n".join(lines)


def main() -> None:
    decline_telemetry()
    try:
        acceptance()
    except DovetailError as err:
        sys.exit(fail(str(err), err.exit_code))


if __name__ == "__main__":
    main()
