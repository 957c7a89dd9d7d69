"""The first half of a round: what the target shall verify for each of its texts.

Axes: t texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

from dovetail.runtime.drafter.session import Ask, DraftsTogether
from dovetail.runtime.drafter.window import Drafting, propose_together
from dovetail.runtime.loop.sequence import Outlook, Sequence
from dovetail.runtime.policy.policy import Choice, Draft, Growth, Plan, Policy, Round
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.forest import Forest


@dataclass(frozen=True, eq=False)
class Offer:
    """The trees of a round, with the policy's records of them if a policy chose them."""

    trees: tuple[DraftTree, ...]  # in the order of the texts
    rows: int = 0  # that the pass computes at least
    plan: Plan | None = None
    choice: Choice | None = None
    drafts: tuple[Draft | None, ...] = ()

    def outcome(self, tokens: Many[Many[int]], draft_ms: float, verify_ms: float | None) -> Round | None:
        """Return the record for the policy, None without one. tokens: those that followed each root.

        verify_ms: None if the pass did other work too.
        """
        if self.plan is None or self.choice is None:
            return None
        return Round(self.plan, self.choice, self.drafts, tokens, draft_ms, verify_ms)


def draft(texts: Many[Sequence], policy: Policy | None = None) -> Offer:
    """Return a tree below each text's known token: drafted, with repeated text, or that token alone.

    Without a policy every tree grows to its request's limits.
    """
    context = sum(len(text.tokens) - 1 for text in texts) // len(texts)
    least = policy.least(context) if policy else 0.0
    outlooks = [text.outlook(policy, least) for text in texts]
    if policy is None:
        return Offer(tuple(_joined(texts, outlooks, _drafted(texts, outlooks, [None] * len(texts)))))
    most = sum(outlook.limits.width for outlook in outlooks)
    if most == len(texts):
        return Offer(tuple(outlook.repeats for outlook in outlooks))
    repeats = Forest(tuple(outlook.repeats for outlook in outlooks))
    plan = policy.plan(context, most, repeats, sum(text.waiting for text in texts))
    plan = replace(plan, draft=plan.draft and least <= 1.0)
    if not plan.draft:
        choice = policy.choose(plan, repeats)
        return Offer(choice.forest.trees, choice.width, plan, choice, (None,) * len(texts))
    plan = replace(plan, together=sum(map(_can_share, texts)))
    growths = [Growth(policy, plan) for _ in texts]
    trees = _drafted(texts, outlooks, growths)
    drafts = tuple(Draft(tree, growth) if tree else None for tree, growth in zip(trees, growths, strict=True))
    choice = policy.choose(plan, Forest(tuple(_joined(texts, outlooks, trees))))
    return Offer(choice.forest.trees, choice.width, plan, choice, drafts)


def _can_share(text: Sequence) -> bool:
    """Whether the drafter's calls for a text may run rows of other texts too: noise is one text's alone."""
    return text.window is not None and text.noise() is None and isinstance(text.window.drafter, DraftsTogether)


def _drafted(texts: Many[Sequence], outlooks: Many[Outlook], judges: Many[Growth | None]) -> list[DraftTree | None]:
    """Return the drafter's tree for each text that has room for one."""
    trees: list[DraftTree | None] = [None] * len(texts)
    together = dict[int, Drafting]()
    for index, (text, outlook, judge) in enumerate(zip(texts, outlooks, judges, strict=True)):
        if outlook.limits.width == 1:
            continue
        if text.window and _can_share(text):
            together[index] = Drafting(text.window, text.tokens, Ask(outlook.limits, judge))
        else:
            trees[index] = text.propose(outlook.limits, judge)
    for index, tree in zip(together, propose_together([*together.values()]), strict=True):
        trees[index] = texts[index].usable(tree, outlooks[index].limits)
    return trees


def _joined(texts: Many[Sequence], outlooks: Many[Outlook], trees: Many[DraftTree | None]) -> Iterator[DraftTree]:
    """Yield the trees with repeated text."""
    for text, outlook, tree in zip(texts, outlooks, trees, strict=True):
        yield text.join(tree, outlook.limits) if tree else outlook.repeats
