"""Held-out quality of a drafter before any engine runs it: what it would have accepted, and whether its q are true.

Axes: T positions of one conversation, D size of what is read of the target, n positions of one depth, k candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dovetail.models import Drafter
from dovetail.runtime.calibration import Calibration

from .calibrate import fit_depth
from .corpus import Corpus

CANDIDATES = 10  # k: children that an exported graph returns per row


class Rows(Protocol):
    """Features [total, D] of a corpus, a conversation's at a time: an array, or a FeatureStore."""

    def __getitem__(self, rows: slice, /) -> NDArray[np.float16]: ...


@dataclass(frozen=True)
class HeldOut:
    """acceptance_length: mean tokens per verification of a chain of `depth`, bonus token included.

    accepted_per_position: how often the i-th drafted token was kept.  positions: where chains were started.
    calibration: per depth, what the candidates' probabilities were worth.
    """

    acceptance_length: float
    accepted_per_position: tuple[float, ...]
    positions: int
    calibration: Calibration


@dataclass(frozen=True)
class Candidates:
    """The drafter's best tokens at the positions of one depth whose path is the target's own text.

    logprobs: [n, k] float32, best first, given the path.  hits: [n, k] bool, whether it is the target's token.
    """

    logprobs: NDArray[np.float32]
    hits: NDArray[np.bool_]


@torch.no_grad()
def evaluate(drafter: Drafter, corpus: Corpus, features: Rows, depth: int = 6, window: int = 512) -> HeldOut:
    """Draft at every answer position at once and compare with the target's own text.

    A greedy chain starts wherever `depth` tokens follow; candidates count at every answer position.
    features: row i belongs to corpus.tokens[i].
    """
    k = min(CANDIDATES, drafter.config.draft_vocab_size)
    found = [[Candidates(np.zeros((0, k), np.float32), np.zeros((0, k), bool))] for _ in range(depth)]
    kept, positions = np.zeros(depth), 0
    device = drafter.head.device
    offsets = corpus.offsets
    for i in range(len(corpus)):
        tokens = corpus.tokens[offsets[i] : offsets[i + 1]][: window + 1]
        first = int(corpus.prompt_lengths[i]) - 1
        if len(tokens) - first < 3:  # no drafted token's successor is known
            continue
        rows = torch.from_numpy(np.asarray(features[offsets[i] : offsets[i] + len(tokens) - 1], np.float32))
        steps = candidates(drafter, rows.to(device)[None], torch.from_numpy(tokens).to(device), first, depth, k)
        alive = np.ones(max(0, len(tokens) - 1 - depth - first), bool)  # chains, by their start
        positions += len(alive)
        for j, step in enumerate(steps):
            found[j].append(step)
            alive &= step.hits[: len(alive), 0]
            kept[j] += alive.sum()
    rates = kept / max(1, positions)
    accepted = tuple(round(float(rate), 4) for rate in rates)
    return HeldOut(1.0 + float(rates.sum()), accepted, positions, calibrate(found))


def calibrate(found: list[list[Candidates]]) -> Calibration:
    """Fit every depth on its candidates, gathered conversation by conversation."""
    fits = []
    for parts in found:
        logprobs = np.concatenate([part.logprobs.ravel() for part in parts])
        fits.append(fit_depth(logprobs, np.concatenate([part.hits.ravel() for part in parts])))
    return Calibration(found[0][0].hits.shape[1], tuple(fits))


def candidates(
    drafter: Drafter, features: torch.Tensor, tokens: torch.Tensor, first: int, depth: int, k: int
) -> Iterator[Candidates]:
    """For each step j: the candidates at positions first + j.. whose next token x[t+2] is known.

    features: [1, T-1, D], tokens: [T].  Row i of every step belongs to the chain that starts at first + i.
    """
    caches: list[Any] = [[] for _ in drafter.layers]
    g = drafter.read(features)
    for j in range(depth):
        g = drafter.step(g if j == 0 else torch.nn.functional.pad(g, (0, 0, 1, 0))[:, :-1], tokens[None, 1:], caches)
        best = torch.log_softmax(drafter.logits(g[0, first + j : -1]).float(), dim=-1).topk(k)
        hits = drafter.d2t[best.indices] == tokens[first + j + 2 :, None]
        yield Candidates(best.values.cpu().numpy(), hits.cpu().numpy())
