"""Answers under JSON schemas: whether all are valid, whether a draft changes any token, and the gain of drafts.

    python tests/bench/grammar.py PAIR --out answers.jsonl

20 schemas, each for several subjects, are answered greedily and at temperature 0.7 with a seed: by drafting and
plainly, one right after the other, the first in turn, from empty caches.  Both answers follow the schema.  A third,
plain beginning of an answer without the schema tells what the grammar costs a token.

An answer is valid if it ends, json.loads reads it, a new matcher takes its tokens to an end and, where jsonschema is
installed, jsonschema accepts it.  Stopped, the same command goes on with the next answer.  Exits with 1 if an answer
is not valid or a draft changed a token.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import click

from dovetail.runtime import Constraint, Engine, GenerationResult

SEED = 7
LONG = 64  # tokens from which an answer counts as long
FREE = 32  # tokens without the grammar, for the cost of a plain token
SCHEMAS = Path(__file__).with_name("schemas.jsonl")
SUBJECTS = ("the sea", "a mountain village", "a jazz club", "early computers", "a bakery")


@click.command()
@click.argument("pair", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--schemas", type=click.IntRange(1), help="The first so many.  [default: all]")
@click.option("--subjects", type=click.IntRange(1), help="The first so many for each.  [default: all]")
@click.option("-n", "--max-new-tokens", "count", type=click.IntRange(1), default=400, show_default=True)
@click.option("--compact", is_flag=True, help="JSON without blanks.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.pass_context
def main(
    ctx: click.Context, pair: Path, schemas: int | None, subjects: int | None, count: int, compact: bool, out: Path
) -> None:
    opener: Callable[[Path], Engine] = ctx.obj or Engine.from_pretrained  # obj: of tests
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    rows = [json.loads(line) for line in SCHEMAS.read_text().splitlines()][:schemas]
    if compact:
        rows = [{**row, "schema": {**row["schema"], "x-guidance": {"whitespace_flexible": False}}} for row in rows]
    with opener(pair) as engine, out.open("a") as file:
        asked = [*product(SUBJECTS[:subjects], rows, (0.0, 0.7))][len(done) :]
        for number, (subject, row, temperature) in enumerate(asked, len(done)):
            done.append(answer(engine, row, subject, temperature, count, drafted_first=number % 4 < 2))
            print(json.dumps(done[-1]), file=file, flush=True)
    click.echo(table(done))
    sys.exit(not all(row["valid"] and row["same"] for row in done))


def answer(
    engine: Engine, row: dict[str, Any], subject: str, temperature: float, count: int, *, drafted_first: bool
) -> dict[str, Any]:
    """Return the figures of one answer in all modes. row: of SCHEMAS."""
    name, schema = row["name"], row["schema"]
    constraint = engine.constraint(json_schema=schema)
    prompt = f"Write one JSON object: a {name} about {subject}. Fields: {', '.join(schema['properties'])}."

    def ask(speculate: bool, grammar: Constraint | None = constraint, most: int = count) -> GenerationResult:
        engine.reset()
        return engine.generate(
            prompt, most, speculate=speculate, constraint=grammar, temperature=temperature, seed=SEED
        )

    modes = (True, False) if drafted_first else (False, True)
    results = {speculate: ask(speculate) for speculate in modes}
    drafted, plain = results[True], results[False]
    free = ask(False, None, FREE)
    measured = drafted.metrics
    return {
        "schema": name,
        "subject": subject,
        "temperature": temperature,
        "text": drafted.text,
        "tokens": len(drafted.token_ids),
        "finish": drafted.finish_reason,
        "same": drafted == replace(plain, metrics=measured),
        "valid": valid(drafted, schema, constraint),
        "accepted": measured.accepted,
        "rounds": measured.rounds,
        "drafted_ms": measured.decode_ms,
        "plain_ms": plain.metrics.decode_ms,
        "free_ms_a_token": free.metrics.decode_ms / max(len(free.token_ids) - 1, 1),
    }


def valid(result: GenerationResult, schema: dict[str, Any], constraint: Constraint) -> bool:
    place = constraint.begin()
    if result.finish_reason != "stop" or not all(map(place.advance, result.token_ids)) or not place.complete:
        return False
    try:
        value = json.loads(result.text)
    except ValueError:
        return False
    if importlib.util.find_spec("jsonschema"):
        return bool(importlib.import_module("jsonschema").Draft202012Validator(schema).is_valid(value))
    return True


def table(rows: list[dict[str, Any]]) -> str:
    columns = (
        "temperature", "answers", "valid", "same text", "tokens", "tokens a round", "ms a token: plain, no grammar",
        "plain", "drafted", "speed-up: median", "all tokens",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|--:" * len(columns) + "|"]
    for temperature, least in product((0.0, 0.7), (1, LONG)):
        group = [row for row in rows if row["temperature"] == temperature and row["tokens"] >= least]
        if not group:
            continue

        def total(name: str, group: list[dict[str, Any]] = group) -> float:
            return sum(row[name] for row in group)

        plain, drafted, tokens = total("plain_ms"), total("drafted_ms"), total("tokens")
        later = tokens - len(group)  # the first tokens come from the prefill
        cells = (
            f"{temperature}" + (f", from {least} tokens" if least > 1 else ""),
            f"{len(group)}",
            f"{total('valid')}",
            f"{total('same')}",
            f"{tokens:,}",
            f"{1 + total('accepted') / max(total('rounds'), 1):.2f}",
            f"{total('free_ms_a_token') / len(group):.1f}",
            f"{plain / later:.1f}",
            f"{drafted / later:.1f}",
            f"{median(row['plain_ms'] / row['drafted_ms'] for row in group):.2f}x",
            f"{plain / drafted:.2f}x",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
