"""`dovetail-export environment`: a virtual environment with another release of transformers."""

from __future__ import annotations

from pathlib import Path

import click

from dovetail.exporter.build.progress import show_progress
from dovetail.exporter.pairs.environment import make_environment


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--for", "architecture", required=True, help="The model_type of the model's config.json, e.g. exaone4.")
def command(folder: Path, architecture: str) -> None:
    """Make a virtual environment at FOLDER with the transformers that an architecture needs.

    optimum-cli in FOLDER converts a checkpoint to an IR, and `dovetail-export target` takes the IR.
    The environment needs about 2 GB of disk.
    """
    with show_progress("environment") as progress:
        version = make_environment(folder, architecture, progress)
    click.echo(
        f"{folder}: transformers {version}. Convert the model there, then export the result:\n"
        f"  {folder / 'bin' / 'optimum-cli'} export openvino -m MODEL --task text-generation-with-past "
        "--weight-format int8 IR\n"
        "  dovetail-export target IR PAIR"
    )
