"""Drafts under a grammar: refused tokens leave a draft, forced tokens join it.

The matcher stands at the root of a tree. It returns there after every function.
"""

from __future__ import annotations

from dataclasses import replace

from dovetail.runtime.sampling.constraint import Matcher
from dovetail.runtime.tree.draft_tree import DraftTree, part
from dovetail.runtime.tree.repeats import Repeat

_FORCED = (0, 0)  # a kind of path that nobody counts


def allowed_part(tree: DraftTree, matcher: Matcher) -> DraftTree:
    """Return `tree` without the nodes that the grammar refuses, and without nodes below these."""
    tokens: list[int] = tree.tokens.tolist()
    children: list[list[int]] = [[] for _ in tokens]
    for node, parent in enumerate(tree.parents[1:].tolist(), 1):
        children[parent].append(node)
    kept, path = [0], [0]
    pending = [iter(children[0])]  # children to visit of each node on the path
    while path:
        node = next(pending[-1], 0)
        if not node:
            path.pop()
            pending.pop()
            if path:
                matcher.retreat(1)
        elif matcher.advance(tokens[node]):
            kept.append(node)
            path.append(node)
            pending.append(iter(children[node]))
    return part(tree, sorted(kept))


def allowed_paths(paths: list[Repeat], matcher: Matcher) -> list[Repeat]:
    """Return `paths` up to the first token that the grammar refuses."""
    kept = list[Repeat]()
    for path in paths:
        count = next((index for index, token in enumerate(path.tokens) if not matcher.advance(token)), len(path.tokens))
        matcher.retreat(count)
        if count:
            kept.append(replace(path, tokens=path.tokens[:count], logprobs=path.logprobs[:count]))
    return kept


def forced_paths(matcher: Matcher, most: int) -> list[Repeat]:
    """Return the tokens that must come next, at most `most`, as a path with probability 1."""
    tokens = matcher.forced()[: max(most, 0)]
    return [Repeat(tokens, (0.0,) * len(tokens), _FORCED)] if tokens else []
