"""Held-out quality of a drafter before any engine runs it.

Axes: T positions of one conversation, D feature size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dovetail.models import Drafter

from .corpus import Corpus


@dataclass(frozen=True)
class HeldOut:
    """acceptance_length: mean tokens per verification of a chain of `depth`, bonus token included.

    accepted_per_position: how often the i-th drafted token was kept.  positions: where chains were started.
    """

    acceptance_length: float
    accepted_per_position: tuple[float, ...]
    positions: int


@torch.no_grad()
def chain_acceptance(
    drafter: Drafter, corpus: Corpus, features: NDArray[np.float16], depth: int = 6, window: int = 512
) -> HeldOut:
    """Start a greedy chain at every answer position and count how much the target's own text confirms."""
    kept = np.zeros(depth)
    positions = 0
    device = drafter.head.device
    offsets = corpus.offsets
    for i in range(len(corpus)):
        tokens = corpus.tokens[offsets[i] : offsets[i + 1]][: window + 1]
        first = int(corpus.prompt_lengths[i]) - 1
        if len(tokens) - first <= depth + 1:
            continue
        rows = torch.from_numpy(np.asarray(features[offsets[i] : offsets[i] + len(tokens) - 1], np.float32))
        matches = _matches(drafter, rows.to(device)[None], torch.from_numpy(tokens).to(device), depth)
        # A chain started at t checks step j at position t + j, against token x[t + j + 2].
        starts = np.arange(first, len(tokens) - 1 - depth)
        alive = np.ones(len(starts), bool)
        for j in range(depth):
            alive &= matches[j, starts + j]
            kept[j] += alive.sum()
        positions += len(starts)
    rates = kept / max(1, positions)
    return HeldOut(1.0 + float(rates.sum()), tuple(round(float(r), 4) for r in rates), positions)


def _matches(drafter: Drafter, features: torch.Tensor, tokens: torch.Tensor, depth: int) -> NDArray[np.bool_]:
    """[depth, T-1]: whether step j's top token at position t is x[t+2].  features: [1, T-1, D], tokens: [T]."""
    caches: list[Any] = [[] for _ in drafter.layers]
    out = np.zeros((depth, len(tokens) - 1), bool)
    g = features
    for j in range(depth):
        g = drafter.step(g if j == 0 else torch.nn.functional.pad(g, (0, 0, 1, 0))[:, :-1], tokens[None, 1:], caches)
        top = drafter.d2t[drafter.logits(g[0]).argmax(-1)]
        out[j, :-1] = (top[:-1] == tokens[2:]).cpu().numpy()
    return out
