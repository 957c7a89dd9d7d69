"""A drafter that moves to the CPU when its device fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NoReturn

from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.drafter.session import DeviceReport, DraftNoise, Moved
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.system.arrays import FloatArray, SequenceId, TokenArray
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.growth import Judge
from dovetail.runtime.tree.limits import TreeLimits

log = logging.getLogger(__name__)


class FailoverDrafter:
    """A drafter that moves from one OnnxDrafter to a second when the first fails, with a log line.

    The second drafter holds no pairs at first: the failed call raises Moved. device, capacity: of
    the drafter in use.
    """

    def __init__(self, drafter: OnnxDrafter, open_second: Callable[[str], OnnxDrafter] | None = None):
        """open_second: opens the second drafter, given the reason. Without it errors are raised."""
        self._drafter, self._open_second = drafter, open_second
        self.device, self.capacity = drafter.device, drafter.capacity
        self._moved = 0  # bytes that the first drafter moved, after the move

    @property
    def report(self) -> DeviceReport:
        now = self._drafter.report
        return DeviceReport(now.note, self._moved + now.bus_bytes)

    def length(self, seq: SequenceId) -> int:
        return self._drafter.length(seq)

    def extend(
        self, seq: SequenceId, tokens: TokenArray, features: FloatArray, noise: DraftNoise | None = None
    ) -> None:
        """See Drafter. Raises Moved, InputError, and DeviceError if there is no second drafter."""
        try:
            return self._drafter.extend(seq, tokens, features, noise)
        except DeviceError as error:
            problem = self._movable(error)
        self._move(problem)

    def propose(
        self, seq: SequenceId, limits: TreeLimits, judge: Judge | None = None, noise: DraftNoise | None = None
    ) -> DraftTree:
        try:
            return self._drafter.propose(seq, limits, judge, noise)
        except DeviceError as error:
            problem = self._movable(error)
        self._move(problem)

    def rewind(self, seq: SequenceId, keep: int) -> None:
        self._drafter.rewind(seq, keep)

    def close(self) -> None:
        self._drafter.close()

    def _movable(self, error: DeviceError) -> str:
        """Return the error's message if there is a second drafter, else raise the error.

        The caller moves after it has left the handler. The traceback's frames hold objects that
        must be freed before the device.
        """
        if self._open_second is None:
            raise error
        return str(error)

    def _move(self, problem: str) -> NoReturn:
        """Switch to the second drafter. Raises Moved, or DeviceError if it does not open."""
        assert self._open_second is not None
        second = self._open_second(f"moved there: {problem}")
        log.warning("the drafter moves from %s to %s: %s", self.device, second.device, problem)
        self._moved = self._drafter.report.bus_bytes
        first, self._drafter = self._drafter, second  # at once, in case of an interrupt
        self._open_second = None
        self.device, self.capacity = second.device, second.capacity
        first.close()
        raise Moved(f"the drafter moved to {second.device} and holds nothing there: {problem}")
