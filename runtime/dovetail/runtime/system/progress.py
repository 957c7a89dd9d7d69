"""How long work tells its caller how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A function that receives each step of long work."""

    def __call__(self, stage: str, done: float = 0, total: float = 0, note: str = "") -> None:
        """Receive that `done` of `total` units of `stage` are finished; total 0: unknown."""


def silent(stage: str, done: float = 0, total: float = 0, note: str = "") -> None:
    """Show nothing."""
