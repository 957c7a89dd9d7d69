"""Keys and values in 8 bits beside 16: memory, passes in turn by length of context, and a text read with each.

    python -m tests.bench.kv_bits PAIR > kv-bits.md

The text is this repository's prose and code, in windows of --window tokens, which are read as answers are.  Every
position counts, so that on average half a window of keys and values stands behind it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

import click
import numpy as np
from tests.bench.four_bits import CHUNK, FILES, scores, timed, windows

from dovetail.runtime.cli.main import fail
from dovetail.runtime.errors import DovetailError
from dovetail.runtime.pair.layout import TARGET
from dovetail.runtime.pair.manifest import read_manifest
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.target.paged import BLOCK
from dovetail.runtime.target.properties import KV_PRECISION
from dovetail.runtime.text.tokenizer import Tokenizer

NODES = (1, 8)
CONTEXTS = (128, 1024, 4096, 16384)


@click.command()
@click.argument("pair", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--group", type=click.IntRange(1), default=16, show_default=True, help="Numbers of a key with one scale.")
@click.option("--windows", "count", type=click.IntRange(1), default=2, show_default=True, help="Of each kind of text.")
@click.option("--window", type=click.IntRange(CHUNK), default=2048, show_default=True, help="Tokens.")
@click.option("--rounds", type=click.IntRange(1), default=11, show_default=True, help="Of passes.")
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
    found = {kv: scores(target, texts) for kv, target in targets.items()}
    reference = found["f16"]
    click.echo("| KV | bytes a token | " + " | ".join(f"{kind}: same best | perplexity" for kind in FILES) + " |")
    click.echo("|---|---:|" + "---:|---:|" * len(FILES))
    for kv, by_kind in found.items():
        cells = [kv, f"{targets[kv].model.block_bytes // BLOCK:,}"]
        for kind in FILES:
            score = by_kind[kind]
            same = np.mean(np.equal(score.best, reference[kind].best))
            cells += [f"{same:.1%}", f"{np.exp(np.mean(score.nll)):.3f}"]
        click.echo("| " + " | ".join(cells) + " |")
    click.echo("\n| context | nodes | " + " | ".join(f"{kv}, ms" for kv in kinds) + " |")
    click.echo("|---:|---:|" + "---:|" * len(kinds))
    for context in (each for each in contexts if each + max(NODES) <= manifest.target.max_context):
        times = [timed(targets, context, NODES, seed=seed) for seed in range(rounds)]
        for at, nodes in enumerate(NODES):
            medians = (f"{median(each[kv][at] for each in times):.1f}" for kv in kinds)
            click.echo("| " + " | ".join([f"{context:,}", str(nodes), *medians]) + " |")


def main() -> None:
    try:
        kv_bits()
    except DovetailError as err:
        sys.exit(fail(str(err), err.exit_code))


if __name__ == "__main__":
    main()
