"""Calibration: how often a drafter is right when it says a probability q. Training measures it.

`calibration.json` beside the drafter has one record per depth. depth: levels below the root, from
1, as in a draft tree.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.errors import InputError, PairError
from dovetail.runtime.pair.files import write_atomically
from dovetail.runtime.pair.layout import CALIBRATION_NAME, DRAFTER, DRAFTER_CALIBRATION
from dovetail.runtime.pair.manifest import Manifest, parse_record
from dovetail.runtime.system.files import read_json

_REMEDY = "train the drafter again, or remove the file"
# `logit_of` clips log-probabilities to this range. Those of float32 end near -6e-8 and -104.
_HIGHEST, _LOWEST = -1e-7, -60.0


@dataclass(frozen=True)
class DepthCalibration:
    """The fit for one depth, p = sigmoid(scale * logit(q) + shift), and the measurement."""

    scale: float
    shift: float
    candidates: int  # number measured
    error_before: float  # expected calibration error of q: |q - observed| averaged over the candidates by bins
    error_after: float  # the same of p
    edges: tuple[float, ...]  # [B + 1] ascending probabilities
    counts: tuple[int, ...]  # [B], candidates of each bin
    mean_q: tuple[float, ...]  # [B], 0 for an empty bin
    observed: tuple[float, ...]  # [B], share that was the target's token, 0 for an empty bin

    def __post_init__(self) -> None:
        if not (0 <= self.scale < inf and isfinite(self.shift)):
            raise PairError(f"scale {self.scale} or shift {self.shift} is out of range: give finite ones, scale from 0")
        for name, counts in (("candidates", [self.candidates]), ("counts", self.counts)):
            if any(count < 0 for count in counts):
                raise PairError(f"{name} {[*counts]} is out of range: give 0 or more")
        bins = len(self.edges) - 1
        if bins < 1 or not bins == len(self.counts) == len(self.mean_q) == len(self.observed):
            raise PairError(f"edges of {bins} bins do not match counts, mean_q and observed: give as many of each")
        if not all(low < high for low, high in pairwise(self.edges)):
            raise PairError(f"edges {list(self.edges)} are out of order: give them ascending")


@dataclass(frozen=True)
class Calibration:
    """A drafter's calibration by depth. top_k: candidates measured per position, the best ones."""

    top_k: int
    depths: tuple[DepthCalibration, ...]

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise PairError(f"top_k {self.top_k} is out of range: give 0 or more")
        if not self.depths:
            raise PairError("depths is empty: give one record or more")

    def apply(self, depth: int, logprobs: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Return calibrated log-probabilities of candidates at `depth`, given their path.

        A depth past the last record uses the last record. logprobs: any shape, conditional on the
        path; -inf and nan mark no candidate and stay. The order of candidates stays. Raises
        InputError for a depth below 1.
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
        """Return the calibration in `folder`, None without a file. Raises PairError."""
        path = folder / CALIBRATION_NAME
        try:
            raw = read_json(path, PairError, _REMEDY)
        except FileNotFoundError:
            return None
        try:
            return parse_record(cls, raw, "", _REMEDY)
        except PairError as err:
            raise PairError(f"{path}: {err}") from None


def pair_calibration(folder: Path, manifest: Manifest) -> Calibration | None:
    """Return the calibration of a pair's drafter, None if the manifest does not list the file."""
    return Calibration.load(folder / DRAFTER) if DRAFTER_CALIBRATION in manifest.files else None


def logit_of(logprobs: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return log(q / (1 - q)) of log-probabilities, always finite."""
    within = np.clip(np.asarray(logprobs, np.float64), _LOWEST, _HIGHEST)
    return within - np.log(-np.expm1(within))
