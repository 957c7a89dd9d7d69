"""Fit what a drafter claims to what was seen: Platt scaling in logit space, and its reliability by bins.

Axes: n candidates, B bins.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.calibration import DepthCalibration, logit_of

# Finer where trees are decided: a path of five steps lives on candidates of a few per cent.
EDGES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PRIOR = 1.0  # weight of scale 1 and shift 0, so that a depth with few or one-sided candidates stays near them
NEWTON_STEPS = 50

Floats = NDArray[np.float64]


def fit_depth(logprobs: NDArray[np.floating], hits: NDArray[np.bool_]) -> DepthCalibration:
    """Calibrate one depth.  logprobs: [n] conditional on the path, hits: [n] whether it was the target's token."""
    z, seen = logit_of(logprobs), hits.astype(np.float64)
    scale, shift = platt(z, seen)
    if scale < 0:  # q tells less than nothing here: keep the base rate alone, not the reverse order
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
    """(scale, shift) that minimise the log loss of sigmoid(scale * z + shift), and a weak prior for (1, 0).

    z, seen: [n].  Damped Newton on a convex loss; the prior makes the minimum unique and finite.
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
    """counts, mean claim and observed frequency per bin of EDGES, each [B]; 0 where a bin is empty."""
    bins = np.clip(np.searchsorted(EDGES, q, side="right") - 1, 0, len(EDGES) - 2)
    counts, claimed, hit = (np.bincount(bins, weights, len(EDGES) - 1) for weights in (None, q, seen))
    return counts, claimed / np.maximum(counts, 1), hit / np.maximum(counts, 1)


def calibration_error(q: Floats, seen: Floats) -> float:
    """Expected calibration error: |mean claim - observed frequency|, averaged over bins by their candidates."""
    counts, claimed, observed = reliability(q, seen)
    return float(counts @ np.abs(claimed - observed) / max(int(counts.sum()), 1))


def sigmoid(x: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -x))
