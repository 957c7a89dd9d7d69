"""Drafts under a grammar."""

from __future__ import annotations

from dovetail.runtime.sampling.constraint import Matcher
from dovetail.runtime.tree.draft_tree import DraftTree, best_tree


def constrained(tree: DraftTree, matcher: Matcher, width: int, deepest: int | None = None) -> DraftTree:
    """Return the best `width` nodes of `tree` without tokens that the grammar refuses, and with those that it forces.

    A forced token is as probable as the node above it. Forced tokens join the tree below any node.
    matcher: stands at the root, and returns there. deepest: the most levels below the root, None for any.
    """
    tokens, own = tree.tokens.tolist(), tree.logprobs.tolist()
    children: list[list[int]] = [[] for _ in tokens]
    for node, parent in enumerate(tree.parents[1:].tolist(), 1):
        children[parent].append(node)
    kept, parents, logprobs = [0], [-1], [0.0]  # nodes of `tree` and new ones, parents first

    def candidates(place: int) -> list[tuple[int, float]]:
        """Return nodes that may follow the kept node at `place`, with their log-probabilities."""
        node, forced = kept[place], matcher.forced()
        if not forced:
            return [(child, logprobs[place] + own[child] - own[node]) for child in children[node]]
        found = [child for child in children[node] if tokens[child] == forced[0]][:1]
        if not found and len(tokens) < len(tree) + width:
            found = [len(tokens)]
            tokens.append(forced[0])
            own.append(0.0)
            children.append([])
        return [(child, logprobs[place]) for child in found]

    path = [(0, iter(candidates(0)))]
    while path:
        place, pending = path[-1]
        child, logprob = next(pending, (0, 0.0))
        if not child:
            path.pop()
            matcher.retreat(min(len(path), 1))
        elif matcher.advance(tokens[child]):
            kept.append(child)
            parents.append(place)
            logprobs.append(logprob)
            ends = deepest is not None and len(path) >= deepest  # the child's depth is len(path)
            path.append((len(kept) - 1, iter(() if ends else candidates(len(kept) - 1))))
    return best_tree([tokens[node] for node in kept], parents, logprobs, width - 1)
