"""`dovetail-export train`."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from time import monotonic
from typing import Any, Self

import click
from rich import progress as rich
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dovetail.exporter.train.plan import FORMATS, OPTIMIZERS, UNROLL, FitOptions, TrainPlan
from dovetail.models.config import FUSIONS

LINE_SECONDS = 10.0
FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


class _Bars:
    """One rich progress bar per stage on stderr; the first stage starts the display.

    If stderr is no terminal, `_Bars` prints lines: when a stage begins, ends or changes its note,
    and every LINE_SECONDS.
    """

    def __init__(self, progress: rich.Progress):
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._line = "", "", 0.0  # stage and note of the last line, and its time

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        if self._tasks:
            self._progress.stop()

    def __call__(self, stage: str, done: float = 0, total: float = 0, note: str = "") -> None:
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
        of = f"/{total:.0f}" if total else ""  # the total is unknown while only time limits the text
        self._progress.console.print(f"{stage} {done:.0f}{of}  {note}".rstrip(), markup=False)


@click.command("train")
@click.option(
    "--target", "pair", type=FOLDER, required=True, help="Pair folder with the target that the drafter is for."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the checkpoint.  [default: TARGET-drafter]",
)  # fmt: skip
@click.option(
    "--format", type=click.Choice(FORMATS), default=TrainPlan.format, show_default=True,
    help="Of the checkpoint: Dovetail's, or EAGLE-3's for other engines as well.",
)  # fmt: skip
@click.option("--minutes", type=float, help="Time for the whole run. Without text, the target writes for a third.")
@click.option("--prompts", type=FILE, help="JSONL with `prompt` rows.")
@click.option("--own-prompts", type=click.IntRange(min=0), default=0, help="Number of prompts that the target writes.")
@click.option(
    "--opening", "openings", multiple=True,
    help="How the target's prompts may begin, e.g. 'Write a Python function'; repeatable.  [default: any]",
)  # fmt: skip
@click.option(
    "--corpus", "corpora", multiple=True, type=FILE,
    help="Conversations (.npz) that the same target wrote earlier; repeatable.",
)  # fmt: skip
@click.option(
    "--exclude", multiple=True, type=FILE,
    help="JSONL of benchmark prompts; training skips text that shares 13 words with a prompt; repeatable.",
)  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(min=8), default=320, show_default=True, help="Answer length.")
@click.option("--epochs", type=float, default=4.0, show_default=True, help="Without --minutes: epochs over the text.")
@click.option("--disk", "disk_gb", type=float, default=20.0, show_default=True, help="GB of disk for features.")
@click.option("--from", "init", type=FOLDER, help="Checkpoint whose weights the fit begins with.")
@click.option(
    "--draft-vocab", type=click.IntRange(min=16), default=8192, show_default=True,
    help="Tokens that the drafter can propose.",
)  # fmt: skip
@click.option(
    "--fusion", type=click.Choice(FUSIONS), default=TrainPlan.fusion, show_default=True,
    help="Join feature and embedding by dynamic gating, or by a linear layer.",
)  # fmt: skip
@click.option(
    "--feature-layers/--last-feature", default=True, show_default=True,
    help="Read three blocks of the target and its last feature, or the last feature alone.",
)  # fmt: skip
@click.option("--blocks", type=click.IntRange(1, 6), default=1, show_default=True, help="Layers of the drafter.")
@click.option(
    "--intermediate-size", type=click.IntRange(min=1),
    help="Width of the drafter's feed-forward layers.  [default: the target's]",
)  # fmt: skip
@click.option("--unroll", type=click.IntRange(1, 8), help="Unrolled steps per update.  [default: 3; 7 for eagle3]")
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True, help="Conversations per update.")
@click.option("--window", type=click.IntRange(min=16), default=384, show_default=True, help="Most positions per text.")
@click.option("--learning-rate", type=float, default=1e-3, show_default=True, help="Highest rate; it falls to zero.")
@click.option(
    "--optimizer", type=click.Choice(OPTIMIZERS), default="adamw", show_default=True,
    help="Muon is for matrices; AdamW then fits the other parameters.",
)  # fmt: skip
@click.option("--bf16", is_flag=True, help="Multiply matrices in bfloat16: faster with AVX512_BF16 or AMX.")
@click.option("--teacher-top-k", type=click.IntRange(min=0), default=0, help="Learn the K best target tokens; 0: all.")
@click.option("--regression", type=float, default=0.0, help="Weight of the features' distance in the loss.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws text and first weights.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where torch fits."
)
@click.option("--resume", is_flag=True, help="Continue a stopped run.")
def command(pair: Path, output: Path | None, resume: bool, **options: Any) -> None:
    """Train a drafter for the target of a pair.

    Without --prompts and --corpus the target writes the text: as much as --minutes allow, else
    1,000 prompts.
    """
    from dovetail.exporter.train.run import train  # torch: --help does without it

    if not (options["prompts"] or options["own_prompts"] or options["corpora"] or options["minutes"]):
        options["own_prompts"] = 1000
    options["openings"] = options["openings"] or ("",)
    options["unroll"] = options["unroll"] or UNROLL[options["format"]]
    fit = FitOptions(**{name: options.pop(name) for name in [f.name for f in fields(FitOptions)] if name in options})
    plan = TrainPlan(**options, fit=fit)
    out = output or pair.resolve().with_name(f"{pair.resolve().name}-drafter")
    stage, note = TextColumn("{task.description:>9}"), TextColumn("{task.fields[note]}", markup=False)
    columns = (stage, BarColumn(), note, TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(file=sys.stderr)
    with _Bars(rich.Progress(*columns, console=console, disable=not console.is_terminal)) as bars:
        result = train(pair, out, plan, bars, resume=resume)
    if not result.positions:
        click.echo("held-out answers are too short for an acceptance length: give --max-new-tokens 32 or more")
    rates = " ".join(f"{rate:.2f}" for rate in result.accepted_per_position)
    click.echo(f"held-out acceptance length {result.acceptance_length:.2f} (chain; per position {rates})")
    click.echo(f"checkpoint: {out}; add the drafter to the target: dovetail-export drafter {pair} --checkpoint {out}")
