"""`dovetail-run tune`: choose properties for the target here, then measure what passes cost, to size trees by it.

With --properties: compare all properties of OpenVINO's CPU plugin that are worth a try instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from time import perf_counter
from typing import Any

import click

from dovetail.runtime.cli.curves import show_costs
from dovetail.runtime.cli.options import check_threads, device_options
from dovetail.runtime.drafter.vram import check_limit
from dovetail.runtime.errors import InputError, PairError
from dovetail.runtime.pair.known import resolve_pair
from dovetail.runtime.pair.manifest import cache_dir, read_sound
from dovetail.runtime.system import machine
from dovetail.runtime.text.tokenizer import Tokenizer
from dovetail.runtime.tune.applied import properties_line, target_properties
from dovetail.runtime.tune.cost_cache import CHOOSABLE, Chosen, CostKey, Measured, chosen_properties
from dovetail.runtime.tune.measure import ALL_WIDTHS, CONTEXTS, check_seconds, measure
from dovetail.runtime.tune.properties import CONTEXT, NODES, PROMPT, Compared, Property, candidates, choose, compare

CHOICE = 0.25  # of the time
APPLY = """\
--ov-config NAME=VALUE of generate, chat, bench and tune applies any of them. Another property may change the text, even
where every best token stayed the same here; without equal rows drafts may change it too."""
UNCERTAIN = "~: too close to 1.00x to tell, passes vary too much; a quieter machine or more --seconds may tell."


@click.command(short_help="Measure what passes cost on this machine.")
@click.argument("pair", required=False, metavar="[PAIR]")
@device_options
@click.option("--seconds", type=float, default=60.0, show_default=True, help="Time to measure for.")
@click.option("--properties", is_flag=True, help="Compare OpenVINO properties for the target instead.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def tune(
    pair: str | None,
    threads: int | None,
    drafter_device: str,
    vram: int | None,
    fit: bool,
    ov_config: Mapping[str, str],
    exact: bool,
    seconds: float,
    properties: bool,
    as_json: bool,
) -> None:
    """Choose precision and groups for PAIR's target here, measure what passes cost then, and keep both in the cache.

    PAIR is a folder or a known name. A quarter of the time goes to the choice, or what opening PAIR with each candidate
    takes: later openings of PAIR use the quickest precision or group size that keeps rows equal in passes of every
    width, if it is quicker than the defaults beyond doubt. With --ov-config nothing is chosen. Then passes of the
    target and calls of the drafter are timed. Opening the pair for the first time does that in a few seconds; this is
    more exact and stays in its place while the weights, the machine and these flags do. Leave the machine alone
    meanwhile.

    With --properties PAIR needs no drafter, and its flags say nothing: a table says for each property of OpenVINO's
    CPU plugin that is worth a try how many times as fast passes of the target are with it as without, after how many
    tokens of a text the target's best token stays the same, and whether rows are equal. All the time goes to the
    choice then.
    """
    from dovetail.runtime.drafter.onnx import OnnxDrafter
    from dovetail.runtime.target.openvino import OpenVINOTarget

    check_threads(threads)
    check_limit(vram, fit, drafter_device)
    check_seconds(seconds)
    if not (properties and ov_config):  # else nothing is kept
        check_cache(cache_dir() / ("properties" if properties else "costs"))
    folder = resolve_pair(pair)
    manifest = read_sound(folder)

    def open_target(*more: Property, beside: Mapping[str, str] = ov_config) -> OpenVINOTarget:
        config = {**beside, **{each.name: each.value for each in more}}
        return OpenVINOTarget.load(folder, manifest, threads=threads, ov_config=config, exact=exact)

    def compared(tried: Sequence[Property], seconds: float) -> tuple[list[Compared], Chosen | None]:
        prompt = Tokenizer.from_folder(folder / "target").encode(PROMPT)
        with progress_bar("comparing") as progress:
            rows = compare(open_target(), open_target, prompt, tried, seconds=seconds, progress=progress)
        chosen = None if ov_config else choose(rows)
        if chosen:
            store(lambda: chosen.store(manifest, threads))
        return rows, chosen

    tried = candidates(ov_config, threads)
    if properties:
        rows, chosen = compared(tried, seconds)
        report = {"pair": manifest.name, "threads": threads, "ov_config": dict(ov_config)}
        show_properties({**report, "chosen": asdict(chosen) if chosen else None}, rows, as_json)
        return
    if manifest.drafter is None:
        raise PairError("this pair has no drafter, so there is nothing to tune: add one with dovetail-export drafter")
    drafter = OnnxDrafter.open(folder, manifest, device=drafter_device, threads=threads, vram=vram, fit=fit)
    begin = perf_counter()
    if not ov_config:
        compared([each for each in tried if each.name in CHOOSABLE], seconds * CHOICE)
    target = open_target(beside={**chosen_properties(manifest, threads), **ov_config})
    left = max(begin + seconds - perf_counter(), seconds * (1 - CHOICE))
    with progress_bar("measuring") as progress:
        costs = measure(target, drafter, contexts=CONTEXTS, widths=ALL_WIDTHS, seconds=left, progress=progress)
    key = CostKey.of(manifest, drafter.file_key, threads, ov_config, exact)
    measured = Measured(manifest.name, key, costs, round(perf_counter() - begin, 2))
    store(measured.store)
    given = target_properties(manifest, threads, ov_config)
    if as_json:
        click.echo(json.dumps({**measured.as_dict(), "properties": given}, indent=2, ensure_ascii=False))
    else:
        show_costs(measured.pair, measured)
        click.echo(f"OpenVINO: {properties_line(given)}")
        click.echo(f"kept in {measured.key.file}")


def check_cache(folder: Path) -> None:
    """Raises InputError where nothing can be kept in this folder of the cache, before minutes are spent."""

    def keep() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass

    store(keep)


def store(keep: Callable[[], None]) -> None:
    """Keep what was measured in the cache.  Raises InputError."""
    try:
        keep()
    except OSError as err:
        raise InputError(f"{err.filename} cannot be written ({err.strerror}): set DOVETAIL_CACHE") from None


def show_properties(given: Mapping[str, Any], rows: Sequence[Compared], as_json: bool) -> None:
    """The table or the JSON object on stdout.

    given: pair, threads and ov_config, which passes are compared with, and what was chosen, None if nothing could be.
    """
    if as_json:
        circumstances = {"context": CONTEXT, "machine": machine.describe(), "versions": machine.versions()}
        report = {**given, **circumstances, "properties": [asdict(row) for row in rows]}
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    base = " ".join(f"{name}={value}" for name, value in given["ov_config"].items()) or "the defaults"
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("property", overflow="fold")  # one copies it into --ov-config
    for heading in (*(f"{nodes} node{'s' * (nodes > 1)}" for nodes in NODES), "same token", "equal rows"):
        table.add_column(heading, justify="right")
    for row in rows:
        if row.same is None:
            table.add_row(str(row), "refused")
        else:
            passes = (times(*row.speedups[nodes]) for nodes in NODES)
            table.add_row(str(row), *passes, f"{row.same:.1%}", "yes" if row.rows_equal else "no")
    click.echo(f"{given['pair']} on {machine.cpu().model}: a pass of the target after {CONTEXT} tokens,")
    click.echo(f"times as fast as with {base}")
    Console(highlight=False, markup=False, emoji=False).print(table)
    for row in rows:
        if row.problem:
            click.echo(f"{row}: {row.problem}")
    click.echo(UNCERTAIN)
    if (chosen := given["chosen"]) is not None:
        kept = " ".join(f"{name}={value}" for name, value in chosen["properties"].items())
        click.echo(f"kept for later openings: {kept or 'the defaults, no other is surely quicker'}")
    click.echo(APPLY)


def times(low: float, middle: float, high: float) -> str:
    """A speedup and the interval that it lies in, marked where that does not tell it from none."""
    return f"{'~' if low < 1 < high else ''}{middle:.2f}x"


@contextmanager
def progress_bar(doing: str) -> Iterator[Callable[[float], None]]:
    """A bar on stderr that says what is done, moved by the part of it that is."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(doing, total=1.0)
        yield lambda done: progress.update(task, completed=done)
