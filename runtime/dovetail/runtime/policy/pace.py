"""Pace: the cost table, corrected by the times of recent passes and calls."""

from __future__ import annotations

from dataclasses import dataclass, field

from dovetail.runtime.policy.costs import Costs
from dovetail.runtime.policy.estimates import HALF_LIFE, PRIOR, Estimate

OUTLIER = 3.0  # a longer time counts as this multiple of the expected time: tests of machines that stall


@dataclass
class _Width:
    """What passes of one width have shown."""

    ratio: Estimate  # over the ratio of all passes
    age: int = 0  # rounds since the last such pass, of several texts


@dataclass
class Pace:
    """Predicts milliseconds after `context` tokens."""

    costs: Costs
    _target: Estimate = field(default_factory=lambda: Estimate(1.0, 0.0))  # real over predicted ms
    _widths: dict[tuple[int, int], _Width] = field(default_factory=dict)  # by (texts, width)
    _draft: Estimate = field(default_factory=lambda: Estimate(1.0, 0.0))

    def target_ms(self, context: int, width: int, texts: int = 1) -> float:
        """Return the ms of a pass of the target after a pass of the same width."""
        # Of several texts, a width without a pass is as wrong in the table as their plain passes.
        known = width if texts == 1 or self.knows(width, texts) else texts
        alone = self._widths[texts, known].ratio.value if (texts, known) in self._widths else 1.0
        return self.costs.target.at(context, width) * self._target.value * alone

    def knows(self, width: int, texts: int) -> bool:
        """Whether a pass of this width has lately been seen after another one of it."""
        return (texts, width) in self._widths and self._widths[texts, width].ratio.seen > 0

    @property
    def switch_ms(self) -> float:
        """Ms that a pass takes longer if the last pass had another width."""
        return self.costs.switch_ms * self._target.value

    def draft_ms(self, context: int, rows: int) -> float:
        return self.costs.call_ms(context, rows) * self._draft.value

    def backlog_ms(self, context: int, unread: int) -> float:
        """Return the ms that reading `unread` context pairs takes longer than reading one."""
        return max(0.0, self.costs.read_ms(context, unread) - self.costs.call_ms(context, 1)) * self._draft.value

    def learn_draft(self, predicted: float, draft_ms: float) -> float:
        """Learn from a round's calls. Return `draft_ms`, limited by OUTLIER.

        predicted: ms by the cost table, 0 without a call.
        """
        if not predicted:
            return draft_ms
        # A stall of the machine must not rule out drafting for good.
        self._draft.fade()
        self._draft.add(min(draft_ms / predicted, OUTLIER * self._draft.value))
        return min(draft_ms, OUTLIER * predicted * self._draft.value)

    def learn_target(self, context: int, width: int, verify_ms: float, *, changed: bool, texts: int = 1) -> float:
        """Learn from a pass of `width` nodes. Return `verify_ms`, limited by OUTLIER.

        changed: the last pass had another width. The slow first pass of a width must not decide
        whether drafting pays. The table is of one text alone: of several texts only passes tell.
        """
        extra_ms = changed * self.costs.switch_ms
        if texts > 1:
            self._forget(texts)
        new = texts > 1 and not self.knows(width, texts)
        target = self._target
        alone = self._widths.setdefault((texts, width), _Width(Estimate(1.0, PRIOR if texts == 1 else 0.0)))
        if not new:
            verify_ms = min(verify_ms, OUTLIER * (self.target_ms(context, width, texts) + extra_ms * target.value))
        ratio = verify_ms / (self.costs.target.at(context, width) + extra_ms)
        if not changed:
            alone.age = 0
            alone.ratio.fade()
            alone.ratio.add(ratio / target.value)
        if not new:
            target.fade()
            target.add(ratio / alone.ratio.value)
        return verify_ms

    def _forget(self, texts: int) -> None:
        """Count a round of several texts. Forget widths without a recent pass: it may have been a busy moment's."""
        for key in [key for key in self._widths if key[0] == texts]:
            self._widths[key].age += 1
            if self._widths[key].age > HALF_LIFE:
                del self._widths[key]
