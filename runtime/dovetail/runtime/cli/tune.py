"""`dovetail-run tune`: measure thoroughly what passes cost on this machine, so that trees are sized by it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import click

from ..cost_cache import CostKey, Measured
from ..costs import Curve
from ..errors import InputError, PairError
from ..manifest import Manifest, read_sound
from ..tune import ALL_WIDTHS, CONTEXTS, check_seconds, measure
from .options import check_threads, device_options
from .pairs import resolve_pair

if TYPE_CHECKING:
    from rich.console import Console

IN_TABLE = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128)  # sizes: a line of 80 characters has no room for all
BAR = 40  # characters of the longest bar


@click.command(short_help="Measure what passes cost on this machine.")
@click.argument("pair", required=False, metavar="[PAIR]")
@device_options
@click.option("--seconds", type=float, default=60.0, show_default=True, help="Time to measure for.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def tune(pair: str | None, threads: int | None, drafter_device: str, seconds: float, as_json: bool) -> None:
    """Measure what a pass of PAIR's target and a call of its drafter cost here, and keep it in the cache.

    PAIR is a folder or a known name. Opening the pair for the first time does the same in a few seconds; this is more
    exact and stays in its place while the weights, the machine and these flags do. Leave the machine alone meanwhile.
    """
    check_threads(threads)
    check_seconds(seconds)
    folder = resolve_pair(pair)
    manifest = read_sound(folder)
    if manifest.drafter is None:
        raise PairError("this pair has no drafter, so there is nothing to tune: add one with dovetail-export drafter")
    measured = run(folder, manifest, threads, drafter_device, seconds)
    try:
        measured.store()
    except OSError as err:
        raise InputError(f"{measured.key.file} cannot be written ({err.strerror}): set DOVETAIL_CACHE") from None
    if as_json:
        click.echo(json.dumps(measured.as_dict(), indent=2, ensure_ascii=False))
    else:
        show(measured)


def run(folder: Path, manifest: Manifest, threads: int | None, device: str, seconds: float) -> Measured:
    """Open both sessions of a checked pair and measure them, with a progress bar on stderr."""
    from ..onnx_drafter import OnnxDrafter
    from ..openvino_target import OpenVINOTarget

    target = OpenVINOTarget.open(folder, manifest, threads=threads)
    drafter = OnnxDrafter.open(folder, manifest, device=device, threads=threads)
    begin = perf_counter()
    with progress_bar() as progress:
        costs = measure(target, drafter, contexts=CONTEXTS, widths=ALL_WIDTHS, seconds=seconds, progress=progress)
    key = CostKey.of(manifest, drafter.file_key, threads)
    return Measured(manifest.name, key, costs, round(perf_counter() - begin, 2))


@contextmanager
def progress_bar() -> Iterator[Callable[[float], None]]:
    """A bar on stderr, moved by the part that is done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=1.0)
        yield lambda done: progress.update(task, completed=done)


def show(measured: Measured) -> None:
    """Tables and bars on stdout, and where the costs are kept."""
    from rich.console import Console

    console, where = Console(highlight=False), {"cuda": "CUDA", "cpu": "the CPU"}[measured.key.device]
    show_curve(console, f"{measured.pair}: a pass of the target, ms by nodes", measured.costs.target)
    show_curve(console, f"{measured.pair}: a call of the drafter on {where}, ms by rows", measured.costs.draft)
    console.print(f"a pass of the target after one of another width takes {measured.costs.switch_ms:.1f} ms more")
    console.print(f"kept in {measured.key.file}", soft_wrap=True)


def show_curve(console: Console, title: str, curve: Curve) -> None:
    """A row per context, then a bar per size at the shortest one."""
    from rich.table import Table

    shown = [index for index, size in enumerate(curve.rows) if size in IN_TABLE]
    table = Table("context", box=None, padding=(0, 1, 0, 0))
    for index in shown:
        table.add_column(str(curve.rows[index]), justify="right")
    for context, line in zip(curve.contexts, curve.ms, strict=True):
        table.add_row(str(context), *(milliseconds(line[index]) for index in shown))
    console.print(title)
    console.print(table)
    for size, ms in zip(curve.rows, curve.ms[0], strict=True):
        console.print(f"{size:>7} {'█' * max(1, round(BAR * ms / curve.ms[0][-1]))} {milliseconds(ms)}")
    console.print()


def milliseconds(ms: float) -> str:
    """Three digits or so."""
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"
