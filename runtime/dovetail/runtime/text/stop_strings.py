"""Stop strings: end a text before the first stop string and emit no part of the string."""

from __future__ import annotations

from collections.abc import Sequence

from dovetail.runtime.errors import InputError


def check_stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Return the stop strings as a tuple. Raises InputError for an empty string or another type."""
    if not isinstance(stop, Sequence):
        raise InputError(f"stop {stop!r} cannot be used: give a string, or a list of strings")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise InputError(f"stop string {text!r} cannot be found: give non-empty strings")
    return stops


class StopFilter:
    """Takes text piece by piece and returns it up to the first stop string.

    The filter holds back the end of the text while that end may begin a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """Return the text that certainly precedes any stop string; "" once `stopped`."""
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
        """Return the held text, at the end of the stream."""
        text, self._held = self._held, ""
        return text

    def _suspicious(self, text: str) -> int:
        """Return the length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        ends = range(min(longest, len(text)), 0, -1)
        return next((n for n in ends if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
