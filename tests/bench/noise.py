"""How much of the sampler's noise a drafter should add: shares of it on sampled positions, by how sure the drafter is.

    python tests/bench/noise.py PAIR CHECKPOINT CORPUS.npz --temperature 1 --top-p 1

CORPUS has conversations of PAIR's target that CHECKPOINT did not learn from, as `train` leaves them in work/text.  At
each position of their answers the target draws its token again with several seeds.  A cell is the share of draws in
which the drafter's three best children have that token.  The last column is the share of the row that does best.
"""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray

from dovetail.exporter.drafter.export import load_drafter
from dovetail.exporter.target.embedding_rows import read_embedding_and_head
from dovetail.exporter.train.corpus import Corpus
from dovetail.exporter.train.features import FeatureStore, Part, read
from dovetail.models.drafter import DraftModel
from dovetail.runtime.pair.layout import TARGET, TARGET_GRAPH
from dovetail.runtime.pair.manifest import read_manifest
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.target.paged import PagedModel

SHARES = (0.0, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0)
SURE = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # edges of the rows: the probability of the drafter's best token
CHILDREN = 3
POSITIONS = 1000
DRAWS = 4


@torch.no_grad()
def logits_of(drafter: DraftModel, features: FeatureStore, corpus: Corpus) -> tuple[NDArray[np.float32], ...]:
    """Drafter's logits [n, K] and the target's last features [n, D] of the same answer positions."""
    drafted, last = [], []
    size = drafter.shape.feature_size
    for start, length, prompt in zip(corpus.offsets, corpus.lengths, corpus.prompt_lengths, strict=False):
        rows = torch.from_numpy(np.asarray(features[start : start + length], np.float32))
        tokens = torch.from_numpy(corpus.tokens[start : start + length])
        g = drafter(read(drafter, rows[None, :-1]), tokens[None, 1:])[0]
        drafted.append(drafter.logits(g[prompt - 1 : -1]).numpy())
        last.append(rows[prompt:-1, -size:].numpy())
    return np.concatenate(drafted), np.concatenate(last)


def hits(
    drafted: NDArray[np.float32], target: NDArray[np.float32], ids: NDArray[np.int64], sampling: SamplingParams
) -> NDArray[np.float64]:
    """Per position and share, how many of DRAWS tokens the best children have: [n, shares]."""
    found = np.zeros((len(drafted), len(SHARES)))
    for seed in range(DRAWS):
        sampler = Sampler(SamplingParams(temperature=sampling.temperature, top_p=sampling.top_p, seed=seed))
        for at, (ours, theirs) in enumerate(zip(drafted, target, strict=True)):
            token = sampler.pick(theirs, at, [])
            noise = sampling.temperature * sampler.noise(at)[ids]
            for column, share in enumerate(SHARES):
                scores = ours + share * noise
                found[at, column] += token in ids[np.argpartition(scores, -CHILDREN)[-CHILDREN:]]
    return found / DRAWS


def table(drafted: NDArray[np.float32], found: NDArray[np.float64]) -> str:
    """Rows by the drafter's surety, then all positions, and what the best share of each row gives together."""
    best = np.exp(drafted.max(1) - np.logaddexp.reduce(drafted, axis=1))
    lines = [
        "| drafter's best token | positions | " + " | ".join(f"{share:g}" for share in SHARES) + " | best |",
        "|---|---:|" + "---:|" * (len(SHARES) + 1),
    ]
    together = 0.0
    for low, high in pairwise(SURE):
        mine = (best > low) & (best <= high)
        if mine.any():
            means = found[mine].mean(0)
            together += mine.sum() * means.max()
            cells = " | ".join(f"{100 * mean:.1f}%" for mean in means)
            name = f"{100 * low:.0f} to {100 * high:.0f}%"
            lines.append(f"| {name} | {mine.sum()} | {cells} | {SHARES[int(means.argmax())]:g} |")
    cells = " | ".join(f"{100 * mean:.1f}%" for mean in found.mean(0))
    lines.append(f"| all | {len(best)} | {cells} | {100 * together / len(best):.1f}% with each row's best |")
    return "\n".join(lines)


@click.command()
@click.argument("pair", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("corpus", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--limit", type=click.IntRange(1), default=40, show_default=True, help="Of conversations.")
@click.option("--temperature", type=float, default=1.0, show_default=True)
@click.option("--top-p", type=float, default=1.0, show_default=True)
def main(pair: Path, checkpoint: Path, corpus: Path, limit: int, temperature: float, top_p: float) -> None:
    """Print the table."""
    sampling = SamplingParams(temperature=temperature, top_p=top_p)
    every = Corpus.load(corpus)
    some = every.select(np.arange(min(limit, len(every))))
    drafter = load_drafter(checkpoint, pair / TARGET)
    assert isinstance(drafter, DraftModel)
    layers = drafter.mix.layers if drafter.mix else ()
    size = read_manifest(pair).target.feature_size * (len(layers) + 1)
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(
            Path(folder),
            [Part("text", some)],
            size,
            lambda: PagedModel(pair / TARGET_GRAPH, layers=layers),
            float("inf"),
        )
        store.hold(0, lambda _: None)
        drafted, last = logits_of(drafter, store, some)
    chosen = np.random.default_rng(0).permutation(len(drafted))[:POSITIONS]
    head = read_embedding_and_head(pair / TARGET_GRAPH)[1]
    target = last[chosen] @ head.T
    click.echo(table(drafted[chosen], hits(drafted[chosen], target, drafter.d2t.numpy(), sampling)))


if __name__ == "__main__":
    main()
