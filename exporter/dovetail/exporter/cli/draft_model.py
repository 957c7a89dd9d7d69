"""`dovetail-export draft-model SOURCE`."""

from __future__ import annotations

import click
from click.core import ParameterSource

from dovetail.exporter.build.progress import show_progress
from dovetail.exporter.pairs.draft_model import (
    check_no_drafter,
    draft_model_folder,
    export_draft_model,
    is_exported,
    resolve_draft_source,
)
from dovetail.exporter.target.convert import WEIGHT_FORMATS
from dovetail.runtime.errors import InputError


@click.command("draft-model")
@click.argument("source")
@click.option("--revision", help="Branch, tag or commit of a Hub id.")
@click.option(
    "--weight-format",
    type=click.Choice(WEIGHT_FORMATS),
    default="int4",
    show_default=True,
    help="How its weights are stored.",
)
def command(source: str, revision: str | None, weight_format: str) -> None:
    """Export the model at SOURCE as a draft model into the cache, and print its folder.

    SOURCE is a Hub id, a Hugging Face folder, a GGUF file, or an OpenVINO IR folder. The export
    happens once: the same files have the same folder. `dovetail-run --draft-model SOURCE` calls
    this command by itself. INT4 makes a draft's passes short, and drafts change no text.
    """
    found = resolve_draft_source(source, revision)
    chosen = click.get_current_context().get_parameter_source("weight_format") is not ParameterSource.DEFAULT
    if chosen and found.kind == "ir":
        raise InputError(
            f"--weight-format cannot change {source}, an OpenVINO IR, which keeps its weights: leave it out"
        )
    folder = draft_model_folder(found, weight_format)
    if not is_exported(folder):
        check_no_drafter(source, revision, found.path)
        click.echo(f"Exporting the draft model {source} to {folder}. This happens once.", err=True)
        with show_progress("draft model") as progress:
            export_draft_model(found, folder, weight_format, progress)
    click.echo(folder)
