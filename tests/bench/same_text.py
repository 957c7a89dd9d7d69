"""Whether speculation changes any token of an answer, and a second run any token of the first.

    python tests/bench/same_text.py PAIR --prompts FOLDER --limit 40 --own 60 --out answers.jsonl
    python tests/bench/same_text.py PAIR --prompts FOLDER --limit 40 --own 60 --out again.jsonl --against answers.jsonl

Every prompt is answered greedily and at temperature 1 with a seed: by drafting, then plainly, and all token ids are
compared.  With --against the plain answers are left out: drafted ones are compared with those of an earlier run.
With --together the plain answers are written so many at a time, in the same passes, which takes a fraction of the time.
Stopped, the same command goes on with the next group of so many answers.
FOLDER holds Spec-Bench's four tasks; --own prompts of each kind are written here.  Exits with 1 if any token differs.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import click

from dovetail.runtime import BatchEngine, Engine
from dovetail.runtime.errors import DovetailError, InputError
from dovetail.runtime.text.encoding import Prompt
from dovetail.runtime.text.prompts import read_prompts

TASKS = ("humaneval", "gsm8k", "mt_bench", "alpaca")
SEED = 7
Key = tuple[str, int, int]  # task, number of the prompt, temperature

_FUNCTIONS = (
    ("def {n}(items: list[int]) -> int:", "Return the {w} of the items, and 0 for an empty list."),
    ("def {n}(text: str) -> str:", "Return the text with the {w} of its words in capitals."),
    ("def {n}(rows: list[list[float]]) -> list[float]:", "Return the {w} of every row."),
    ("def {n}(path: str, limit: int = 10) -> list[str]:", "Read a file and return its lines up to the {w} one."),
    ("class {n}:", "A queue that remembers the {w} of what was put into it."),
    ("async def {n}(urls: list[str]) -> dict[str, int]:", "Fetch all URLs and return the {w} of their sizes."),
)
_WORDS = ("sum", "first", "last", "middle", "largest", "smallest", "mean", "second", "longest", "most frequent")
_SUMS = (
    "{who} has {a} apples and buys {b} more every day. After {c} days {who} gives half away. How many are left?",
    "A train goes {a} km in {c} hours, then {b} km in 2 hours. What is its mean speed?",
    "{who} earns {a} dollars an hour and works {b} hours a week. How much does {who} earn in {c} weeks?",
    "A box holds {b} pens. {who} fills {c} boxes and has {a} pens over. How many pens were there?",
    "{who} reads {b} pages a day of a book of {a}0 pages. How many pages are left after {c} days?",
    "Of {a} pupils {b} play chess and {c} of those also sing. What part of all pupils plays chess but does not sing?",
)
_PEOPLE = ("Ada", "Bruno", "Chloe", "Dmitri", "Elif", "Farid", "Greta", "Hiro", "Ines", "Jamal")
_QUESTIONS = (
    "Explain {t} to a child of ten.",
    "Write a letter to the editor that argues against {t}.",
    "Compare {t} with what people did a hundred years ago, in a table.",
    "What are three common mistakes about {t}, and how does one avoid them?",
    "Write a short story in which {t} saves somebody's life.",
    "You are an examiner: put five questions about {t}, and answer them.",
)
_ORDERS = (
    "Summarize what {t} is in one sentence.",
    "List five words that have to do with {t}.",
    "Translate into French: I would like to learn about {t}.",
    "Write a haiku about {t}.",
    "Give step-by-step instructions for somebody who starts with {t}.",
    "Write a JSON object that describes {t}.",
)
_TOPICS = (
    "baking bread", "the tides", "chess openings", "a heat pump", "bicycle repair",
    "the Roman calendar", "bees", "compound interest", "tall ships", "the metric system",
)  # fmt: skip


def own_prompts() -> dict[str, list[str]]:
    """60 prompts of each task's kind."""
    code = [
        f'{head.format(n="solve_" + word.replace(" ", "_"))}\n    """{text.format(w=word)}"""\n'
        for (head, text), word in product(_FUNCTIONS, _WORDS)
    ]
    sums = [
        text.format(who=who, a=40 + 7 * i, b=3 + i, c=2 + i) for text, (i, who) in product(_SUMS, enumerate(_PEOPLE))
    ]
    return {
        "humaneval": code,
        "gsm8k": sums,
        "mt_bench": [text.format(t=topic) for text, topic in product(_QUESTIONS, _TOPICS)],
        "alpaca": [text.format(t=topic) for text, topic in product(_ORDERS, _TOPICS)],
    }


@click.command()
@click.argument("pair", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--prompts", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--limit", type=click.IntRange(0), default=40, show_default=True, help="Of FOLDER's, of each task.")
@click.option("--own", type=click.IntRange(0, 60), default=60, show_default=True, help="Prompts of each kind.")
@click.option("-n", "--max-new-tokens", "count", type=click.IntRange(1), default=128, show_default=True)
@click.option("--together", type=click.IntRange(1), help="Plain answers at a time.  [default: one by one]")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--against", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="An earlier --out.")
def main(
    pair: Path, prompts: Path, limit: int, own: int, count: int, together: int | None, out: Path, against: Path | None
) -> None:
    own_ones, texts = own_prompts(), dict[str, list[str]]()
    for task in TASKS:
        given = [talk.turns[0] for talk in read_prompts(prompts / f"{task}.jsonl", limit)] if limit else []
        texts[task] = given + own_ones[task][:own]
    most = max(map(len, texts.values()))
    asked = {(task, i): texts[task][i] for i in range(most) for task in TASKS if i < len(texts[task])}
    done, earlier = read(out), read(against) if against else None
    if missing := [key for key in asked if earlier is not None and any((*key, t) not in earlier for t in (0, 1))]:
        raise InputError(f"{against} has no answer to prompt {missing[0][1]} of {missing[0][0]}: finish that run first")
    left = [(*key, t) for key in asked for t in (0, 1) if (*key, t) not in done]
    with ExitStack() as stack:
        file, engine = stack.enter_context(out.open("a")), stack.enter_context(Engine.from_pretrained(pair))
        batch = (
            stack.enter_context(BatchEngine.from_pretrained(pair, slots=together))
            if together and earlier is None
            else None
        )

        def answer(key: Key, speculate: bool) -> list[int]:
            engine.reset()
            return list(engine.generate(asked[key[:2]], count, speculate=speculate, **options(key)).token_ids)

        for begin in range(0, len(left), together or 1):
            keys = left[begin : begin + (together or 1)]
            drafted = [answer(key, True) for key in keys]
            if earlier is not None:
                expected = [earlier[key][0] for key in keys]
            elif batch:
                expected = answers(batch, [(asked[key[:2]], options(key)) for key in keys], count)
            else:
                expected = [answer(key, False) for key in keys]
            for key, found, wanted in zip(keys, drafted, expected, strict=True):
                done[key] = found, found == wanted
                print(json.dumps([*key, *done[key]]), file=file, flush=True)
    kept = {key: value for key, value in done.items() if key[:2] in asked}
    click.echo(table(kept, "earlier" if against else "plain"))
    sys.exit(not all(same for _, same in kept.values()))


def options(key: Key) -> dict[str, Any]:
    """Sampling of the answer."""
    return {"temperature": 1.0, "seed": SEED} if key[2] else {}


def answers(engine: BatchEngine, asks: Sequence[tuple[Prompt, dict[str, Any]]], count: int) -> list[list[int]]:
    """Write plain answers, all at once.  Returns their token ids."""
    jobs = [engine.submit(engine.ask(text, count, speculate=False, **given)) for text, given in asks]
    ids = {job: list[int]() for job in jobs}
    while not engine.idle:
        for job, chunk in engine.step():
            if isinstance(chunk, DovetailError):
                raise chunk
            ids[job] += chunk.token_ids
    return [ids[job] for job in jobs]


def read(file: Path) -> dict[Key, tuple[list[int], bool]]:
    """Token ids of drafted answers, and whether they were equal to what they were compared with."""
    if not file.exists():
        return {}
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {(task, number, temperature): (ids, same) for task, number, temperature, ids, same in rows}


def table(answers: dict[Key, tuple[list[int], bool]], other: str) -> str:
    groups = defaultdict[tuple[str, int], list[tuple[list[int], bool]]](list)
    for (task, _, temperature), answer in answers.items():
        groups[task, temperature].append(answer)
    lines = [f"| task | temperature | answers | equal to {other} | tokens |", "|---|--:|--:|--:|--:|"]
    for (task, temperature), group in groups.items():
        equal, tokens = sum(same for _, same in group), sum(len(ids) for ids, _ in group)
        lines.append(f"| {task} | {temperature} | {len(group)} | {equal} | {tokens:,} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
