"""Types that several rooms share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
TokenArray = NDArray[np.int64]

SequenceId = int  # the number of one text, given by the target that holds its KV


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many tokens both texts begin with."""
    pairs = zip(left, right, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
