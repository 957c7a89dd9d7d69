"""`dovetail-export train`."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from time import monotonic
from typing import Any, Self

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dovetail.exporter.train.plan import OPTIMIZERS, FitOptions, TrainPlan
from dovetail.models.config import FUSIONS

LINE_SECONDS = 10.0


class _Bars:
    """One rich progress bar per stage, on stderr; nothing is printed before the first.

    Where stderr is no terminal, a line in their place when a stage begins, ends or has news, and every LINE_SECONDS.
    """

    def __init__(self, progress: Progress):
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._line = "", "", 0.0  # the last one's stage and note, and when it was

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        if self._tasks:
            self._progress.stop()

    def __call__(self, stage: str, done: float, total: float, note: str) -> None:
        if not self._tasks:
            self._progress.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, note="")
        self._progress.update(self._tasks[stage], completed=done, total=total, note=note)
        if not self._progress.console.is_terminal:
            self._print(stage, done, total, note)

    def _print(self, stage: str, done: float, total: float, note: str) -> None:
        last_stage, last_note, when = self._line
        if (stage, note) == (last_stage, last_note) and done != total and monotonic() - when < LINE_SECONDS:
            return
        self._line = stage, note, monotonic()
        of = f"/{total:.0f}" if total else ""  # nobody knows how much text a time gives
        self._progress.console.print(f"{stage} {done:.0f}{of}  {note}".rstrip(), markup=False)


@click.command("train")
@click.option(
    "--target",
    "pair",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="Pair folder whose target the drafter is for.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), help="[default: TARGET-drafter]")
@click.option("--minutes", type=float, help="Time for everything; a third goes into writing text when none is given.")
@click.option(
    "--prompts", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="JSONL with `prompt` rows."
)
@click.option("--own-prompts", type=click.IntRange(min=0), default=0, help="Prompts that the target writes itself.")
@click.option(
    "--opening",
    "openings",
    multiple=True,
    help="How its own prompts may begin, such as 'Write a Python function'; repeatable.  [default: as it likes]",
)
@click.option(
    "--corpus",
    "corpora",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Conversations the same target wrote earlier (.npz); repeatable.",
)
@click.option(
    "--exclude",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="JSONL of benchmark prompts; text that shares 13 words with one is left out; repeatable.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=8), default=320, show_default=True, help="Answer length.")
@click.option("--epochs", type=float, default=4.0, show_default=True, help="Without --minutes: how often text is seen.")
@click.option("--disk", "disk_gb", type=float, default=20.0, show_default=True, help="Most GB for features.")
@click.option("--from", "init", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Go on from this.")
@click.option("--draft-vocab", type=click.IntRange(min=16), default=8192, show_default=True)
@click.option("--fusion", type=click.Choice(FUSIONS), default="dgf", show_default=True)
@click.option(
    "--feature-layers/--last-feature",
    default=True,
    show_default=True,
    help="Read three blocks of the target beside its last feature.",
)
@click.option("--blocks", type=click.IntRange(1, 6), default=1, show_default=True)
@click.option("--unroll", type=click.IntRange(1, 8), default=3, show_default=True, help="Steps on its own outputs.")
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True, help="Conversations per update.")
@click.option("--window", type=click.IntRange(min=16), default=384, show_default=True, help="Positions of each.")
@click.option("--learning-rate", type=float, default=1e-3, show_default=True)
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), default="adamw", show_default=True)
@click.option("--teacher-top-k", type=click.IntRange(min=0), default=0, help="Learn from so many of its best tokens.")
@click.option("--regression", type=float, default=0.0, help="Weight of the distance to the target's features.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--resume", is_flag=True, help="Go on with a stopped run.")
def command(pair: Path, output: Path | None, resume: bool, **options: Any) -> None:
    """Train a drafter for the target of a pair.

    Without --prompts and --corpus the target writes its own text: as much as --minutes allow, else 1,000 prompts.
    """
    from dovetail.exporter.train.run import train  # torch: --help does without it

    if not (options["prompts"] or options["own_prompts"] or options["corpora"] or options["minutes"]):
        options["own_prompts"] = 1000
    options["openings"] = options["openings"] or ("",)
    fit = FitOptions(**{name: options.pop(name) for name in [f.name for f in fields(FitOptions)] if name in options})
    plan = TrainPlan(**options, fit=fit)
    out = output or pair.resolve().with_name(f"{pair.resolve().name}-drafter")
    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(file=sys.stderr)
    with _Bars(Progress(*columns, console=console, disable=not console.is_terminal)) as bars:
        result = train(pair, out, plan, bars, resume=resume)
    if not result.positions:
        click.echo("held-out answers are too short to measure an acceptance length: give --max-new-tokens 32 or more")
    rates = " ".join(f"{rate:.2f}" for rate in result.accepted_per_position)
    click.echo(f"held-out acceptance length {result.acceptance_length:.2f} (chain; per position {rates})")
    click.echo(f"checkpoint: {out}; add it to the target with: dovetail-export drafter {pair} --checkpoint {out}")
