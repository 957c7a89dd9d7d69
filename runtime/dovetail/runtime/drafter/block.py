"""A drafter that drafts a block of tokens in one call, on ONNX Runtime; DFlash is such a drafter.

A call reads new context pairs and drafts after the last known token. It returns candidates for each
of the next P positions, which do not depend on the tokens chosen before them. A tree therefore
needs no further call: `best_first` takes the most probable products. `extend` only keeps the pairs,
and `propose` makes the call, so that a round with a draft costs one call.

Axes: n pairs of a call, T slots before the context, P positions, V draft vocabulary, D feature size.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

import numpy as np

from dovetail.runtime.drafter.graph_io import CHUNK, Runner
from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.drafter.session import DraftNoise, check_keep
from dovetail.runtime.errors import InputError
from dovetail.runtime.pair.manifest import DrafterFacts
from dovetail.runtime.system.arrays import FloatArray, SequenceId, TokenArray
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.growth import Candidates, Judge, best_first
from dovetail.runtime.tree.limits import TreeLimits


class _Context(NamedTuple):
    """Pairs in the graph's buffers, and the features [n, D] of the pairs after them.

    One record, so that an interrupt leaves both numbers right.
    """

    read: int
    waiting: FloatArray


class BlockDrafter(OnnxDrafter):
    """A block drafter with the context of one sequence; implements Drafter."""

    def __init__(self, facts: DrafterFacts, runner: Runner, *, device: str, note: str):
        super().__init__(facts, runner, device=device, note=note)
        self._none = np.zeros((0, facts.feature_size), np.float32)
        self._context = _Context(0, self._none)
        self._token: int | None = None  # the last known token, while a draft may follow
        self._drafted: Candidates | None = None  # after that token

    @property
    def _held(self) -> int:
        return self._context.read + len(self._context.waiting)

    def extend(
        self, seq: SequenceId, tokens: TokenArray, features: FloatArray, noise: DraftNoise | None = None
    ) -> None:
        """See Drafter. The call waits for `propose`, except that full chunks are read at once."""
        self._check_room(seq)
        self._check(tokens, features)
        self._seq, self._token, self._drafted = seq, None, None
        if not len(tokens):
            return
        read, waiting = self._context
        self._context = _Context(read, np.concatenate([waiting, features]))
        while len(self._context.waiting) > CHUNK:
            self._call(CHUNK, 0, None, 0)
        self._token = int(tokens[-1])

    def propose(
        self, seq: SequenceId, limits: TreeLimits, judge: Judge | None = None, noise: DraftNoise | None = None
    ) -> DraftTree:
        if self._token is None or seq != self._seq:
            raise InputError("nothing to draft from: extend the drafter with the last known token first")
        self._check_top_k(limits)
        if self._drafted is None:
            found = self._call(len(self._context.waiting), self._token, noise, limits.depth)
            self._drafted = Candidates(found.logprobs.copy(), found.ids.copy())
        return best_first(self._token, self._drafted, limits, judge=judge)

    def rewind(self, seq: SequenceId, keep: int) -> None:
        """See Drafter. A draft then needs a new `extend`. Raises InputError."""
        check_keep(keep, held := self.length(seq))
        if keep < held:
            read, waiting = self._context
            self._token = self._drafted = None
            self._context = _Context(min(read, keep), waiting[: max(keep - read, 0)])

    def pretend_length(self, seq: SequenceId, pairs: int) -> None:
        """Act as if extended by `pairs` pairs, for timing only: KV content is arbitrary."""
        self._check_room(seq)
        self._runner.touch(pairs)
        self._seq, self._context = seq, _Context(pairs, self._none)
        self._token = self._drafted = None

    def time_pass(self, seq: SequenceId, rows: int, *, clock: Callable[[], float] = perf_counter) -> float:
        """Return the ms of a call that reads `rows` pairs and drafts."""
        tokens, features = np.zeros(rows, np.int64), np.zeros((rows, self._facts.feature_size), np.float32)
        limits = TreeLimits(width=2, depth=1, top_k=1)
        begin = clock()
        self.extend(seq, tokens, features)
        self.propose(seq, limits)
        return (clock() - begin) * 1e3

    def _call(self, n: int, token: int, noise: DraftNoise | None, depth: int) -> Candidates:
        """Read the first n waiting pairs and draft after `token`. depth: positions that noise helps."""
        read, waiting = self._context
        rows = self._runner.rows(n)
        rows.token[:] = token
        rows.context_end[:] = read + n
        rows.kv_slots[:n] = self._facts.tree_slots + np.arange(read, read + n)
        rows.features[:n] = waiting[:n]
        found = self._run(n, read + n, self._block_noise(depth, noise), upload_features=True)
        self._context = _Context(read + n, waiting[n:])
        return found

    def _block_noise(self, depth: int, noise: DraftNoise | None) -> FloatArray | None:
        """Return [P, V], zero below `depth`; None without sampling."""
        ids = self._runner.draft_ids
        if noise is None or ids is None:
            return None
        out = np.zeros((self._facts.positions, len(ids)), np.float32)
        for row in range(min(depth, len(out))):
            out[row] = noise(row + 1, ids)
        return out


def session_of(facts: DrafterFacts) -> type[OnnxDrafter]:
    """Return the class of the session for a drafter's graphs."""
    return BlockDrafter if facts.positions else OnnxDrafter
