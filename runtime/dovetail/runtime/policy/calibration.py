"""How often a drafter is right when it says q: measured when it was trained, read where trees are scheduled.

A record per depth, in `calibration.json` beside the drafter. depth: levels below the root, from 1, as in a draft tree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.errors import InputError, PairError
from dovetail.runtime.pair.files import write_atomically
from dovetail.runtime.pair.layout import CALIBRATION_NAME, DRAFTER, DRAFTER_CALIBRATION
from dovetail.runtime.pair.manifest import Manifest
from dovetail.runtime.system.files import read_json

_REMEDY = "train the drafter again, or remove the file"
_MOST = 1e300
# Logits beyond these are no better known than these; float32 log-probabilities end near -6e-8 and -104.
_HIGHEST, _LOWEST = -1e-7, -60.0


@dataclass(frozen=True)
class DepthCalibration:
    """What was measured of the candidates at one depth, and the fit: p = sigmoid(scale * logit(q) + shift).

    candidates: how many. error_before, error_after: expected calibration error, |q - observed| averaged over the
    candidates by bins, of q and of p. edges: [B + 1] ascending probabilities. counts, mean_q, observed: [B],
    candidates in the bin, their mean q and how many of them were the target's token, 0 where there are none.
    """

    scale: float
    shift: float
    candidates: int
    error_before: float
    error_after: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    mean_q: tuple[float, ...]
    observed: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("scale", "shift", "error_before", "error_after"):
            _check_number(name, getattr(self, name))
        for name in ("edges", "counts", "mean_q", "observed"):
            for value in _check_list(name, getattr(self, name)):
                _check_number(name, value)
        _check_count("candidates", self.candidates)
        for count in self.counts:
            _check_count("counts", count)
        if self.scale < 0:
            raise PairError(f"scale {self.scale} is out of range: give 0 or more")
        bins = len(self.edges) - 1
        if bins < 1 or not bins == len(self.counts) == len(self.mean_q) == len(self.observed):
            raise PairError(f"edges of {bins} bins do not match counts, mean_q and observed: give as many of each")
        if not all(low < high for low, high in pairwise(self.edges)):
            raise PairError(f"edges {list(self.edges)} are out of order: give them ascending")


@dataclass(frozen=True)
class Calibration:
    """A drafter's calibration, depth by depth.  top_k: candidates counted per position, the most probable ones."""

    top_k: int
    depths: tuple[DepthCalibration, ...]

    def __post_init__(self) -> None:
        _check_count("top_k", self.top_k)
        if not _check_list("depths", self.depths):
            raise PairError("depths is empty: give one record or more")

    def apply(self, depth: int, logprobs: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Calibrated log-probabilities of candidates at `depth`, given their path; depths past the last use the last.

        logprobs: any shape, conditional on the path; -inf and nan, which mark no candidate, stay. No candidate
        overtakes another. Raises InputError for a depth below 1.
        """
        if depth < 1:
            raise InputError(f"depth {depth} is out of range: give 1 or more, 0 is the root")
        fit = self.depths[min(depth, len(self.depths)) - 1]
        given = np.asarray(logprobs, np.float64)
        real = given > -np.inf
        logits = fit.scale * logit_of(np.where(real, given, 0.0)) + fit.shift
        return np.where(real, -np.logaddexp(0.0, -logits), given).astype(np.float32)

    def save(self, folder: Path) -> None:
        """Write `folder`/calibration.json whole or not at all. Raises OSError."""
        text = json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"
        write_atomically(folder / CALIBRATION_NAME, text.encode())

    @classmethod
    def load(cls, folder: Path) -> Calibration | None:
        """What `folder`/calibration.json says; None where there is no such file: older drafters have none.

        Raises PairError in one line: unreadable, not JSON, a missing or unknown key, a value that cannot be.
        """
        path = folder / CALIBRATION_NAME
        try:
            raw = read_json(path, PairError, _REMEDY)
        except FileNotFoundError:
            return None
        try:
            return parse_calibration(raw)
        except PairError as err:
            raise PairError(f"{path}: {err}") from None


def pair_calibration(folder: Path, manifest: Manifest) -> Calibration | None:
    """The calibration of a pair's drafter, if the manifest lists one: a file without a digest is not the pair's."""
    return Calibration.load(folder / DRAFTER) if DRAFTER_CALIBRATION in manifest.files else None


def parse_calibration(raw: object) -> Calibration:
    """A Calibration from decoded JSON. Raises PairError naming the key."""
    data = _keys(Calibration, raw, "the calibration")
    depths = []
    for number, entry in enumerate(_check_list("depths", data["depths"]), 1):
        values = _keys(DepthCalibration, entry, f"depth {number}")
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        depths.append(DepthCalibration(**{**values, **lists}))
    return Calibration(data["top_k"], tuple(depths))


def logit_of(logprobs: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """log(q / (1 - q)) of log-probabilities, finite."""
    within = np.clip(np.asarray(logprobs, np.float64), _LOWEST, _HIGHEST)
    return within - np.log(-np.expm1(within))


def _keys(record: type, raw: object, where: str) -> Mapping[str, Any]:
    if not isinstance(raw, dict):
        raise PairError(f"{where} is a {type(raw).__name__}, not an object: {_REMEDY}")
    names = {field.name for field in fields(record)}
    for key in sorted(raw.keys() ^ names):
        raise PairError(f"{where} has {'no' if key in names else 'the unknown'} key {key!r}: {_REMEDY}")
    return raw


def _check_list(name: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise PairError(f"{name} is {value!r:.60}, not a list: {_REMEDY}")
    return tuple(value)


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _MOST:
        raise PairError(f"{name} is {value!r:.60}, not a finite number: {_REMEDY}")


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise PairError(f"{name} is {value!r:.60}, not a whole number of 0 or more: {_REMEDY}")
