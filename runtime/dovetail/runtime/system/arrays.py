"""Types that several rooms share."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
TokenArray = NDArray[np.int64]
Array = NDArray[Any]
Bytes = NDArray[np.uint8]
Spec = tuple[tuple[int, ...], type[np.generic]]  # shape and dtype

SequenceId = int  # the number of one text, given by the target that holds its KV


def nbytes(spec: Spec) -> int:
    """Return the bytes of an array."""
    shape, kind = spec
    return prod(shape) * np.dtype(kind).itemsize


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many tokens both texts begin with."""
    pairs = zip(left, right, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
