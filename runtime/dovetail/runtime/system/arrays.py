"""The types of arrays that rooms hand to each other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
TokenArray = NDArray[np.int64]
