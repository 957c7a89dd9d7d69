"""What every refused export has in common."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dovetail.runtime.errors import DovetailError

ROOTS = os.pathsep.join(str(Path(__file__).parents[3] / root) for root in ("runtime", "exporter", "models"))


def message(error: pytest.ExceptionInfo[DovetailError]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def assert_nothing_left(out: Path) -> None:
    assert not out.exists()
    assert not (out.parent / f".{out.name}.build").exists()
