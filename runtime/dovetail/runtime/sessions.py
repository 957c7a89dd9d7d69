"""The two seams: a target that verifies, a drafter that proposes.

Axes: N nodes of a tree, T new tokens, V target vocabulary, D feature size.

Position arithmetic, the same on both sides: the target has committed tokens x[0..L-1] and with them
features f[0..L-1]. The next token x[L] is known (sampled) but not committed: it is the root of the
next tree. The drafter pairs feature f[t] with token x[t+1], so after L committed tokens and a known
x[L] it has been extended L times, or less often: it may be told later, and t counts from the first pair
that it was given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .tree import DraftTree, Judge, TreeLimits

FloatArray = NDArray[np.float32]
TokenArray = NDArray[np.int64]
# For sampled tokens: (depth, ids [K]) -> [K] float32, to be added to a drafter's logits of the tokens `ids` that
# may come `depth` levels below the last known token, so that its best are what the target will draw (sampling.py).
DraftNoise = Callable[[int, NDArray[np.integer[Any]]], FloatArray]


@dataclass(frozen=True)
class TargetPass:
    """What one forward pass of the target gives back.

    logits: [rows, V] float32; prefill: one row, the last token's; verify: one row per node.
    features: [T or N, D] float32, row i belongs to new token or node i.
    The arrays may be views of engine memory: valid until the session's next call.
    """

    logits: FloatArray
    features: FloatArray


@runtime_checkable
class TargetSession(Protocol):
    """The target LLM with the KV of one conversation."""

    device: str  # e.g. "CPU"
    max_context: int  # tokens

    @property
    def length(self) -> int:
        """Tokens committed to the KV cache."""
        ...

    def prefill(self, tokens: TokenArray) -> TargetPass:
        """Append and commit one chunk of prompt tokens; logits of its last token only."""
        ...

    def verify(self, tree: DraftTree) -> TargetPass:
        """Run all nodes in one pass, each attending to the committed tokens and its ancestors."""
        ...

    def commit(self, path: NDArray[np.int64]) -> None:
        """Keep the KV rows of `path` (node indices of the last verified tree, root first), drop the rest."""
        ...

    def reset(self, keep: int = 0) -> None:
        """Forget everything after the first `keep` committed tokens, and any unverified tree."""
        ...


@runtime_checkable
class DraftSession(Protocol):
    """The drafter with its own KV of the same conversation."""

    device: str  # e.g. "CPU (int8)", "CUDA"

    @property
    def length(self) -> int:
        """(feature, token) pairs it has been extended with."""
        ...

    def extend(self, tokens: TokenArray, features: FloatArray, noise: DraftNoise | None = None) -> None:
        """Append pairs: features[i] = f[t], tokens[i] = x[t+1].  tokens: [T], features: [T, D].

        noise: of what follows the last token, None where nothing is drawn; a session may do without it.
        """
        ...

    def propose(self, limits: TreeLimits, judge: Judge | None = None, noise: DraftNoise | None = None) -> DraftTree:
        """Grow a tree below the last token of `extend`, the root; judge: see grow_tree.  noise: see `extend`."""
        ...

    def reset(self, keep: int = 0) -> None:
        """Forget everything after the first `keep` pairs."""
        ...
