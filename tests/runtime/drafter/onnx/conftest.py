"""A tiny random drafter, exported once, and a text for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from tests.runtime.drafter.onnx.tiny import Tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    from tests.runtime.drafter.onnx.tiny import exported  # torch

    return exported(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def stream() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.integers(0, 90, 400), rng.standard_normal((400, 32)).astype(np.float32)
