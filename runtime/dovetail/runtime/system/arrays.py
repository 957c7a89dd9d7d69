"""Types that several rooms share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
TokenArray = NDArray[np.int64]

SequenceId = int  # the number of one text, given by the target that holds its KV
