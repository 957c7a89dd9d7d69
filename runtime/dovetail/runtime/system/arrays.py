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

_STRANGE = 0x9E3779B1  # a prime factor for positions, so that the next tokens differ and follow no pattern


def nbytes(spec: Spec) -> int:
    """Return the bytes of an array."""
    shape, kind = spec
    return prod(shape) * np.dtype(kind).itemsize


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many tokens both texts begin with."""
    pairs = zip(left, right, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def strange_tokens(begin: int, count: int, vocab_size: int) -> TokenArray:
    """Return different tokens from the whole vocabulary for `count` positions from `begin` on."""
    return (np.arange(begin + 1, begin + count + 1, dtype=np.int64) * _STRANGE) % vocab_size
