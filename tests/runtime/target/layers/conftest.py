"""Fixtures of the tests of first layers."""

from __future__ import annotations

import pytest
from tests.runtime.target.layers.failing import Device


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """The device that engines find."""
    made = Device()
    monkeypatch.setattr("dovetail.runtime.load.layer_device", lambda _: made)
    return made
