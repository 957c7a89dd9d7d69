"""`dovetail-export check PAIR` and `dovetail-export check TARGET DRAFTER`."""

from __future__ import annotations

from pathlib import Path

import click

from dovetail.exporter.build.progress import show_progress
from dovetail.exporter.pairs.check import check_pair_folder
from dovetail.exporter.pairs.preflight import Fit, preflight
from dovetail.runtime.errors import InputError, MismatchError
from dovetail.runtime.system.files import shown


@click.command()
@click.argument("pair", metavar="PAIR|TARGET")
@click.argument("drafter", required=False, metavar="[DRAFTER]")
@click.option("--revision", help="Branch, tag or commit of DRAFTER, a Hub id.")
@click.option("--allow-pickle", is_flag=True, help="Read pickled weights of DRAFTER; no code in them is executed.")
def command(pair: str, drafter: str | None, revision: str | None, allow_pickle: bool) -> None:
    """Check PAIR: manifest, digests, both graphs, tokenizer, and a short run of each engine.

    With DRAFTER, a checkpoint's folder, GGUF file or Hub id, the command compares it with TARGET by
    configs, tokenizers and the headers of safetensors. Values of weights are not checked. TARGET is
    a pair, a Hugging Face folder, a GGUF file or a Hub id. The command fails if the drafter cannot
    work with the target.
    """
    if drafter is not None:
        findings = preflight(pair, drafter, revision=revision, allow_pickle=allow_pickle)
        width = max(len(finding.what) for finding in findings)
        for finding in findings:
            click.echo(f"{finding.fit:<8} {finding.what:<{width}}  {shown(finding.said)}")
        if refused := [finding for finding in findings if finding.fit is Fit.REFUSED]:
            names = ", ".join(finding.what for finding in refused)
            raise MismatchError(f"{drafter} is no drafter for {pair} ({names}): {refused[-1].remedy}")
        return
    if allow_pickle or revision:
        flag = "--allow-pickle" if allow_pickle else "--revision"
        raise InputError(f"{flag} is for a DRAFTER: name one, or leave the option out")
    with show_progress("check") as progress:
        manifest = check_pair_folder(Path(pair), progress)
    what = (manifest.drafter_kind or "a drafter") if manifest.drafter else "no drafter yet"
    click.echo(f"{pair}: fine ({manifest.name}; target {manifest.target.weight_format}; {what})")
