"""`dovetail-run bench`: measure speculative against plain decoding on the user's prompts."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from dovetail.runtime.bench.compare import Paired, measure, read_again, summary
from dovetail.runtime.cli.options import EngineFlags, check_folder, engine_options, sampling_options, write_file
from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import DovetailError, InputError
from dovetail.runtime.pair.known import DEFAULT_PAIR
from dovetail.runtime.settings import AnswerSettings
from dovetail.runtime.system import machine
from dovetail.runtime.text.prompts import PromptTurns, read_prompts


@click.command(short_help="Measure plain against speculative decoding.")
@click.option("--prompts", "file", type=click.Path(path_type=Path), required=True,
              help="JSONL file; each row has `prompt`, or `turns` as in spec_bench.")  # fmt: skip
@click.option("--limit", type=int, help="Use only the first rows.")
@click.option("--plain/--no-plain", default=True, show_default=True,
              help="Compare with plain decoding, or measure acceptance lengths and speed alone.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the results to this JSON file.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON to stdout.")
@sampling_options(max_new_tokens=128, speculate=False)
@engine_options
def bench(
    file: Path,
    limit: int | None,
    plain: bool,
    output: Path | None,
    as_json: bool,
    engine_flags: EngineFlags,
    request: AnswerSettings,
) -> None:
    """Measure plain against speculative decoding, interleaved in one process.

    A progress bar and a table of the results go to stderr. At the end the target reads every answer
    again, and bench counts the tokens for which the target now chooses another token.
    """
    conversations = read_prompts(file, limit)
    if output is not None:
        check_output(output)
    engine = engine_flags.open()
    for conversation in conversations:
        try:
            engine.count_tokens(conversation.turns[0])
        except DovetailError as error:
            raise type(error)(f"prompt {conversation.name}: {error}") from None
    request = replace(request, seed=request.sampling().seeded().seed)  # both modes draw the same noise
    pairs = run(engine, conversations, request, plain)
    facts = circumstances(engine, engine_flags, file, request)  # first: reading again may raise the memory peak
    report = {**summary([read_again(engine, pair, request) for pair in pairs]), **facts}
    show(report)
    text = json.dumps(report, indent=2, ensure_ascii=False)
    if output is not None:
        write_file("--output", output, (text + "\n").encode())
    if as_json:
        click.echo(text)


def check_output(output: Path) -> None:
    """Raise InputError for a file that cannot be written, before anything is measured."""
    check_folder("--output", output)
    if output.is_dir():
        raise InputError(f"--output {output} is a folder: name a file")
    if not os.access(output.parent, os.W_OK):
        raise InputError(f"--output {output} cannot be written: name a folder other than {output.parent}")


def run(engine: Engine, conversations: Sequence[PromptTurns], request: AnswerSettings, plain: bool) -> list[Paired]:
    """Measure every conversation. A progress bar shows the speedup or acceptance length so far."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    pairs: list[Paired] = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("warm-up", total=len(conversations))
        for pair in measure(engine, conversations, request, plain=plain):
            pairs.append(pair)
            so_far = summary(pairs)
            compared, alone = f"speedup {_times(so_far['speedup'])}", f"acceptance {so_far['acceptance_length']:.2f}"
            progress.update(task, advance=1, description=compared if plain else alone)
    return pairs


def circumstances(engine: Engine, flags: EngineFlags, file: Path, request: AnswerSettings) -> dict[str, Any]:
    """Return the figures' circumstances: pair, settings, devices, machine, versions, command."""
    return {
        "pair": flags.pair or DEFAULT_PAIR,
        "prompts_file": str(file),
        "settings": {**asdict(request.sampling()), "max_new_tokens": request.max_new_tokens, "stop": request.stop},
        "tree": asdict(engine.tree),
        "scheduled": engine.scheduler is not None,
        "target_device": engine.target_device,
        "drafter_device": engine.drafter_device,
        "drafter_note": engine.drafter_note,
        "peak_rss_mb": machine.peak_rss_mb(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["dovetail-run", *sys.argv[1:]]),
    }


def show(report: dict[str, Any]) -> None:
    """Print the table on stderr: a row per prompt, then all. Speedups need the plain mode."""
    from rich.console import Console
    from rich.table import Table

    compared = report["plain_tokens_per_second"] is not None
    title = "speculative against plain decoding" if compared else "speculative decoding"
    table = Table("prompt", title=f"{report['pair']}: {title}")
    speeds = ("plain tok/s", "tok/s", "speedup") if compared else ("tok/s",)
    for name in ("tokens", *speeds, "acceptance", "near ties"):
        table.add_column(name, justify="right")
    for row in report["prompts"]:
        table.add_row(row["name"], *_cells(row, compared))
    table.add_section()
    table.add_row("all (median speedup)" if compared else "all", *_cells(report, compared))
    console = Console(stderr=True, markup=False, emoji=False)  # users' names may look like markup
    console.print(table)
    console.print(
        f"per round: draft {report['draft_ms']:.1f} ms, verify {report['verify_ms']:.1f} ms, "
        f"other {report['other_ms']:.1f} ms; peak RSS {report['peak_rss_mb']:.0f} MiB; "
        f"target {report['target_device']}, drafter {report['drafter_device'] or 'none'}\n"
        "near ties: tokens that the target replaces when it reads its answer again, and by how many logits",
        highlight=False,
    )


def _cells(row: dict[str, Any], compared: bool) -> tuple[str, ...]:
    tokens, speed = str(row["new_tokens"]), f"{row['tokens_per_second']:.1f}"
    acceptance = f"{row['acceptance_length']:.2f}"
    speeds = (f"{row['plain_tokens_per_second']:.1f}", speed, _times(row["speedup"])) if compared else (speed,)
    count, margin = row["other_tokens"], row["largest_margin"]
    ties = (f"{count}" if margin is None else f"{count} (up to {margin:.2f})") if count else "none"
    return tokens, *speeds, acceptance, ties


def _times(speedup: float | None) -> str:
    return "-" if speedup is None else f"{speedup:.2f}x"
