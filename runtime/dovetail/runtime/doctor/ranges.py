"""Predicted figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """A predicted figure: the least and the most that the constants allow."""

    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.least:g} to {self.most:g}"

    def __iter__(self) -> Iterator[float]:
        yield from (self.least, self.most)
