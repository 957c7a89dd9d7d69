"""What a round did, for people who want to see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dovetail.runtime.system.arrays import TokenArray
from dovetail.runtime.tree.draft_tree import DraftTree


@dataclass(frozen=True)
class RoundTrace:
    """The tree of one round, and the part of it that the target kept.

    Times are those of the pass, which several texts may share.
    """

    tokens: tuple[int, ...]  # [N], node 0 is the root: the last known token
    parents: tuple[int, ...]  # [N], -1 for the root
    accepted: tuple[int, ...]  # nodes below the root, from the top down
    next: int | None  # the target's own token after them; None if the answer ends before it
    draft_ms: float
    verify_ms: float


def trace(tree: DraftTree, path: TokenArray, tokens: Sequence[int], draft_ms: float, verify_ms: float) -> RoundTrace:
    """Return the record of a round. path: root and accepted nodes. tokens: those that count, a stop token included."""
    accepted = path[1 : len(tokens) + 1].tolist()
    following = tokens[len(accepted)] if len(tokens) > len(accepted) else None
    return RoundTrace(
        tuple(tree.tokens.tolist()), tuple(tree.parents.tolist()), tuple(accepted), following, draft_ms, verify_ms
    )
