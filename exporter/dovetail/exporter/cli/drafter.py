"""`dovetail-export drafter PAIR --checkpoint DIR|HUB_ID|GGUF`."""

from __future__ import annotations

from pathlib import Path

import click

from dovetail.exporter.build.progress import show_progress
from dovetail.exporter.drafter.sources import resolve_checkpoint
from dovetail.exporter.pairs.pair import add_drafter
from dovetail.exporter.pairs.reference import REFERENCE_PAIRS, shipped_drafter
from dovetail.runtime.drafter.vram import check_limit, parse_size


@click.command()
@click.argument("pair", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    required=True,
    metavar="DIR|HUB_ID|GGUF|NAME",
    help="Folder, Hub id or GGUF file of a trained drafter, folder or Hub id of a small language model that has the "
    "target's tokenizer, or a shipped drafter: " + ", ".join(sorted(REFERENCE_PAIRS)) + ".",
)
@click.option("--revision", help="Branch, tag or commit of a Hub id.")
@click.option("--allow-pickle", is_flag=True, help="Read pickled weights too; no code in them is executed.")
@click.option("--vram", metavar="SIZE", help="GPU memory that the drafter may take, e.g. 3GB.  [default: no limit]")
@click.option("--fit", is_flag=True, help="Shrink the drafter's context, then its draft vocabulary, to fit --vram.")
@click.option("--force", is_flag=True, help="Replace another drafter of the pair.")
def command(
    pair: Path, checkpoint: str, revision: str | None, allow_pickle: bool, vram: str | None, fit: bool, force: bool
) -> None:
    """Add the drafter at --checkpoint to PAIR, the folder of an exported target.

    The command writes a float16 graph for CUDA and an INT8 graph for the CPU, and compares both
    with the torch module. It replaces the pair at the end: an interruption leaves PAIR unchanged.
    """
    limit = parse_size(vram) if vram is not None else 0
    check_limit(limit or None, fit, "cuda")
    with show_progress(pair.name) as progress:

        def find() -> Path:
            if checkpoint in REFERENCE_PAIRS and not Path(checkpoint).is_dir() and not revision:
                return shipped_drafter(REFERENCE_PAIRS[checkpoint])
            progress(f"looking at {checkpoint}")
            return resolve_checkpoint(checkpoint, revision, allow_pickle)

        manifest = add_drafter(
            find, pair, vram=limit, fit=fit, force=force, allow_pickle=allow_pickle, progress=progress
        )
    facts, kind = manifest.needed_drafter, manifest.drafter_kind or "drafter"
    click.echo(f"{pair}: {kind}, {facts.blocks} block(s), draft vocabulary {facts.draft_vocab_size}")
    for setting in manifest.provenance["drafter"].get("settings", ()):
        click.echo(f"setting: {setting}")
