"""Acceptance by sample-and-match: keep the path that the target itself would have written.

Axes: N nodes, V target vocabulary, A accepted nodes below the root. The target chooses a token at
each node, and the walk goes on where the tree has that token. The choice depends on the target's
logits and the position's noise alone. Every token therefore comes from the target's processed
distribution, whatever the tree proposes and whatever noise the drafter knew. Draft probabilities
are not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.errors import DovetailError, InputError
from dovetail.runtime.sampling.constraint import Matcher
from dovetail.runtime.sampling.logprobs import TokenLogprobs, token_logprobs
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.tree.draft_tree import DraftTree


@dataclass(frozen=True, eq=False)
class Verdict:
    """The accepted path of a tree, and its tokens."""

    path: NDArray[np.int64]  # [A + 1] accepted nodes, root first
    tokens: tuple[int, ...]  # of the A accepted nodes, then the target's next, which no child of the last node has
    logprobs: tuple[TokenLogprobs, ...] = ()  # of the tokens, if asked for
    complete: bool = False  # whether the grammar lets no token follow
    error: DovetailError | None = None  # why no token can be chosen

    @property
    def accepted(self) -> int:
        """Number of drafted tokens that were right."""
        return len(self.tokens) - 1


def accept(
    tree: DraftTree,
    logits: NDArray[np.float32],
    sampler: Sampler,
    position: int,
    context: Sequence[int],
    matcher: Matcher | None = None,
    logprobs: int | None = None,
) -> Verdict:
    """Return the longest path that the target itself would have produced.

    logits: [N, V] float32, row i belongs to node i; only visited rows are read. position: absolute,
    of the first token to choose. context: every token id before it, the root's included. matcher:
    follows the grammar along the tokens; the path ends where the text is complete. logprobs: how
    many alternatives to report with each token, None for no report.
    """
    path, tokens, seen, found = [0], list[int](), list(context), list[TokenLogprobs]()
    while True:
        row = logits[path[-1]]
        token = sampler.pick(row, position + len(tokens), seen, matcher.allowed() if matcher else None)
        tokens.append(token)
        seen.append(token)
        if logprobs is not None:
            found.append(token_logprobs(row, token, logprobs))
        if matcher and not matcher.advance(token):
            raise InputError(f"the grammar allows token id {token} and then refuses it: simplify the grammar")
        child, complete = tree.child(path[-1], token), matcher is not None and matcher.complete
        if child is None or complete:
            return Verdict(np.array(path, np.int64), tuple(tokens), tuple(found), complete)
        path.append(child)
