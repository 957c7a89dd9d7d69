"""Keys and values in 8 bits beside 16: memory, passes in turn by length of context, and a text read with each.

    python -m tests.bench.kv_bits PAIR > kv-bits.md

The text is this repository's prose and code, in windows of --window tokens, which are read as answers are.  Every
position counts, so that on average half a window of keys and values stands behind it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random
from statistics import median

import click
import numpy as np
from tests.bench.four_bits import FILES, Score, Text, nll, windows

from dovetail.runtime.cli.main import fail
from dovetail.runtime.errors import DovetailError
from dovetail.runtime.pair.layout import TARGET
from dovetail.runtime.pair.manifest import read_manifest
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.target.paged import BLOCK, KV_PRECISION
from dovetail.runtime.text.tokenizer import Tokenizer
from dovetail.runtime.tree.draft_tree import DraftTree

NODES = (1, 8)
CONTEXTS = (128, 1024, 4096, 16384)
CHUNK = 64  # nodes of a pass that reads


@click.command()
@click.argument("pair", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--group", type=click.IntRange(1), default=16, show_default=True, help="Numbers of a key with one scale.")
@click.option("--windows", "count", type=click.IntRange(1), default=2, show_default=True, help="Of each kind of text.")
@click.option("--window", type=click.IntRange(CHUNK), default=2048, show_default=True, help="Tokens.")
@click.option("--rounds", type=click.IntRange(0), default=11, show_default=True, help="Of passes.")
@click.option("--context", "contexts", type=click.IntRange(1), multiple=True, default=CONTEXTS, show_default=True)
def kv_bits(pair: Path, group: int, count: int, window: int, rounds: int, contexts: tuple[int, ...]) -> None:
    """Print two Markdown tables, for contexts that PAIR has room for.

    The last row has keys in groups, instead of one scale for a head's whole key.
    """
    kinds: dict[str, dict[str, str]] = {
        "f16": {},
        "u8": {KV_PRECISION: "u8"},
        f"u8, keys in groups of {group}": {KV_PRECISION: "u8", "KEY_CACHE_GROUP_SIZE": str(group)},
    }
    manifest, tokenizer = read_manifest(pair), Tokenizer.from_folder(pair / TARGET)
    targets = {kv: OpenVINOTarget.load(pair, manifest, ov_config=given) for kv, given in kinds.items()}
    texts = [text for kind in FILES for text in windows(tokenizer, kind, window)[:count]]
    found = {kv: read(target, texts) for kv, target in targets.items()}
    reference = found["f16"]
    click.echo("| KV | bytes a token | " + " | ".join(f"{kind}: same best | perplexity" for kind in FILES) + " |")
    click.echo("|---|---:|" + "---:|---:|" * len(FILES))
    for kv, scores in found.items():
        cells = [kv, f"{targets[kv].model.block_bytes // BLOCK:,}"]
        for kind, score in scores.items():
            same = np.mean(np.equal(score.best, reference[kind].best))
            cells += [f"{same:.1%}", f"{np.exp(np.mean(score.nll)):.3f}"]
        click.echo("| " + " | ".join(cells) + " |")
    click.echo("\n| context | nodes | " + " | ".join(f"{kv}, ms" for kv in kinds) + " |")
    click.echo("|---:|---:|" + "---:|" * len(kinds))
    for context in (each for each in contexts if each + max(NODES) <= manifest.target.max_context):
        for nodes in NODES:
            times = (f"{median(each):.1f}" for each in timed(targets, context, nodes, rounds))
            click.echo("| " + " | ".join([f"{context:,}", str(nodes), *times]) + " |")


def read(target: OpenVINOTarget, texts: list[Text]) -> dict[str, Score]:
    """The score by kind of text, of chains of up to CHUNK nodes, each committed."""
    found = {kind: Score([], []) for kind in FILES}
    for text in texts:
        seq, score = target.open(), found[text.kind]
        ids, following = np.array(text.tokens[:-1]), np.array(text.tokens[1:])
        for at in range(0, len(ids), CHUNK):
            chain = DraftTree.chain(ids[at : at + CHUNK])
            logits = target.verify({seq: chain})[seq].logits
            score.best += logits.argmax(1).tolist()
            score.nll += nll(logits, following[at : at + CHUNK]).tolist()
            target.commit(seq, np.arange(len(chain)))
        target.close(seq)
    return found


def timed(targets: dict[str, OpenVINOTarget], context: int, nodes: int, rounds: int) -> list[list[float]]:
    """ms of `rounds` passes of each target, in shuffled turns, after one that does not count."""
    opened = {kv: target.open() for kv, target in targets.items()}
    times: dict[str, list[float]] = {kv: [] for kv in targets}
    for round_ in range(rounds + 1):
        for kv in Random(round_).sample([*targets], len(targets)):
            targets[kv].pretend_length(opened[kv], context)
            times[kv].append(targets[kv].time_pass(opened[kv], nodes))
    for kv, target in targets.items():
        target.close(opened[kv])
    return [each[1:] for each in times.values()]


def main() -> None:
    try:
        kv_bits()
    except DovetailError as err:
        sys.exit(fail(str(err), err.exit_code))


if __name__ == "__main__":
    main()
