"""Random numbers for sampling: a function of seed, position and token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Noise = Callable[[int, int], NDArray[np.float32]]  # absolute position, V -> [V] standard Gumbel variates


def gumbel_noise(seed: int) -> Noise:
    """Return independent noise for every absolute position and token.

    The noise is -log of an exponential variate in double precision. In float32 one variate in 2**23
    would be 0, and the noise of its token infinite.
    """

    def noise(position: int, size: int) -> NDArray[np.float32]:
        drawn = np.random.Generator(np.random.SFC64([seed, position])).standard_exponential(size).astype(np.float32)
        return np.negative(np.log(drawn, out=drawn), out=drawn)

    return noise
