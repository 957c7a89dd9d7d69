"""A calibration bends probabilities without reordering them, survives its file, and refuses one that was damaged."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.runtime.errors import InputError, PairError
from dovetail.runtime.pair.layout import CALIBRATION_NAME
from dovetail.runtime.policy.calibration import Calibration, DepthCalibration


def fitted(scale: float, shift: float) -> DepthCalibration:
    return DepthCalibration(scale, shift, 7, 0.2, 0.1, (0.0, 0.5, 1.0), (3, 4), (0.25, 0.75), (0.5, 0.5))


CALIBRATION = Calibration(10, (fitted(1.0, 0.0), fitted(0.5, -1.0)))
LOGPROBS = np.log(np.array([[0.9, 0.09, 0.01], [0.5, 0.5, 1e-12]], np.float32))


def test_the_identity_changes_nothing() -> None:
    np.testing.assert_allclose(CALIBRATION.apply(1, LOGPROBS), LOGPROBS, rtol=1e-5)


def test_a_fit_is_sigmoid_of_the_scaled_logit_and_the_last_depth_serves_all_deeper() -> None:
    q = np.exp(LOGPROBS.astype(np.float64))
    expected = 1 / (1 + np.exp(-(0.5 * np.log(q / (1 - q)) - 1.0)))
    for depth in (2, 3, 99):
        found = CALIBRATION.apply(depth, LOGPROBS)
        assert found.dtype == np.float32 and found.shape == LOGPROBS.shape
        np.testing.assert_allclose(np.exp(found), expected, rtol=1e-4)


@given(
    st.lists(st.floats(-200.0, 1e-6), min_size=1, max_size=12),
    st.floats(0.0, 20.0),
    st.floats(-30.0, 30.0),
)
def test_the_order_of_candidates_is_kept(logprobs: list[float], scale: float, shift: float) -> None:
    found = Calibration(10, (fitted(scale, shift),)).apply(1, np.sort(np.array(logprobs, np.float32)))
    assert np.isfinite(found).all() and (found <= 0).all() and (np.diff(found) >= 0).all()


def test_no_candidate_stays_none() -> None:
    marked = np.array([-np.inf, np.nan, -1.0, 0.0], np.float32)
    found = Calibration(10, (fitted(0.0, 5.0),)).apply(1, marked)
    assert found[0] == -np.inf and np.isnan(found[1]) and np.isfinite(found[2:]).all()


@pytest.mark.parametrize("depth", [0, -1])
def test_the_root_has_no_candidates(depth: int) -> None:
    with pytest.raises(InputError, match=f"depth {depth}"):
        CALIBRATION.apply(depth, LOGPROBS)


def test_round_trip(tmp_path: Path) -> None:
    CALIBRATION.save(tmp_path)
    assert Calibration.load(tmp_path) == CALIBRATION
    assert [file.name for file in tmp_path.iterdir()] == [CALIBRATION_NAME]


def test_a_drafter_without_the_file_has_none(tmp_path: Path) -> None:
    assert Calibration.load(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, "\udcff"])
def test_damaged_json_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / CALIBRATION_NAME).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(PairError, match=CALIBRATION_NAME) as caught:
        Calibration.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scale", "1"), ("scale", -0.5), ("shift", float("nan")), ("shift", None), ("candidates", 1.5),
        ("candidates", True), ("error_after", []), ("edges", [0.0, 1.0]), ("edges", [0.0, 0.0, 1.0]), ("edges", 3),
        ("counts", [1, "x"]), ("counts", [1, -1]), ("mean_q", [float("inf"), 0.0]), ("observed", [0.1]),
        ("slope", 1.0),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_named(tmp_path: Path, key: str, value: Any) -> None:
    data = json.loads(json.dumps(asdict(CALIBRATION)))
    data["depths"][1][key] = value
    (tmp_path / CALIBRATION_NAME).write_text(json.dumps(data))
    with pytest.raises(PairError, match=key):
        Calibration.load(tmp_path)


@pytest.mark.parametrize("missing", ["top_k", "depths", "edges"])
def test_a_missing_key_is_named(tmp_path: Path, missing: str) -> None:
    data = json.loads(json.dumps(asdict(CALIBRATION)))
    for record in (data, *data["depths"]):
        record.pop(missing, None)
    (tmp_path / CALIBRATION_NAME).write_text(json.dumps(data))
    with pytest.raises(PairError, match=rf"key .*{missing}' is missing"):
        Calibration.load(tmp_path)


def test_no_depth_at_all_is_refused() -> None:
    with pytest.raises(PairError, match="depths is empty"):
        Calibration(10, ())
