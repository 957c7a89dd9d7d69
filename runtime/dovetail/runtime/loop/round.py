"""The first half of a round: what the target shall verify for each of its texts.

Axes: t texts.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

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

    def outcome(self, tokens: Many[Many[int]], draft_ms: float, verify_ms: float) -> Round | None:
        """Return the record for the policy, None without one. tokens: those that followed each root."""
        if self.plan is None or self.choice is None:
            return None
        return Round(self.plan, self.choice, self.drafts, tokens, draft_ms, verify_ms)


def draft(texts: Many[Sequence], policy: Policy | None = None) -> Offer:
    """Return a tree below each text's known token: drafted, with repeated text, or that token alone.

    Without a policy every tree grows to its request's limits.
    """
    outlooks = [text.outlook(policy) for text in texts]
    if policy is None:
        return Offer(tuple(_grown(text, outlook) for text, outlook in zip(texts, outlooks, strict=True)))
    most = sum(outlook.limits.width for outlook in outlooks)
    if most == len(texts):
        return Offer(tuple(outlook.repeats for outlook in outlooks))
    context = sum(len(text.tokens) - 1 for text in texts) // len(texts)
    repeats = Forest(tuple(outlook.repeats for outlook in outlooks))
    plan = policy.plan(context, most, repeats, sum(text.waiting for text in texts))
    drafts = tuple(
        _draft(text, outlook, policy, plan) if plan.draft and outlook.limits.width > 1 else None
        for text, outlook in zip(texts, outlooks, strict=True)
    )
    joined = (
        text.join(drafted.tree, outlook.limits) if drafted else outlook.repeats
        for text, outlook, drafted in zip(texts, outlooks, drafts, strict=True)
    )
    choice = policy.choose(plan, Forest(tuple(joined)))
    return Offer(choice.forest.trees, choice.width, plan, choice, drafts)


def _grown(text: Sequence, outlook: Outlook) -> DraftTree:
    """Return a tree that grows to its limits."""
    if outlook.limits.width == 1:
        return outlook.repeats
    return text.join(text.propose(outlook.limits, None), outlook.limits)


def _draft(text: Sequence, outlook: Outlook, policy: Policy, plan: Plan) -> Draft:
    growth = Growth(policy, plan)
    return Draft(text.propose(outlook.limits, growth), growth)
