"""`dovetail-export check PAIR`."""

from __future__ import annotations

from pathlib import Path

import click

from dovetail.exporter.build.progress import show_progress
from dovetail.exporter.pairs.check import check_pair_folder


@click.command()
@click.argument("pair", type=click.Path(path_type=Path))
def command(pair: Path) -> None:
    """Check PAIR: manifest, digests, both graphs, tokenizer, and a short run of each engine."""
    with show_progress("check") as progress:
        manifest = check_pair_folder(pair, progress)
    what = (manifest.drafter_kind or "a drafter") if manifest.drafter else "no drafter yet"
    click.echo(f"{pair}: fine ({manifest.name}; target {manifest.target.weight_format}; {what})")
