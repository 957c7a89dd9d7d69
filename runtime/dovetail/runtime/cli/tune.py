"""`dovetail-run tune`: measure thoroughly what passes cost on this machine, so that trees are sized by it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter

import click

from ..cost_cache import CostKey, Measured
from ..errors import InputError, PairError
from ..manifest import read_sound
from ..tune import ALL_WIDTHS, CONTEXTS, check_seconds, measure
from .curves import show_costs
from .options import check_threads, device_options
from .pairs import resolve_pair


@click.command(short_help="Measure what passes cost on this machine.")
@click.argument("pair", required=False, metavar="[PAIR]")
@device_options
@click.option("--seconds", type=float, default=60.0, show_default=True, help="Time to measure for.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def tune(
    pair: str | None,
    threads: int | None,
    drafter_device: str,
    vram: int | None,
    fit: bool,
    ov_config: Mapping[str, str],
    seconds: float,
    as_json: bool,
) -> None:
    """Measure what a pass of PAIR's target and a call of its drafter cost here, and keep it in the cache.

    PAIR is a folder or a known name. Opening the pair for the first time does the same in a few seconds; this is more
    exact and stays in its place while the weights, the machine and these flags do. Leave the machine alone meanwhile.
    """
    from ..onnx_drafter import OnnxDrafter
    from ..openvino_target import OpenVINOTarget

    check_threads(threads)
    check_seconds(seconds)
    folder = resolve_pair(pair)
    manifest = read_sound(folder)
    if manifest.drafter is None:
        raise PairError("this pair has no drafter, so there is nothing to tune: add one with dovetail-export drafter")
    target = OpenVINOTarget.open(folder, manifest, threads=threads, ov_config=ov_config)
    drafter = OnnxDrafter.open(folder, manifest, device=drafter_device, threads=threads, vram=vram, fit=fit)
    begin = perf_counter()
    with progress_bar() as progress:
        costs = measure(target, drafter, contexts=CONTEXTS, widths=ALL_WIDTHS, seconds=seconds, progress=progress)
    key = CostKey.of(manifest, drafter.file_key, threads, ov_config)
    measured = Measured(manifest.name, key, costs, round(perf_counter() - begin, 2))
    try:
        measured.store()
    except OSError as err:
        raise InputError(f"{measured.key.file} cannot be written ({err.strerror}): set DOVETAIL_CACHE") from None
    if as_json:
        click.echo(json.dumps(measured.as_dict(), indent=2, ensure_ascii=False))
    else:
        show_costs(measured.pair, measured)
        click.echo(f"kept in {measured.key.file}")


@contextmanager
def progress_bar() -> Iterator[Callable[[float], None]]:
    """A bar on stderr, moved by the part that is done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=1.0)
        yield lambda done: progress.update(task, completed=done)
