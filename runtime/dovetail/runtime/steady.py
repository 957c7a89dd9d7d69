"""A drafter that goes on: with the last pairs when its context is full, on the CPU when its device fails.

What a drafter has read of the target's features lies in its own memory, so the last pairs are kept on the host, as many
as a drafter reads of a long prompt, and are read again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from .errors import DeviceError
from .onnx_drafter import OnnxDrafter
from .sessions import FloatArray, TokenArray
from .tree import DraftTree, Judge, TreeLimits

KEPT = 256  # pairs that are kept, and read again

log = logging.getLogger(__name__)


class SteadyDrafter:
    """DraftSession over an OnnxDrafter, and a second one for when the first fails, which the log is told.

    device, device_note: where it runs now, and why.
    """

    def __init__(self, drafter: OnnxDrafter, open_second: Callable[[str], OnnxDrafter] | None = None):
        """open_second: makes the other drafter, told why; None where there is none, then errors are raised."""
        self.device, self.device_note = drafter.device, drafter.device_note
        self._drafter, self._open_second = drafter, open_second
        self._start = 0  # pairs before the first that the drafter holds
        self._moved = 0  # bytes that the first drafter moved, once it is left
        self._recent = _Recent()

    @property
    def bus_bytes(self) -> int:
        """Bytes moved so far between host and device."""
        return self._moved + self._drafter.bus_bytes

    @property
    def length(self) -> int:
        """Pairs it has been extended with; the drafter may hold the last of them alone."""
        return self._start + self._drafter.length

    def extend(self, tokens: TokenArray, features: FloatArray) -> None:
        """See OnnxDrafter; a full context begins anew with the last pairs, and these."""
        length = self.length
        try:
            if self._drafter.length + len(tokens) > self._drafter.max_context:
                self._read_again(length)
            self._drafter.extend(tokens, features)
            self._recent.add(tokens, features)
        except DeviceError as error:
            second = self._second(error)
            self._recent.add(tokens, features)
            self._move(second, error, length + len(tokens))

    def propose(self, limits: TreeLimits, judge: Judge | None = None) -> DraftTree:
        """See OnnxDrafter."""
        try:
            return self._drafter.propose(limits, judge)
        except DeviceError as error:
            self._move(self._second(error), error, self.length)
        return self._drafter.propose(limits, judge)

    def reset(self, keep: int = 0) -> None:
        """See OnnxDrafter."""
        self._recent.drop(max(self.length - keep, 0))
        self._start = min(self._start, keep)
        self._drafter.reset(keep - self._start)

    def _second(self, error: DeviceError) -> OnnxDrafter:
        """The other drafter, opened.  Raises `error` where there is none, DeviceError where it cannot be opened."""
        if self._open_second is None:
            raise error
        return self._open_second(f"moved there: {error}")

    def _move(self, second: OnnxDrafter, error: DeviceError, length: int) -> None:
        """Leave the first drafter for `second`, which reads the last of `length` pairs."""
        log.warning("the drafter moves from %s to %s: %s", self.device, second.device, error)
        self._open_second = None
        self._moved = self._drafter.bus_bytes
        self._drafter.close()
        self.device, self.device_note, self._drafter = second.device, second.device_note, second
        self._read_again(length)

    def _read_again(self, length: int) -> None:
        """Let the drafter hold nothing but the last of `length` pairs."""
        tokens, features = self._recent.last(KEPT)
        self._drafter.reset()
        self._start = length  # in case of an interruption
        if len(tokens):
            self._drafter.extend(tokens, features)
        self._start = length - len(tokens)


class _Recent:
    """The last pairs, at least KEPT of them, in the parts they came in."""

    def __init__(self) -> None:
        self._parts: list[tuple[TokenArray, FloatArray]] = []
        self._count = 0

    def add(self, tokens: TokenArray, features: FloatArray) -> None:
        self._parts.append((tokens.copy(), features.copy()))
        self._count += len(tokens)
        while self._count - len(self._parts[0][0]) >= KEPT:
            self._count -= len(self._parts.pop(0)[0])

    def drop(self, count: int) -> None:
        """Forget the last `count` pairs."""
        while count and self._parts:
            tokens, features = self._parts.pop()
            kept = max(len(tokens) - count, 0)
            if kept:
                self._parts.append((tokens[:kept], features[:kept]))
            count -= len(tokens) - kept
            self._count -= len(tokens) - kept

    def last(self, count: int) -> tuple[TokenArray, FloatArray]:
        """Up to `count` of them: tokens [n], features [n, D]."""
        if not self._parts:
            return np.empty(0, np.int64), np.empty((0, 0), np.float32)
        tokens, features = zip(*self._parts, strict=True)
        return np.concatenate(tokens)[-count:], np.concatenate(features)[-count:]
