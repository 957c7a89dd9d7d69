"""`dovetail-export train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Self

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dovetail.models.config import FUSIONS

from .fit import FitOptions
from .train import TrainPlan, train


class _Bars:
    """One rich progress bar per stage, on stderr; nothing is printed before the first."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

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
            self._progress.console.print(f"{stage} {done:.1f}/{total:.0f}  {note}")


@click.command("train")
@click.argument("pair", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--prompts", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="JSONL with `prompt` rows."
)
@click.option("--own-prompts", type=click.IntRange(min=0), default=0, help="Prompts that the target writes itself.")
@click.option(
    "--corpus",
    "corpora",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Conversations the same target wrote earlier (.npz); repeatable.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=8), default=320, show_default=True, help="Answer length.")
@click.option("--minutes", type=float, help="Time for fitting; else --epochs decides.")
@click.option("--epochs", type=float, default=8.0, show_default=True)
@click.option("--draft-vocab", type=click.IntRange(min=16), default=8192, show_default=True)
@click.option("--fusion", type=click.Choice(FUSIONS), default="dgf", show_default=True)
@click.option("--blocks", type=click.IntRange(1, 6), default=1, show_default=True)
@click.option("--unroll", type=click.IntRange(1, 8), default=3, show_default=True, help="Steps on its own outputs.")
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True, help="Conversations per update.")
@click.option("--window", type=click.IntRange(min=16), default=384, show_default=True, help="Positions of each.")
@click.option("--learning-rate", type=float, default=1e-3, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--resume", is_flag=True, help="Go on with a stopped run in OUT.")
def command(
    pair: Path,
    out: Path,
    prompts: Path | None,
    own_prompts: int,
    corpora: tuple[Path, ...],
    max_new_tokens: int,
    minutes: float | None,
    epochs: float,
    draft_vocab: int,
    fusion: str,
    blocks: int,
    unroll: int,
    batch: int,
    window: int,
    learning_rate: float,
    seed: int,
    device: str,
    resume: bool,
) -> None:
    """Train a drafter for the target of PAIR and leave its checkpoint in OUT.

    Without --prompts and --corpus the target writes 1,000 prompts of its own.
    """
    if not (prompts or own_prompts or corpora):
        own_prompts = 1000
    fit = FitOptions(epochs=epochs, unroll=unroll, window=window, batch=batch, learning_rate=learning_rate, seed=seed)
    plan = TrainPlan(
        prompts=prompts,
        own_prompts=own_prompts,
        corpora=corpora,
        max_new_tokens=max_new_tokens,
        minutes=minutes,
        draft_vocab=draft_vocab,
        fusion=fusion,
        blocks=blocks,
        device=device,
        fit=fit,
    )
    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with _Bars(Progress(*columns, console=Console(file=sys.stderr))) as bars:
        result = train(pair, out, plan, bars, resume=resume)
    rates = " ".join(f"{rate:.2f}" for rate in result.accepted_per_position)
    click.echo(f"held-out acceptance length {result.acceptance_length:.2f} (chain; per position {rates})")
    click.echo(f"checkpoint: {out}; add it to the target with: dovetail-export drafter {pair} --checkpoint {out}")
