"""The README's table and the checks behind it: four tasks at temperatures 0 and 1, and long prompts, as Markdown.

    python tests/bench/table.py PAIR [PAIR ...] --prompts FOLDER --out FOLDER > table.md

Every row is one `dovetail-run bench` in a process of its own, after one `dovetail-run tune` per pair.  What lies in OUT
is not measured again: a stopped run goes on, and a row whose file was deleted is taken anew.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from math import nan
from pathlib import Path
from typing import Any

import click

from dovetail.runtime.cli.main import fail
from dovetail.runtime.doctor.memory import estimate_memory, target_kv_bytes
from dovetail.runtime.errors import DovetailError, InputError
from dovetail.runtime.pair.files import write_atomically
from dovetail.runtime.pair.known import resolve_pair
from dovetail.runtime.pair.layout import MANIFEST_NAME
from dovetail.runtime.pair.manifest import read_manifest
from dovetail.runtime.system import machine
from dovetail.runtime.text.prompts import PromptTurns, read_prompts
from dovetail.runtime.text.tokenizer import Tokenizer

TASKS = {"humaneval": "HumanEval", "gsm8k": "GSM8K", "mt_bench": "MT-bench", "alpaca": "Alpaca"}
CONTEXTS = (128, 1024, 4096)  # tokens of prompts that are the repository's own text, asked at temperature 0
CONTEXT_PROMPTS = 3  # of each
OWN_TEXT = Path(__file__).with_name("long_prompts.txt")  # a licence and Python, as they were in the first measurement
SLOW = 0.97  # of plain decoding's speed: what is slower is listed and measured again
TIES = "At temperature 0, tokens in whose place the target prefers another where it reads its answer again:"
COLUMNS = (
    "target", "prompts", "speed-up (median)", "least, most", "acceptance length", "plain, tok/s", "Dovetail, tok/s",
    "prefill, ms", "near ties, of tokens", "draft / verify / other, ms a round", "nodes a round",
    "share of the achievable: all tokens, median", "peak RSS, MiB", "over weights + KV + drafter, MiB",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A finished benchmark. report: what `dovetail-run bench` wrote into `file`; talks: its prompts."""

    pair: str
    task: str  # for people
    temperature: int
    file: Path
    report: dict[str, Any]
    talks: list[PromptTurns]

    def slow(self) -> list[int]:
        return [i for i, prompt in enumerate(self.report["prompts"]) if (prompt["speedup"] or 1.0) < SLOW]


@click.command()
@click.argument("pairs", metavar="PAIR...", nargs=-1, required=True)
@click.option("--prompts", type=click.Path(path_type=Path), required=True, help="Folder of humaneval.jsonl and so on.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of results, made where missing.")
@click.option("--limit", type=click.IntRange(1), help="Only the first prompts of each task.")
@click.option("--sampled-limit", type=click.IntRange(1), help="The same at temperature 1.  [default: as --limit]")
@click.option("-n", "--max-new-tokens", type=int, default=128, show_default=True)
@click.option("--tune", "seconds", type=float, default=25.0, show_default=True, help="Per pair, once; 0: not at all.")
@click.option("--repeat-slow/--no-repeat-slow", default=True, show_default=True, help="Measure slow prompts again.")
def table(
    pairs: tuple[str, ...], prompts: Path, out: Path, limit: int | None, sampled_limit: int | None,
    max_new_tokens: int, seconds: float, repeat_slow: bool,
) -> None:  # fmt: skip
    """Measure what OUT does not hold yet, and print Markdown."""
    if len({Path(pair).name for pair in pairs}) < len(pairs):
        raise InputError("two pairs have one name, and results are named after pairs: rename a folder")
    tasks = {task: read_prompts(prompts / f"{task}.jsonl") for task in TASKS}
    for pair in pairs:
        read_manifest(resolve_pair(pair))  # what is no pair is told before hours pass
    out.mkdir(parents=True, exist_ok=True)
    length = ["-n", str(max_new_tokens)]
    rows: list[Row] = []
    notes: list[str] = []
    for pair in pairs:
        tuned = out / f"{Path(pair).name}.tune.json"
        if seconds and not tuned.exists():
            write_atomically(tuned, dovetail_run("tune", pair, "--seconds", f"{seconds:g}", "--json").encode())
        rows += task_rows(pair, tasks, prompts, out, {0: limit, 1: sampled_limit or limit}, length, notes)
        rows += context_rows(pair, out, length, notes)
    greedy = [row for row in rows if row.temperature == 0]
    again = {row.file: repeat(row, length, notes) for row in greedy if repeat_slow and row.slow()}
    head = ["| " + " | ".join(COLUMNS) + " |", "|---|---" + "|---:" * (len(COLUMNS) - 2) + "|"]
    click.echo("\n".join([*head, *map(line, rows), *losses(greedy, again), *circumstances(rows, notes)]))


def task_rows(
    pair: str, tasks: dict[str, list[PromptTurns]], prompts: Path, out: Path, limits: dict[int, int | None],
    length: list[str], notes: list[str],
) -> Iterator[Row]:  # fmt: skip
    """Every task at every temperature of `limits`, which says how many prompts of it."""
    for temperature, limit in limits.items():
        sampled = ["--temperature", f"{temperature}", "--seed", "1"] if temperature else []
        for task, name in TASKS.items():
            file = out / f"{Path(pair).name}.{task}.t{temperature}.json"
            asked = ["--prompts", str(prompts / f"{task}.jsonl"), *(["--limit", str(limit)] if limit else [])]
            report = measured(pair, [*asked, *length, *sampled], file, notes)
            talks = tasks[task][: len(report["prompts"])]
            if [talk.name for talk in talks] != [prompt["name"] for prompt in report["prompts"]]:
                raise InputError(f"{file} was measured with other prompts: delete it to take it anew")
            yield Row(pair, name, temperature, file, report, talks)


def context_rows(pair: str, out: Path, length: list[str], notes: list[str]) -> Iterator[Row]:
    """Prompts of CONTEXTS tokens, as far as the pair has room for them."""
    for tokens in CONTEXTS:
        file = own_prompts(pair, tokens, out)
        if file is not None:
            results = file.with_suffix(".json")
            report = measured(pair, ["--prompts", str(file), *length], results, notes)
            yield Row(pair, f"own text, {tokens} tokens", 0, results, report, read_prompts(file))


def measured(pair: str, asked: list[str], file: Path, notes: list[str]) -> dict[str, Any]:
    """The report in `file`, benchmarked first where there is none; `notes` gets what a kept one does not fit."""
    arguments = ["bench", "-m", pair, *asked, "-o", str(file)]
    if not file.exists():
        slow_file(file).unlink(missing_ok=True)  # repeats what is measured anew here
        dovetail_run(*arguments)
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    command = shlex.join(["dovetail-run", *arguments])
    now = {"command": command, "versions": machine.versions(), "machine": machine.describe()}
    other = [name for name in now if report[name] != now[name]]
    if file.stat().st_mtime < (resolve_pair(pair) / MANIFEST_NAME).stat().st_mtime:
        other.append("pair (an older one)")
    if other:
        notes.append(f"{file} was kept, but was measured with another {', '.join(other)}: delete it to take it anew")
    return report


def own_prompts(pair: str, tokens: int, out: Path) -> Path | None:
    """A file of CONTEXT_PROMPTS prompts of about so many tokens, kept once written; None where there is no room."""
    folder, file = resolve_pair(pair), out / f"{Path(pair).name}.context{tokens}.jsonl"
    if 2 * tokens > read_manifest(folder).target.max_context:  # prompt and answer, with room for other templates
        return None
    if file.exists():
        return file
    file.with_suffix(".json").unlink(missing_ok=True)  # of other prompts
    tokenizer = Tokenizer.from_folder(folder / "target")
    text = tokenizer.encode(OWN_TEXT.read_text("utf-8"), add_special_tokens=False)
    frame = len(tokenizer.encode_chat([{"role": "user", "content": "-"}]))
    parts = [text[begin : begin + max(tokens - frame, 1)] for begin in range(0, CONTEXT_PROMPTS * tokens, tokens)]
    lines = [json.dumps({"prompt": tokenizer.decode(part)}) + "\n" for part in parts if part]
    write_atomically(file, "".join(lines).encode())
    return file


def repeat(row: Row, length: list[str], notes: list[str]) -> list[dict[str, Any]]:
    """The row's slow prompts alone, benchmarked once more: noise seldom strikes twice."""
    talks = [row.talks[index] for index in row.slow()]
    prompts = slow_file(row.file).with_suffix(".jsonl")
    lines = [json.dumps({"question_id": talk.name, "turns": talk.turns}) for talk in talks]
    write_atomically(prompts, ("\n".join(lines) + "\n").encode())
    return list(measured(row.pair, ["--prompts", str(prompts), *length], slow_file(row.file), notes)["prompts"])


def slow_file(file: Path) -> Path:
    return file.with_suffix(".slow.json")


def dovetail_run(*arguments: str) -> str:
    """What the command prints, run in a process of its own; its progress is seen.  Raises InputError when it fails."""
    script = Path(sys.executable).with_name("dovetail-run")
    done = subprocess.run([script, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        said = f"{shlex.join(['dovetail-run', *arguments])} ended with exit code {done.returncode}"
        raise InputError(f"{said}: the reason is above, the same command goes on from here")
    return done.stdout


def needed_mb(row: Row) -> float:
    """MiB of the target's weights, its KV for the longest talk with its answers, and the drafter; nan where unknown."""
    folder = resolve_pair(row.pair)
    manifest, tokenizer = read_manifest(folder), Tokenizer.from_folder(folder / "target")
    sizes = estimate_memory(folder, manifest)
    device = "cuda" if row.report["drafter_device"].startswith("CUDA") else "cpu"
    answer: int = row.report["settings"]["max_new_tokens"]
    asked = [[{"role": "user", "content": turn} for turn in talk.turns] for talk in row.talks]
    tokens = max(len(tokenizer.encode_chat(turns)) + answer * len(turns) for turns in asked)
    kv_mb = (target_kv_bytes(folder, manifest) or nan) * tokens / 2**20
    return kv_mb + sum(sizes[name] or 0.0 for name in ("target_weights_mb", f"drafter_{device}_weights_mb"))


def shares(facts: dict[str, Any]) -> tuple[float, float]:
    """Of the speed-up that the passes' own times allow: with all tokens over all time, with the median of prompts.

    The first compares like with like.  The second may pass 1: there every prompt has the same weight.
    """
    step = ratio(facts["plain_verify_ms"], facts["verify_ms"] + facts["draft_ms"])
    pooled = ratio(facts["tokens_per_second"], facts["plain_tokens_per_second"])
    achievable = facts["acceptance_length"] * step
    return ratio(pooled, achievable), ratio(facts["speedup"] or nan, achievable)


def line(row: Row) -> str:
    """A line of the table."""
    facts, count, needed = row.report, len(row.talks), needed_mb(row)
    ratios = [prompt["speedup"] for prompt in facts["prompts"] if prompt["speedup"] is not None] or [nan]
    cells = (
        Path(row.pair).name, f"{count} of {row.task}" + (", temperature 1" if row.temperature else ""),
        f"{facts['speedup'] or nan:.2f}x", f"{min(ratios):.2f}x, {max(ratios):.2f}x",
        f"{facts['acceptance_length']:.2f}", f"{facts['plain_tokens_per_second']:.1f}",
        f"{facts['tokens_per_second']:.1f}", f"{facts['prefill_ms']:.0f}",
        f"{facts['other_tokens']} of {facts['new_tokens']}",
        f"{facts['draft_ms']:.1f} / {facts['verify_ms']:.1f} / {facts['other_ms']:.1f}",
        f"{facts['nodes_per_round']:.1f}", "{:.2f}, {:.2f}".format(*shares(facts)),
        f"{facts['peak_rss_mb']:.0f}", f"{facts['peak_rss_mb'] / needed:.2f}x of {needed:.0f}",
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def losses(rows: list[Row], again: dict[Path, list[dict[str, Any]]]) -> list[str]:
    """Every prompt that was slower than plain decoding, then every one with near ties."""
    slow, other = [], []
    for row in rows:
        second = dict(zip(row.slow(), again.get(row.file, ()), strict=False))
        for index, prompt in enumerate(row.report["prompts"]):
            where = f"- {Path(row.pair).name}, {row.task}, prompt {index} (`{prompt['name']}`)"
            if index in row.slow():
                repeated = f"{second[index]['speedup'] or nan:.2f}x" if index in second else "not measured"
                slow.append(f"{where}: {prompt['speedup']:.2f}x, again {repeated}")
            if count := prompt["other_tokens"]:
                most, margin = prompt["new_tokens"], prompt["largest_margin"]
                other.append(f"{where}: {count} of {most} tokens, at most {margin:.2f} logits below the best")
    lost = f"Slower than plain decoding by more than {1 - SLOW:.0%} at temperature 0:"
    return ["", lost, "", *(slow or ["- none"]), "", TIES, "", *(other or ["- none"])]


def circumstances(rows: list[Row], notes: list[str]) -> list[str]:
    """What the figures depend on."""
    dates = sorted(row.report["date"] for row in rows)
    facts = {
        "Machine": ", ".join(f"{name} {fact}" for name, fact in machine.describe().items()),
        "Versions": ", ".join(f"{name} {version}" for name, version in machine.versions().items()),
        "Measured": f"{dates[0]} to {dates[-1]}, printed {datetime.now(UTC).isoformat(timespec='seconds')}",
        "Command": f"`{shlex.join(['python', *sys.argv])}`",
    }
    return ["", *(f"- Note: {note}" for note in notes), *(f"- {name}: {fact}" for name, fact in facts.items())]


def ratio(part: float, whole: float) -> float:
    """nan where there is nothing to compare with."""
    return part / whole if whole else nan


def main() -> None:
    try:
        table()
    except DovetailError as err:
        sys.exit(fail(str(err), err.exit_code))


if __name__ == "__main__":
    main()
