"""A drafter that moves to the CPU when its device fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.drafter.session import Ask, DeviceReport, DraftNoise, Moved, ReadsTokens
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.system.arrays import FloatArray, SequenceId, TokenArray
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.growth import Judge
from dovetail.runtime.tree.limits import TreeLimits

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class FailoverDrafter:
    """A drafter that moves from one OnnxDrafter to a second when the first fails, with a log line.

    The second drafter holds no pairs at first: the failed call raises Moved. device, capacity: of
    the drafter in use. It is a ReadsTokens if the drafters are.
    """

    def __init__(self, drafter: OnnxDrafter, open_second: Callable[[str], OnnxDrafter] | None = None):
        """open_second: opens the second drafter, given the reason. Without it errors are raised."""
        self._drafter, self._open_second = drafter, open_second
        self.device, self.capacity, self.top_k = drafter.device, drafter.capacity, drafter.top_k
        self._moved = 0  # bytes that the first drafter moved, after the move
        if isinstance(drafter, ReadsTokens):
            self.reads_tokens_alone = True

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
        self._or_move(partial(self._drafter.extend, seq, tokens, features, noise))

    def propose(
        self, seq: SequenceId, limits: TreeLimits, judge: Judge | None = None, noise: DraftNoise | None = None
    ) -> DraftTree:
        return self._or_move(partial(self._drafter.propose, seq, limits, judge, noise))

    def extend_all(self, pairs: Mapping[SequenceId, tuple[TokenArray, FloatArray]]) -> None:
        """See DraftsTogether. Raises as `extend` does."""
        self._or_move(partial(self._drafter.extend_all, pairs))

    def propose_all(self, asks: Mapping[SequenceId, Ask]) -> dict[SequenceId, DraftTree]:
        return self._or_move(partial(self._drafter.propose_all, asks))

    def rewind(self, seq: SequenceId, keep: int) -> None:
        self._drafter.rewind(seq, keep)

    def close(self) -> None:
        self._drafter.close()

    def _or_move(self, call: Callable[[], Result]) -> Result:
        """Return the call's result. If the call fails, switch to the second drafter.

        Raises Moved after the switch, and DeviceError if there is no second drafter.
        """
        open_second = self._open_second
        try:
            return call()
        except DeviceError as error:
            if open_second is None:
                raise
            problem = str(error)
        # Outside the handler: the traceback's frames hold objects that must be freed before the device.
        second = open_second(f"moved there: {problem}")
        log.warning("the drafter moves from %s to %s: %s", self.device, second.device, problem)
        self._moved = self._drafter.report.bus_bytes
        first, self._drafter = self._drafter, second  # at once, in case of an interrupt
        self._open_second = None
        self.device, self.capacity = second.device, second.capacity
        first.close()
        raise Moved(f"the drafter moved to {second.device} and holds nothing there: {problem}")
