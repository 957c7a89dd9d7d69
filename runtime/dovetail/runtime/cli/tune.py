"""`dovetail-run tune`: choose properties for the target, then measure costs for the scheduler.

With --properties the command instead compares all properties of OpenVINO's CPU plugin worth a try.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from tempfile import TemporaryFile
from time import perf_counter
from typing import Any

import click

from dovetail.runtime.cli.curves import show_costs
from dovetail.runtime.cli.options import EngineFlags, device_options
from dovetail.runtime.drafter.open import open_drafter
from dovetail.runtime.errors import InputError
from dovetail.runtime.pair.check import read_sound
from dovetail.runtime.pair.files import cache_dir
from dovetail.runtime.pair.known import resolve_draft_model, resolve_pair
from dovetail.runtime.pair.layout import TARGET
from dovetail.runtime.pair.manifest import Manifest
from dovetail.runtime.system import machine
from dovetail.runtime.system.progress import Progress
from dovetail.runtime.text.tokenizer import Tokenizer
from dovetail.runtime.tune.cost_cache import (
    CHOOSABLE,
    Chosen,
    CostKey,
    chosen_properties,
    properties_line,
    target_properties,
)
from dovetail.runtime.tune.measure import ALL_WIDTHS, CONTEXTS, check_seconds, measure, measured_alike, warn_of_rows
from dovetail.runtime.tune.properties import CONTEXT, NODES, PROMPT, Compared, Property, candidates, choose, compare

CHOICE = 0.25  # the choice's part of the time
APPLY = """\
Apply a property with --ov-config NAME=VALUE in generate, chat, bench and tune. A property may change the text, even if
every best token stayed the same here. Without equal rows drafts may change the text too."""
UNCERTAIN = "~: too close to 1.00x, because passes vary too much. Try a quieter machine or more --seconds."


@click.command(short_help="Measure the cost of passes on this machine.")
@click.argument("pair", required=False, metavar="[PAIR]")
@device_options
@click.option("--seconds", type=float, default=60.0, show_default=True, help="Duration of the measurement in seconds.")
@click.option("--properties", is_flag=True, help="Compare OpenVINO properties of the target instead.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def tune(engine_flags: EngineFlags, seconds: float, properties: bool, as_json: bool) -> None:
    """Choose precision and groups for PAIR's target, measure costs, and cache both.

    PAIR is a folder or a known name. The choice takes a quarter of the time, or as long as opening
    PAIR with each candidate takes. Later openings of PAIR use the quickest precision or group size
    that keeps rows equal in passes of every width. The property must surely be quicker than the
    defaults. With --ov-config tune chooses nothing.

    Then tune times passes of the target and calls of any drafter. The first opening of a pair does
    the same in a few seconds. The result of tune is more exact and replaces it, as long as weights,
    machine and flags stay the same. Leave the machine idle meanwhile.

    With --properties flags for the drafter have no effect, and --gpu-layers is refused. All the time
    goes to the choice. A table lists properties of OpenVINO's CPU plugin that are worth a try.
    Columns show how many times as fast passes are, the part of a text's tokens with the same best
    token, and whether rows are equal.
    """
    from dovetail.runtime.drafter.model import ModelDrafter
    from dovetail.runtime.drafter.onnx import OnnxDrafter
    from dovetail.runtime.load import first_layers, open_draft_model, open_with_layers
    from dovetail.runtime.target.layers.choose import read_count
    from dovetail.runtime.target.openvino import OpenVINOTarget

    check_seconds(seconds)
    if properties and engine_flags.gpu_layers and read_count(engine_flags.gpu_layers) != 0:
        raise InputError(
            f"--properties compares properties of the CPU's plugin, without --gpu-layers {engine_flags.gpu_layers}: "
            "leave out one of them"
        )
    threads, ov_config, draft_model = engine_flags.threads, engine_flags.ov_config, engine_flags.draft_model
    if not (properties and ov_config):  # otherwise tune keeps nothing
        cached = cache_dir() / ("properties" if properties else "costs")
        with storing():  # before minutes are spent
            cached.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=cached).close()
    folder = resolve_pair(engine_flags.pair)
    manifest = read_sound(folder)

    read = manifest if draft_model is None else replace(manifest, drafter=None)  # a draft model reads no features
    open_target = partial(OpenVINOTarget.load, folder, read, threads=threads, exact=engine_flags.exact)

    def open_with(*more: Property) -> OpenVINOTarget:
        return open_target(ov_config={**ov_config, **{each.name: each.value for each in more}})

    def compared(tried: Sequence[Property], seconds: float) -> tuple[list[Compared], Chosen | None]:
        prompt = Tokenizer.from_folder(folder / TARGET).encode(PROMPT)
        with progress_bar() as progress:
            rows = compare(open_with(), open_with, prompt, tried, seconds=seconds, progress=progress)
        chosen = None if ov_config else choose(rows)
        if chosen:
            with storing():
                chosen.store(manifest, threads)
        return rows, chosen

    tried = candidates(ov_config, threads)
    if properties:
        rows, chosen = compared(tried, seconds)
        report = {"pair": manifest.name, "threads": threads, "ov_config": dict(ov_config)}
        show_properties({**report, "chosen": asdict(chosen) if chosen else None}, rows, as_json)
        return
    take, vram = first_layers(
        folder, read, engine_flags.gpu_layers, drafter_device=engine_flags.drafter_device, vram=engine_flags.vram,
        fit=engine_flags.fit, texts=1, threads=threads,
    )  # fmt: skip
    drafter: OnnxDrafter | ModelDrafter | None = None
    own: Manifest | None = None
    if draft_model is not None:
        tokenizer = Tokenizer.from_folder(folder / TARGET)
        own, drafter = open_draft_model(resolve_draft_model(draft_model), tokenizer, manifest, threads)
    elif manifest.drafter:
        drafter = open_drafter(
            folder, manifest, device=engine_flags.drafter_device, threads=threads, vram=vram,
            fit=engine_flags.fit,
        )  # fmt: skip
    begin = perf_counter()
    if not ov_config:
        compared([each for each in tried if each.name in CHOOSABLE], seconds * CHOICE)
    target = open_with_layers(
        partial(open_target, ov_config={**chosen_properties(manifest, threads), **ov_config}),
        take,
        wished=engine_flags.gpu_layers is not None,
    )
    left = max(begin + seconds - perf_counter(), seconds * (1 - CHOICE))
    key = partial(
        CostKey.of, manifest, drafter.device_key if drafter else None, threads, ov_config, engine_flags.exact, own
    )
    with progress_bar() as progress:
        time = partial(measure, target, drafter, contexts=CONTEXTS, widths=ALL_WIDTHS, seconds=left, progress=progress)
        measured = measured_alike(manifest.name, target, key, time, perf_counter() - begin)
    warn_of_rows(measured)
    with storing():
        measured.store()
    given = target_properties(manifest, threads, ov_config)
    if as_json:
        click.echo(json.dumps({**asdict(measured), "properties": given}, indent=2, ensure_ascii=False))
    else:
        show_costs(measured.pair, measured)
        click.echo(f"OpenVINO: {properties_line(given)}")
        click.echo(f"kept in {measured.key.file}")


@contextmanager
def storing() -> Iterator[None]:
    """Raise InputError if the body cannot write to the cache."""
    try:
        yield
    except OSError as err:
        raise InputError(f"{err.filename} cannot be written ({err.strerror}): set DOVETAIL_CACHE") from None


def show_properties(given: Mapping[str, Any], rows: Sequence[Compared], as_json: bool) -> None:
    """Print the table or the JSON object on stdout.

    given: pair, threads and ov_config of the base, and the choice, None without a choice.
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
    table.add_column("property", overflow="fold")  # fold instead of cutting: users copy the name into --ov-config
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
        click.echo(f"kept for later openings: {kept or 'the defaults, nothing is surely quicker'}")
    click.echo(APPLY)


def times(low: float, middle: float, high: float) -> str:
    """Return a speedup, with ~ if its interval includes 1."""
    return f"{'~' if low < 1 < high else ''}{middle:.2f}x"


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show a bar on stderr and yield the function that sets it."""
    from rich import progress as rich
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with rich.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("")
        yield lambda stage, done=0, total=0, *_: bar.update(task, description=stage, completed=done, total=total)
