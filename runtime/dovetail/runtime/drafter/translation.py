"""The tokens that a target and a draft model with another vocabulary have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Translation:
    """C common tokens, and how the draft model reads any token of the target."""

    own: NDArray[np.int64]  # [C] ids of the draft model, each once
    target: NDArray[np.int64]  # [C] the target's ids of the same tokens, each once
    spell: Callable[[int], tuple[int, ...]]  # the target's id -> the draft model's, at least one
