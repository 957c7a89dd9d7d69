"""How long passes take now: the measured costs, corrected by what passes have lately taken here."""

from __future__ import annotations

from dataclasses import dataclass, field

from dovetail.runtime.policy.costs import Costs
from dovetail.runtime.policy.estimates import PRIOR, Estimate
from dovetail.runtime.tree.draft_tree import DraftTree

OUTLIER = 3.0  # times the expected time that a call counts as at most: tests of machines that stall


@dataclass
class Pace:
    """Predicted milliseconds after `context` tokens."""

    costs: Costs
    _target: Estimate = field(default_factory=lambda: Estimate(1.0, 0.0))  # real over predicted ms
    _width: dict[int, Estimate] = field(default_factory=dict)  # and of one width over that of all
    _draft: Estimate = field(default_factory=lambda: Estimate(1.0, 0.0))

    def target_ms(self, context: int, width: int) -> float:
        """A pass of the target, after one of the same width."""
        alone = self._width[width].value if width in self._width else 1.0
        return self.costs.target.at(context, width) * self._target.value * alone

    def path_ms(self, context: int) -> float:
        """What each path of a tree beside the first adds to its pass."""
        return self.costs.path.at(context, 1) * self._target.value

    def verify_ms(self, context: int, tree: DraftTree, width: int) -> float:
        """Verifying the best part of `tree` in a pass of `width` nodes."""
        paths = tree.path_counts[min(width, len(tree)) - 1] - 1
        return self.target_ms(context, width) + paths * self.path_ms(context)

    @property
    def switch_ms(self) -> float:
        """What a pass takes more if the last one had another width."""
        return self.costs.switch_ms * self._target.value

    @property
    def draft_pace(self) -> float:
        """Milliseconds that the drafter takes now for a measured one."""
        return self._draft.value

    def draft_ms(self, context: int, rows: int) -> float:
        """One call of the drafter."""
        return self.costs.draft.at(context, rows) * self._draft.value

    def backlog_ms(self, context: int, unread: int) -> float:
        """What reading `unread` pairs takes more than reading one."""
        return max(0.0, self.draft_ms(context, unread) - self.draft_ms(context, 1))

    def learn_draft(self, predicted: float, draft_ms: float) -> float:
        """predicted: by the measured costs, 0 if no call was made.  Returns `draft_ms` without its outliers."""
        if not predicted:
            return draft_ms
        # A machine that slept must not make drafting too slow ever to be tried again.
        self._draft.fade()
        self._draft.add(min(draft_ms / predicted, OUTLIER * self._draft.value))
        return min(draft_ms, OUTLIER * predicted * self._draft.value)

    def learn_target(self, context: int, width: int, extra_ms: float, verify_ms: float, *, changed: bool) -> float:
        """A pass of `width` nodes took `verify_ms`. Returns `verify_ms` without its outliers.

        extra_ms: of further paths and of the change of width, by the measured costs.  changed: after another width.
        The first pass of a width, which is slow, must not decide what drafting is worth.
        """
        alone, target = self._width.setdefault(width, Estimate(1.0, PRIOR)), self._target
        verify_ms = min(verify_ms, OUTLIER * (self.target_ms(context, width) + extra_ms * target.value))
        ratio = verify_ms / (self.costs.target.at(context, width) + extra_ms)
        if not changed:
            alone.fade()
            alone.add(ratio / target.value)
        target.fade()
        target.add(ratio / alone.value)
        return verify_ms
