"""The random numbers that tokens are drawn with: a function of seed, position and token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Noise = Callable[[int, int], NDArray[np.float32]]  # absolute position, V -> [V] standard Gumbel variates


def gumbel_noise(seed: int) -> Noise:
    """Independent noise for every absolute position and token.

    -log of an exponential variate, which is drawn in double precision: in float32 one in 2**23 would be 0, and its
    token infinitely good.
    """

    def noise(position: int, size: int) -> NDArray[np.float32]:
        drawn = np.random.Generator(np.random.SFC64([seed, position])).standard_exponential(size).astype(np.float32)
        return np.negative(np.log(drawn, out=drawn), out=drawn)

    return noise
