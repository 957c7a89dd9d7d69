"""`dovetail-export target SOURCE OUT`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from dovetail.exporter.build.progress import show_progress
from dovetail.exporter.target.convert import WEIGHT_FORMATS, WeightOptions
from dovetail.exporter.target.export import TargetOptions, export_target
from dovetail.runtime.pair.layout import TARGET
from dovetail.runtime.text.tokenizer import Tokenizer


@click.command()
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--name", help="Name of the pair in its manifest  [default: OUT's name].")
@click.option("--revision", help="Branch, tag or commit of a Hub id.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Folder or GGUF file to take the tokenizer from.")
@click.option("--max-context", type=int, help="Tokens of context, if config.json does not say.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the checkpoint.")
@click.option("--allow-pickle", is_flag=True, help="Take pytorch_model*.bin where there are no safetensors.")
# The weight flags of `optimum-cli export openvino`; each flag means the same here.
@click.option(
    "--weight-format", type=click.Choice(WEIGHT_FORMATS), default="int8", show_default=True,
    help="How the weights are stored.",
)  # fmt: skip
@click.option("--sym", is_flag=True, default=None, help="Symmetric quantisation.")
@click.option("--group-size", type=int, help="Weights per scale in 4-bit formats; -1: a scale per column.")
@click.option(
    "--group-size-fallback", type=click.Choice(["error", "ignore", "adjust"]),
    help="What to do with layers that --group-size does not divide: fail (the default), leave them out, or take "
    "another size.",
)  # fmt: skip
@click.option("--ratio", type=click.FloatRange(0, 1), help="Share of layers in 4 bits; the others are int8.")
@click.option("--all-layers", is_flag=True, default=None, help="Embedding and head in 4 bits too.")
@click.option(
    "--backup-precision", type=click.Choice(["none", "int8_sym", "int8_asym"]),
    help="Format of layers that --ratio leaves out of 4 bits; none: floats.",
)  # fmt: skip
@click.option("--awq", is_flag=True, default=None, help="Activation-aware 4-bit weights.")
@click.option("--scale-estimation", is_flag=True, default=None, help="Choose scales by outputs; needs --dataset.")
@click.option("--gptq", is_flag=True, default=None, help="GPTQ: choose weights by the outputs of layers.")
@click.option("--lora-correction", is_flag=True, default=None, help="Add low-rank adapters; passes take longer.")
@click.option("--sensitivity-metric", help="How nncf chooses the layers for 4 bits.")
@click.option("--dataset", help="Data for data-aware compression, e.g. wikitext2 or auto.")
@click.option("--num-samples", type=int, help="Samples to take from the dataset.")
@click.option("--resume", is_flag=True, help="Continue after an interruption and skip the finished stages.")
@click.option("--force", is_flag=True, help="Replace a finished pair at OUT.")
@click.option("-v", "--verbose", is_flag=True, help="Show what optimum, nncf and transformers print.")
def command(
    source: str, out: Path, name: str | None, revision: str | None, resume: bool, force: bool, **given: Any
) -> None:
    """Export the target LLM at SOURCE into the pair folder OUT.

    SOURCE is a Hub id, a Hugging Face folder, a GGUF file, or an OpenVINO IR folder. An IR folder
    keeps its weight format, and its export needs no torch.
    """
    weights = WeightOptions(**{field.name: given.pop(field.name) for field in fields(WeightOptions)})
    options = TargetOptions(weights, **given)
    folder = out.absolute()  # now: the export may replace the working folder
    with show_progress("target") as progress:
        manifest = export_target(
            source, out, name=name, revision=revision, options=options, resume=resume, force=force, progress=progress
        )
    facts = manifest.target
    click.echo(
        f"{out}: {facts.model_type}, {facts.num_layers} layers, {facts.weight_format}, "
        f"vocabulary {facts.vocab_size}, context {facts.max_context}, tap {facts.taps[0]}"
    )
    if not Tokenizer.from_folder(folder / TARGET).has_chat_template:
        click.echo(
            f"note: {out} has no chat template, so the model continues texts and cannot chat: "
            "give --tokenizer FOLDER with a tokenizer that has a chat template",
            err=True,
        )
