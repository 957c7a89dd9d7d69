"""Measures a drafter on held-out text: its acceptance length, and the calibration of its q.

Axes: T positions of one conversation, D feature size, n positions of one depth, k candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dovetail.exporter.train.corpus import Corpus
from dovetail.exporter.train.features import read
from dovetail.models.drafter import DraftModel
from dovetail.runtime.policy.calibration import Calibration, DepthCalibration, logit_of

CANDIDATES = 10  # k: children that an exported graph returns per row


class FeatureRows(Protocol):
    """Features [total, D] of a corpus, by slices of a conversation: an array or a FeatureStore."""

    def __getitem__(self, rows: slice, /) -> NDArray[np.float16]: ...


@dataclass(frozen=True)
class HeldOut:
    """acceptance_length: mean tokens per verified chain of `depth`, bonus token included.

    accepted_per_position: share of chains that keep the i-th drafted token.
    positions: number of chains.
    calibration: per depth, a fit from the candidates' probabilities to observed frequencies.
    """

    acceptance_length: float
    accepted_per_position: tuple[float, ...]
    positions: int
    calibration: Calibration


@dataclass(frozen=True)
class Candidates:
    """The drafter's k best tokens at one depth, after paths of the target's own text, best first.

    logprobs: [n, k] float32, given the path. hits: [n, k] bool, equal to the target's token.
    """

    logprobs: NDArray[np.float32]
    hits: NDArray[np.bool_]


@torch.no_grad()
def evaluate(drafter: DraftModel, corpus: Corpus, features: FeatureRows, depth: int = 6, window: int = 512) -> HeldOut:
    """Draft at every answer position at once and compare the drafts with the target's own text.

    A greedy chain starts at each position that `depth` tokens follow. features: row i belongs to
    corpus.tokens[i].
    """
    k = min(CANDIDATES, drafter.shape.draft_vocab_size)
    found = [[Candidates(np.zeros((0, k), np.float32), np.zeros((0, k), bool))] for _ in range(depth)]
    kept, positions = np.zeros(depth), 0
    device = drafter.head.device
    offsets = corpus.offsets
    for i in range(len(corpus)):
        tokens = corpus.tokens[offsets[i] : offsets[i + 1]][: window + 1]
        first = int(corpus.prompt_lengths[i]) - 1
        if len(tokens) - first < 3:  # the text is too short for one candidate
            continue
        rows = torch.from_numpy(np.asarray(features[offsets[i] : offsets[i] + len(tokens) - 1], np.float32))
        steps = candidates(drafter, rows.to(device)[None], torch.from_numpy(tokens).to(device), first, depth, k)
        alive = np.ones(max(0, len(tokens) - 1 - depth - first), bool)  # chains without a rejected token
        positions += len(alive)
        for j, step in enumerate(steps):
            found[j].append(step)
            alive &= step.hits[: len(alive), 0]
            kept[j] += alive.sum()
    rates = kept / max(1, positions)
    accepted = tuple(round(float(rate), 4) for rate in rates)
    fits = []
    for parts in found:
        logprobs = np.concatenate([part.logprobs.ravel() for part in parts])
        fits.append(fit_depth(logprobs, np.concatenate([part.hits.ravel() for part in parts])))
    return HeldOut(1.0 + float(rates.sum()), accepted, positions, Calibration(k, tuple(fits)))


def candidates(
    drafter: DraftModel, features: torch.Tensor, tokens: torch.Tensor, first: int, depth: int, k: int
) -> Iterator[Candidates]:
    """Yield, for each step j, the candidates at positions t >= first + j with a known x[t+2].

    features: [1, T-1, D], tokens: [T]. Row i of every step belongs to the chain that starts at
    first + i.
    """
    caches: list[Any] = [[] for _ in drafter.blocks()]
    g = read(drafter, features)
    for j in range(depth):
        g = drafter.step(g if j == 0 else torch.nn.functional.pad(g, (0, 0, 1, 0))[:, :-1], tokens[None, 1:], caches)
        best = torch.log_softmax(drafter.logits(g[0, first + j : -1]).float(), dim=-1).topk(k)
        hits = drafter.d2t[best.indices] == tokens[first + j + 2 :, None]
        yield Candidates(best.values.cpu().numpy(), hits.cpu().numpy())


# --- calibration: Platt scaling in logit space. Axes: n candidates, B bins.

# The bins are finer at a few per cent, because candidates of deep paths have such probabilities.
EDGES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PRIOR = 1.0  # weight of scale 1 and shift 0: a depth with few or one-sided candidates stays near these values
NEWTON_STEPS = 50

Floats = NDArray[np.float64]


def fit_depth(logprobs: NDArray[np.floating], hits: NDArray[np.bool_]) -> DepthCalibration:
    """Calibrate one depth. logprobs: [n], given the path. hits: [n], as in Candidates."""
    z, seen = logit_of(logprobs), hits.astype(np.float64)
    scale, shift = platt(z, seen)
    if scale < 0:  # q is worse than chance: use the base rate alone, and never reverse the order
        scale, shift = 0.0, platt(np.zeros_like(z), seen)[1]
    q = np.exp(np.asarray(logprobs, np.float64))
    counts, mean_q, observed = reliability(q, seen)
    return DepthCalibration(
        scale=scale,
        shift=shift,
        candidates=len(z),
        error_before=round(calibration_error(q, seen), 6),
        error_after=round(calibration_error(sigmoid(scale * z + shift), seen), 6),
        edges=EDGES,
        counts=tuple(int(count) for count in counts),
        mean_q=tuple(round(float(value), 6) for value in mean_q),
        observed=tuple(round(float(value), 6) for value in observed),
    )


def platt(z: Floats, seen: Floats) -> tuple[float, float]:
    """(scale, shift) with the least log loss of sigmoid(scale * z + shift), with a prior at (1, 0).

    z, seen: [n]. Damped Newton on a convex loss; the prior makes the minimum unique and finite.
    """
    start = np.array([1.0, 0.0])

    def loss(at: Floats) -> float:
        logits = at[0] * z + at[1]
        return float(np.logaddexp(0.0, logits).sum() - seen @ logits + PRIOR / 2 * ((at - start) ** 2).sum())

    best, value = start, loss(start)
    for _ in range(NEWTON_STEPS):
        p = sigmoid(best[0] * z + best[1])
        off, weight = p - seen, p * (1 - p)
        gradient = np.array([off @ z, off.sum()]) + PRIOR * (best - start)
        cross = weight @ z
        hessian = np.array([[weight @ (z * z), cross], [cross, weight.sum()]]) + PRIOR * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        while (found := loss(best - step)) > value and np.abs(step).max() > 1e-9:
            step = step / 2
        if found >= value:
            break
        best, value = best - step, found
    return float(best[0]), float(best[1])


def reliability(q: Floats, seen: Floats) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Counts, mean q and observed frequency per bin of EDGES, each [B]; 0 for an empty bin."""
    bins = np.clip(np.searchsorted(EDGES, q, side="right") - 1, 0, len(EDGES) - 2)
    counts, claimed, hit = (np.bincount(bins, weights, len(EDGES) - 1) for weights in (None, q, seen))
    return counts, claimed / np.maximum(counts, 1), hit / np.maximum(counts, 1)


def calibration_error(q: Floats, seen: Floats) -> float:
    """Expected calibration error: |mean q - observed frequency|, averaged over candidates."""
    counts, claimed, observed = reliability(q, seen)
    return float(counts @ np.abs(claimed - observed) / max(int(counts.sum()), 1))


def sigmoid(x: Floats) -> Floats:
    """Return 1 / (1 + exp(-x)) without overflow."""
    return np.exp(-np.logaddexp(0.0, -x))
