"""`dovetail-export pull REPO_ID PAIR`."""

from __future__ import annotations

from pathlib import Path

import click

from dovetail.exporter.build.progress import show_progress
from dovetail.exporter.pairs.pull import pull_pair
from dovetail.runtime.system.files import shown


@click.command()
@click.argument("repo_id")
@click.argument("pair", type=click.Path(path_type=Path))
@click.option("--revision", help="Branch, tag or commit.  [default: main]")
@click.option("--force", is_flag=True, help="Replace a finished pair at PAIR.")
def command(repo_id: str, pair: Path, revision: str | None, force: bool) -> None:
    """Pull the pair REPO_ID from the Hugging Face Hub into the folder PAIR.

    The command downloads the files of the manifest and checks the digest of each. PAIR appears only
    when it is whole. Repeat the command to continue after an interruption.
    """
    with show_progress("pull") as progress:
        manifest = pull_pair(repo_id, pair, revision=revision, force=force, progress=progress)
    drafter = (manifest.drafter_kind or "a drafter") if manifest.drafter else "no drafter"
    click.echo(f"{pair}: {shown(manifest.name)}, target {manifest.target.weight_format}, {drafter}")
