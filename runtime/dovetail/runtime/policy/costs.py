"""The cost table: the times of passes and calls on this machine, by rows and context.

Axes: C context lengths, R row counts, both ascending. Times are milliseconds. A pass never gets
cheaper with more rows or more context. Isotonic regression (pool adjacent violators) changes the
measured medians accordingly, first along rows, then along contexts. The second regression keeps the
order of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.errors import InputError

Floats = NDArray[np.float64]

CONTEXT_STEP = 64  # tokens of context that share one prediction


@dataclass(frozen=True)
class Curve:
    """The milliseconds of a pass."""

    contexts: tuple[int, ...]  # [C] tokens before the pass
    rows: tuple[int, ...]  # [R] new tokens or nodes in the pass, from 1
    ms: tuple[tuple[float, ...], ...]  # [C][R], rising along both axes

    def __post_init__(self) -> None:
        for name, values, least in (("contexts", self.contexts, 0), ("rows", self.rows, 1)):
            if not values or not all(low < high for low, high in pairwise((least - 1, *values))):
                raise InputError(f"curve {name} {list(values)} are out of order: give them ascending, from {least}")
        if [len(line) for line in self.ms] != [len(self.rows)] * len(self.contexts):
            raise InputError(f"curve of {len(self.contexts)} x {len(self.rows)} points has other times: measure again")
        if not all(isfinite(value) and value > 0 for line in self.ms for value in line):
            raise InputError("curve times must be above 0 and finite: measure again")

    @classmethod
    def fit(cls, contexts: Sequence[int], rows: Sequence[int], ms: NDArray[np.floating[Any]]) -> Curve:
        """Return the curve nearest to the measured `ms` [C, R] that never falls."""
        along_rows = np.array([isotonic(line) for line in ms])
        rising = np.array([isotonic(column) for column in along_rows.T]).T
        return cls(tuple(contexts), tuple(rows), tuple(tuple(map(float, line)) for line in rising))

    def at(self, context: int, rows: int) -> float:
        """Return the predicted ms of `rows` rows after about `context` tokens. 0 rows are free.

        Between the points it is linear, before the first constant. After the last it keeps the last
        slope.
        """
        if not rows:
            return 0.0
        step = context // CONTEXT_STEP
        known = self._known.get((step, rows))
        if known is None:
            line = [_line(self.contexts, column, step * CONTEXT_STEP) for column in zip(*self.ms, strict=True)]
            known = self._known[step, rows] = _line(self.rows, line, rows)
        return known

    @cached_property
    def _known(self) -> dict[tuple[int, int], float]:
        """The predictions so far: (context step, rows) -> ms."""
        return {}


@dataclass(frozen=True)
class Costs:
    """The measured times of one machine."""

    target: Curve  # verification of a chain, by nodes; 1 is plain decoding
    draft: Curve | None  # one call of the drafter, by rows; None without a drafter
    switch_ms: float = 0.0  # a pass takes longer after one of another width: OpenVINO prepares its kernels again

    def __post_init__(self) -> None:
        if not (isfinite(self.switch_ms) and self.switch_ms >= 0):
            raise InputError(f"switch_ms {self.switch_ms} is out of range: measure again")

    def call_ms(self, context: int, rows: int) -> float:
        """Return the ms of a call of the drafter; 0 without a drafter."""
        return self.draft.at(context, rows) if self.draft else 0.0

    def read_ms(self, context: int, pairs: int) -> float:
        """Return the ms in which the drafter reads new context pairs, in calls of at most the measured rows."""
        if not self.draft:
            return 0.0
        calls, rest = divmod(pairs, self.draft.rows[-1])
        return calls * self.draft.at(context, self.draft.rows[-1]) + self.draft.at(context, rest)


def isotonic(values: Sequence[float] | Floats) -> Floats:
    """Return the rising sequence nearest to `values` in squares, by pool adjacent violators."""
    pools: list[tuple[float, int]] = []  # mean, count
    for value in values:
        mean, count = float(value), 1
        while pools and pools[-1][0] > mean:
            before, many = pools.pop()
            mean, count = (before * many + mean * count) / (many + count), many + count
        pools.append((mean, count))
    return np.array([mean for mean, count in pools for _ in range(count)])


def _line(at: Sequence[int], values: Sequence[float], wanted: int) -> float:
    """Return `values` at points `at`, interpolated at `wanted` as `Curve.at` says."""
    if wanted > at[-1] and len(at) > 1:
        return values[-1] + (wanted - at[-1]) * (values[-1] - values[-2]) / (at[-1] - at[-2])
    return float(np.interp(wanted, at, values))
