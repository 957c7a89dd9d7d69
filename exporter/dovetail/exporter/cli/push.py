"""`dovetail-export push PAIR REPO_ID`."""

from __future__ import annotations

from pathlib import Path

import click

from dovetail.exporter.build.progress import show_progress
from dovetail.exporter.pairs.push import push_pair


@click.command()
@click.argument("pair", type=click.Path(path_type=Path))
@click.argument("repo_id")
@click.option("--private", is_flag=True, help="Make the repository private. A public one is refused.")
@click.option("--revision", metavar="BRANCH", help="Branch to push to; made if it does not exist.  [default: main]")
def command(pair: Path, repo_id: str, private: bool, revision: str | None) -> None:
    """Push PAIR to the Hugging Face Hub as REPO_ID, with a model card.

    The command checks the pair, makes the repository if it does not exist, and uploads the files of
    the manifest, the manifest and README.md in one commit. Other files of the folder stay here. Set
    HF_TOKEN to a token that may write.
    """
    with show_progress("push") as progress:
        pushed = push_pair(pair, repo_id, private=private, revision=revision, progress=progress)
    click.echo(f"{pushed.url}: {pushed.files} files in commit {pushed.commit}")
    if not pushed.card:
        click.echo(f"note: {repo_id} has a README.md of its own, which stays", err=True)
