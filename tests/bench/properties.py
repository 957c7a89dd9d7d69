"""What precision and quantisation groups of activations cost and spoil: passes in turn, and a text read with each.

    python tests/bench/properties.py PAIR CORPUS.npz --checkpoint FOLDER > properties.md

CORPUS is one of `dovetail-export train`, text that the target wrote.  Its tokens are read 256 at a time, and compared
with the checkpoint in float32, or without --checkpoint with the target's INT8 weights and nothing else quantised.
What OpenVINO refuses on this machine is told as refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median

import click
import numpy as np
from numpy.typing import NDArray

from dovetail.exporter.train.corpus import Corpus
from dovetail.runtime.errors import DeviceError, InputError
from dovetail.runtime.pair.manifest import read_manifest
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.target.paged import BLOCK, Batch

WINDOW = 256  # tokens that are read at a time
CONTEXT = 128  # tokens before a timed pass
NODES = (1, 2, 4, 8, 16, 32)
VARIANTS = [(precision, group) for precision in ("bf16", "f32") for group in (0, 32, 64, 128)]
REFERENCE = ("f32", 0)

Floats = NDArray[np.float64]
Reader = Callable[[NDArray[np.int64]], Floats]  # tokens [T] -> log-probabilities [T, V]


@dataclass
class Score:
    """Of each token read: nll: of the next one.  same: whether the best next one is the reference's.  kl: from it."""

    nll: list[float] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)

    def add(self, tokens: NDArray[np.int64], logprobs: Floats, reference: Floats) -> None:
        self.nll += (-logprobs[np.arange(len(tokens) - 1), tokens[1:]]).tolist()
        self.same += (logprobs.argmax(1) == reference.argmax(1)).tolist()
        self.kl += (np.exp(reference) * (reference - logprobs)).sum(1).tolist()

    def cells(self) -> list[str]:
        return [f"{np.exp(np.mean(self.nll)):.3f}", f"{np.mean(self.same):.1%}", f"{np.mean(self.kl):.4f}"]


@click.command()
@click.argument("pair", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("corpus", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True), help="Of the target, for transformers.")
@click.option("--windows", type=click.IntRange(1), default=24, show_default=True, help="Of 256 tokens of the corpus.")
@click.option("--samples", type=click.IntRange(0), default=20, show_default=True, help="Of every pass; 0 times none.")
def main(pair: Path, corpus: Path, checkpoint: Path | None, windows: int, samples: int) -> None:
    """Print a Markdown table."""
    tokens = Corpus.load(corpus).tokens
    if len(tokens) < WINDOW:
        raise InputError(f"{corpus} has {len(tokens)} tokens: give {WINDOW} or more")
    text = [tokens[begin : begin + WINDOW] for begin in range(0, len(tokens) - WINDOW + 1, WINDOW)][:windows]
    manifest = read_manifest(pair)
    targets, readers = dict[object, OpenVINOTarget](), dict[object, Reader]()
    for precision, group in VARIANTS:
        asked = {"INFERENCE_PRECISION_HINT": precision, "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group)}
        try:
            target = OpenVINOTarget.load(pair, manifest, ov_config=asked)
            read_text = reader(target)
            read_text(text[0])
        except DeviceError as error:
            click.echo(f"{precision}, groups of {group}: {error}", err=True)
        else:
            targets[precision, group], readers[precision, group] = target, read_text
    if not checkpoint and REFERENCE not in readers:
        raise DeviceError(f"OpenVINO refuses {REFERENCE[0]}, groups of {REFERENCE[1]}: compare with a --checkpoint")
    reference = checkpoint_reader(checkpoint) if checkpoint else readers[REFERENCE]
    scores = read(readers, reference, text)
    times = timed(targets, samples)
    heads = ("precision", "group", "perplexity", "same best token", "Kullback-Leibler", *map(str, NODES))
    click.echo("| " + " | ".join(heads) + " |\n|---" + "|---:" * (len(heads) - 1) + "|")
    for name in [None, *VARIANTS] if checkpoint else VARIANTS:
        first = [str(part) for part in name] if name else ["checkpoint", ""]
        passes = [f"{median(times[name, nodes]):.1f}" if (name, nodes) in times else "" for nodes in NODES]
        told = scores[name].cells() if name in scores else ["refused", "", ""]
        click.echo("| " + " | ".join([*first, *told, *passes]) + " |")


def read(readers: Mapping[object, Reader], reference: Reader, text: list[NDArray[np.int64]]) -> dict[object, Score]:
    """A Score for every reader, and for the reference under None."""
    scores = {name: Score() for name in (None, *readers)}
    for tokens in text:
        truth = reference(tokens)
        scores[None].add(tokens, truth, truth)
        for name, each in readers.items():
            scores[name].add(tokens, each(tokens), truth)
    return scores


def reader(target: OpenVINOTarget) -> Reader:
    """All of a window in one pass."""
    model = target.model
    model.reserve(WINDOW // BLOCK)

    def read(tokens: NDArray[np.int64]) -> Floats:
        every, none = np.arange(len(tokens)), np.array([0], np.int32)
        begins, blocks = np.array([0, len(tokens)], np.int32), np.arange(model.blocks, dtype=np.int32)
        begun = np.array([0, model.blocks], np.int32)
        return log_softmax(model.run(Batch(tokens, every, none, begins, blocks, begun, every))[0])

    return read


def checkpoint_reader(folder: Path) -> Reader:
    """The checkpoint in float32, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def read(tokens: NDArray[np.int64]) -> Floats:
        with torch.no_grad():
            return log_softmax(model(torch.from_numpy(tokens)[None]).logits[0].numpy())

    return read


def log_softmax(logits: NDArray[np.float32]) -> Floats:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def timed(targets: Mapping[object, OpenVINOTarget], samples: int) -> dict[tuple[object, int], list[float]]:
    """ms of passes by target and nodes, all in turn in shuffled order; of two in a row the second counts."""
    points, order = [(name, nodes) for name in targets for nodes in NODES], Random(0)
    times: dict[tuple[object, int], list[float]] = {}
    opened = {name: target.open() for name, target in targets.items()}
    for _ in range(samples):
        for name, nodes in order.sample(points, len(points)):
            target, seq, ms = targets[name], opened[name], 0.0
            for _ in range(2):
                target.pretend_length(seq, CONTEXT)
                ms = target.time_pass(seq, nodes)
            times.setdefault((name, nodes), []).append(ms)
    return times


if __name__ == "__main__":
    main()
