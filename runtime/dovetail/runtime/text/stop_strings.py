"""Stop strings: end a text before them, and never let a part of one out."""

from __future__ import annotations

from collections.abc import Sequence

from dovetail.runtime.errors import InputError


def check_stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """One string or several; raises InputError for an empty one or something else."""
    if not isinstance(stop, Sequence):
        raise InputError(f"stop {stop!r} cannot be used: give a string, or several in a list")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise InputError(f"stop string {text!r} cannot be found: give non-empty strings")
    return stops


class StopFilter:
    """Text goes in piece by piece and comes out up to the first stop string.

    The end of what came in is held back while it may be the beginning of one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """What is certain to come before any stop string; "" once `stopped`."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = len(text) - self._suspicious(text)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        text, self._held = self._held, ""
        return text

    def _suspicious(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        ends = range(min(longest, len(text)), 0, -1)
        return next((n for n in ends if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
