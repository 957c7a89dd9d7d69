"""A drafter that goes on: with the last pairs when its context is full, on the CPU when its device fails.

What a drafter has read of the target's features lies in its own memory, so the last pairs are kept on the host, as many
as a drafter reads of a long prompt, and are read again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.drafter.session import DraftNoise
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.system.arrays import FloatArray, TokenArray
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.growth import Judge
from dovetail.runtime.tree.limits import TreeLimits

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

    def extend(self, tokens: TokenArray, features: FloatArray, noise: DraftNoise | None = None) -> None:
        """See OnnxDrafter; a full context begins anew with the last pairs, and these.

        Raises InputError, and DeviceError where there is no other drafter to move to.
        """
        length = self.length
        try:
            self._extend(length, tokens, features, noise)
        except DeviceError as error:
            problem = self._movable(error)
        else:
            self._recent.add(length, tokens, features)
            return
        self._recent.add(length, tokens, features)
        self._move(problem, length + len(tokens), noise)

    def propose(self, limits: TreeLimits, judge: Judge | None = None, noise: DraftNoise | None = None) -> DraftTree:
        """See OnnxDrafter.  Raises as `extend` does."""
        try:
            return self._drafter.propose(limits, judge, noise)
        except DeviceError as error:
            problem = self._movable(error)
        self._move(problem, self.length, noise)
        return self._drafter.propose(limits, judge, noise)

    def reset(self, keep: int = 0) -> None:
        """See OnnxDrafter."""
        self._recent.cut(keep)
        self._start = min(self._start, keep)
        self._drafter.reset(keep - self._start)

    def close(self) -> None:
        """Give a GPU's memory back; the session is not to be used any more."""
        self._drafter.close()

    def _extend(self, length: int, tokens: TokenArray, features: FloatArray, noise: DraftNoise | None) -> None:
        """Append pairs after `length`; where there is no room, after the last of those, or the end of these alone."""
        most, held = self._drafter.max_context, self._drafter.length
        if held + len(tokens) > most or (length and not held):  # an interruption may have left it empty
            self._read_again(length, min(KEPT, most // 2, max(most - len(tokens), 0)))
            skipped = max(len(tokens) - most, 0)
            self._start += skipped
            tokens, features = tokens[skipped:], features[skipped:]
        self._drafter.extend(tokens, features, noise)

    def _movable(self, error: DeviceError) -> str:
        """What the error says, if there is another drafter; else it is raised.

        To be left behind with its traceback, whose frames hold what must go before the device does.
        """
        if self._open_second is None:
            raise error
        return str(error)

    def _move(self, problem: str, length: int, noise: DraftNoise | None) -> None:
        """Leave the first drafter for the second, which reads the last of `length` pairs.  Raises DeviceError."""
        assert self._open_second is not None
        second = self._open_second(f"moved there: {problem}")
        log.warning("the drafter moves from %s to %s: %s", self.device, second.device, problem)
        self._moved = self._drafter.bus_bytes
        first, self._drafter, self._start = self._drafter, second, length  # whole, should an interruption come now
        self._open_second = None
        self.device, self.device_note = second.device, second.device_note
        first.close()
        self._read_again(length, min(KEPT, second.max_context), noise)

    def _read_again(self, length: int, count: int, noise: DraftNoise | None = None) -> None:
        """Let the drafter hold nothing but the last `count` of `length` pairs, or what was kept of them.

        noise: of what follows them, where a tree does.
        """
        tokens, features = self._recent.last(length, count)
        self._start = length  # first: an interruption then leaves no length that is too small
        self._drafter.reset()
        if len(tokens):
            self._drafter.extend(tokens, features, noise)
            self._start = length - len(tokens)


class _Recent:
    """The last pairs, at least KEPT of them, in the parts they came in, by the number of their first."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, TokenArray, FloatArray]] = []

    def add(self, begin: int, tokens: TokenArray, features: FloatArray) -> None:
        """Pairs from number `begin` on, after which there are no others yet."""
        self.cut(begin)
        if self._parts and self._end < begin:  # pairs between were never told: an interruption
            self._parts = []
        self._parts.append((begin, tokens.copy(), features.copy()))
        while len(self._parts) > 1 and self._end - self._parts[1][0] >= KEPT:
            del self._parts[0]

    def cut(self, keep: int) -> None:
        """Forget pair `keep` and those after it."""
        while self._parts and self._end > keep:
            begin, tokens, features = self._parts.pop()
            if begin < keep:
                self._parts.append((begin, tokens[: keep - begin], features[: keep - begin]))

    def last(self, length: int, count: int) -> tuple[TokenArray, FloatArray]:
        """Up to `count` pairs before number `length`: tokens [n], features [n, D]; none where others came last."""
        if not count or not self._parts or self._end != length:
            return np.empty(0, np.int64), np.empty((0, 0), np.float32)
        _, tokens, features = zip(*self._parts, strict=True)
        return np.concatenate(tokens)[-count:], np.concatenate(features)[-count:]

    @property
    def _end(self) -> int:
        begin, tokens, _ = self._parts[-1]
        return begin + len(tokens)
