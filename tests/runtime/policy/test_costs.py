"""Curves rise along both axes whatever was measured, predict between and beyond their points, and survive JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.runtime.errors import InputError, ManifestError
from dovetail.runtime.pair.manifest import parse_record
from dovetail.runtime.policy.costs import CONTEXT_STEP, Costs, Curve, isotonic

CONTEXTS, ROWS = (128, 1024), (1, 2, 8)
CURVE = Curve(CONTEXTS, ROWS, ((10.0, 12.0, 24.0), (20.0, 22.0, 46.0)))


def test_a_backlog_is_read_in_calls_of_the_measured_rows() -> None:
    costs = Costs(CURVE, CURVE)
    assert costs.read_ms(128, 5) == costs.call_ms(128, 5) and costs.read_ms(128, 0) == 0.0
    assert costs.read_ms(128, 8) == 24.0 and costs.read_ms(128, 26) == 3 * 24.0 + 12.0
    assert Costs(CURVE, None).read_ms(128, 26) == 0.0


def nearest_rising(values: list[float]) -> np.ndarray:
    """Brute force: of all ways to cut `values` into runs of one value each, rising, the nearest in squares."""
    count, best, found = len(values), np.inf, np.zeros(0)
    for cuts in (cuts for k in range(count) for cuts in combinations(range(1, count), k)):
        runs = np.split(np.array(values), cuts)
        means = [run.mean() for run in runs]
        if all(low <= high for low, high in pairwise(means)):
            line = np.concatenate([np.full(len(run), mean) for run, mean in zip(runs, means, strict=True)])
            error = float(((line - values) ** 2).sum())
            if error < best:
                best, found = error, line
    return found


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.integers(1, 60).map(float), min_size=1, max_size=9))
def test_isotonic_is_the_nearest_rising_sequence(values: list[float]) -> None:
    np.testing.assert_allclose(isotonic(values), nearest_rising(values), atol=1e-9)


@pytest.mark.parametrize(
    ("values", "rising"),
    [
        ([1, 2, 3], [1, 2, 3]),
        ([3, 2, 1], [2, 2, 2]),
        ([1, 4, 2, 5], [1, 3, 3, 5]),
        ([4, 1, 1, 9, 8], [2, 2, 2, 8.5, 8.5]),
        ([], []),
    ],
)
def test_isotonic_pools_what_falls(values: list[float], rising: list[float]) -> None:
    assert isotonic(values).tolist() == rising


@settings(deadline=None)  # the machine may be busy
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_a_fit_never_falls(contexts: int, rows: int, seed: int) -> None:
    measured = np.random.default_rng(seed).uniform(1, 50, (contexts, rows))
    ms = np.array(Curve.fit(range(contexts), range(1, rows + 1), measured).ms)
    assert ms.shape == measured.shape and measured.min() <= ms.min() <= ms.max() <= measured.max()
    assert (np.diff(ms, axis=0) >= -1e-9).all() and (np.diff(ms, axis=1) >= -1e-9).all()


def test_a_fit_keeps_what_rises() -> None:
    assert Curve.fit(CONTEXTS, ROWS, np.array(CURVE.ms)) == CURVE


def test_points_are_met_and_what_lies_between_is_on_a_line() -> None:
    assert [CURVE.at(128, rows) for rows in (0, 1, 2, 5, 8)] == [0, 10, 12, 18, 24]
    assert [CURVE.at((128 + 1024) // 2, rows) for rows in (1, 2, 8)] == [15, 17, 35]


def test_beyond_the_points_the_last_slopes_go_on_and_before_them_it_is_level() -> None:
    assert CURVE.at(128, 12) == pytest.approx(24 + 4 * (24 - 12) / 6)
    assert CURVE.at(0, 2) == CURVE.at(128, 2)
    assert CURVE.at(1024 + 2 * 896, 1) == pytest.approx(20 + 2 * 10)
    single = Curve((128,), (1,), ((7.0,),))
    assert [single.at(4096, rows) for rows in (0, 1, 3)] == [0, 7, 7]


def test_predictions_are_shared_within_a_step_of_context() -> None:
    curve = Curve(CURVE.contexts, CURVE.rows, CURVE.ms)
    assert curve.at(10 * CONTEXT_STEP + CONTEXT_STEP - 1, 8) == curve.at(10 * CONTEXT_STEP, 8)
    assert curve.at(11 * CONTEXT_STEP, 8) > curve.at(10 * CONTEXT_STEP, 8)
    assert curve == CURVE  # what was asked is no part of it


@pytest.mark.parametrize(
    ("contexts", "rows", "ms", "named"),
    [
        ((), (1,), (), "contexts []"),
        ((128,), (), ((),), "rows []"),
        ((128, 128), (1,), ((1.0,), (1.0,)), "contexts [128, 128]"),
        ((-5,), (1,), ((1.0,),), "contexts [-5]"),
        ((128,), (2, 1), ((1.0, 1.0),), "rows [2, 1]"),
        ((128,), (1, 2), ((1.0,),), "1 x 2 points"),
        ((128, 256), (1,), ((1.0,),), "2 x 1 points"),
        ((128,), (1,), ((0.0,),), "above 0"),
        ((128,), (1,), ((float("nan"),),), "above 0"),
        ((128,), (1,), ((float("inf"),),), "above 0"),
    ],
)
def test_what_is_no_curve_is_one_typed_line(contexts: Any, rows: Any, ms: Any, named: str) -> None:
    with pytest.raises(InputError) as caught:
        Curve(contexts, rows, ms)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_json_gives_the_same_costs_back() -> None:
    costs = Costs(CURVE, Curve((0,), (1, 128), ((0.1, 1 / 3),)), 2.0)
    assert parse_record(Costs, json.loads(json.dumps(asdict(costs))), "costs") == costs


@pytest.mark.parametrize(
    "raw",
    [
        {},
        [],
        None,
        {"target": CURVE},
        {"target": {"contexts": [0], "rows": [1]}, "draft": {}},
        {"target": {"contexts": 1, "rows": [1], "ms": [[1]]}, "draft": {}},
        {"target": {"contexts": [0], "rows": [1], "ms": [["1"]]}, "draft": {}},
        {"target": {"contexts": [0], "rows": [1], "ms": [[-1]]}, "draft": {}},
    ],
)
def test_other_json_raises_what_it_says(raw: Any) -> None:
    with pytest.raises((InputError, ManifestError)):
        parse_record(Costs, raw, "costs")
