"""A drafter that drafts a block of tokens in one call, on ONNX Runtime; DFlash is such a drafter.

A call reads new context pairs and drafts after the last known token. It returns candidates for each
of the next P positions, which do not depend on the tokens chosen before them. A tree therefore
needs no further call: `best_first` takes the most probable products. `extend` only keeps the pairs,
and `propose` makes the call, so that a round with a draft costs one call.

Axes: n pairs of a call, T slots before the context, P positions, V draft vocabulary, D feature size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import numpy as np

from dovetail.runtime.drafter.graph_io import CHUNK, Runner
from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.drafter.session import Ask, DraftNoise, check_keep
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


@dataclass
class _Text:
    """What the drafter holds of one text."""

    number: int  # of its part of the pairs
    context: _Context
    token: int | None = None  # the last known token, while a draft may follow
    drafted: Candidates | None = None  # after that token


class BlockDrafter(OnnxDrafter):
    """A block drafter with the context of one text or several; implements Drafter."""

    def __init__(self, facts: DrafterFacts, runner: Runner, *, device: str, note: str, texts: int = 1):
        super().__init__(facts, runner, device=device, note=note, texts=texts)
        self._none = np.zeros((0, facts.feature_size), np.float32)
        self._blocks: dict[SequenceId, _Text] = {}

    def length(self, seq: SequenceId) -> int:
        if seq not in self._blocks:
            return 0
        read, waiting = self._blocks[seq].context
        return read + len(waiting)

    def extend(
        self, seq: SequenceId, tokens: TokenArray, features: FloatArray, noise: DraftNoise | None = None
    ) -> None:
        """See Drafter. The call waits for `propose`, except that full chunks are read at once."""
        text = self._block(seq)
        self._check(self.length(seq), tokens, features)
        text.token = text.drafted = None
        if not len(tokens):
            return
        read, waiting = text.context
        text.context = _Context(read, np.concatenate([waiting, features]))
        while len(text.context.waiting) > CHUNK:
            self._call(text, CHUNK, 0, None, 0)
        text.token = int(tokens[-1])

    def extend_all(self, pairs: Mapping[SequenceId, tuple[TokenArray, FloatArray]]) -> None:
        for seq, (tokens, features) in pairs.items():
            self.extend(seq, tokens, features)

    def propose(
        self, seq: SequenceId, limits: TreeLimits, judge: Judge | None = None, noise: DraftNoise | None = None
    ) -> DraftTree:
        text = self._blocks.get(seq)
        if text is None or text.token is None:
            raise InputError("nothing to draft from: extend the drafter with the last known token first")
        self._check_top_k(limits)
        if text.drafted is None:
            found = self._call(text, len(text.context.waiting), text.token, noise, limits.depth)
            text.drafted = Candidates(found.logprobs.copy(), found.ids.copy())
        return best_first(text.token, text.drafted, limits, judge=judge)

    def propose_all(self, asks: Mapping[SequenceId, Ask]) -> dict[SequenceId, DraftTree]:
        """See DraftsTogether. A call drafts one block."""
        return {seq: self.propose(seq, limits, judge) for seq, (limits, judge) in asks.items()}

    def rewind(self, seq: SequenceId, keep: int) -> None:
        """See Drafter. A draft then needs a new `extend`. Raises InputError."""
        check_keep(keep, held := self.length(seq))
        if not keep:
            self._blocks.pop(seq, None)
        elif keep < held:
            text = self._blocks[seq]
            read, waiting = text.context
            text.token = text.drafted = None
            text.context = _Context(min(read, keep), waiting[: max(keep - read, 0)])

    def pretend_length(self, seq: SequenceId, pairs: int) -> None:
        """Act as if extended by `pairs` pairs, for timing only: KV content is arbitrary."""
        text = self._block(seq)
        self._runner.touch(text.number * self.capacity + pairs)
        text.context, text.token, text.drafted = _Context(pairs, self._none), None, None

    def time_pass(self, seq: SequenceId, rows: int, *, clock: Callable[[], float] = perf_counter) -> float:
        """Return the ms of a call that reads `rows` pairs and drafts."""
        tokens, features = np.zeros(rows, np.int64), np.zeros((rows, self._facts.feature_size), np.float32)
        limits = TreeLimits(width=2, depth=1, top_k=1)
        begin = clock()
        self.extend(seq, tokens, features)
        self.propose(seq, limits)
        return (clock() - begin) * 1e3

    def _block(self, seq: SequenceId) -> _Text:
        if seq not in self._blocks:
            self._blocks[seq] = _Text(self._free_part(self._blocks, seq), _Context(0, self._none))
        return self._blocks[seq]

    def _forget(self) -> None:
        self._blocks.clear()

    def _call(self, text: _Text, n: int, token: int, noise: DraftNoise | None, depth: int) -> Candidates:
        """Read the first n waiting pairs and draft after `token`. depth: positions that noise helps."""
        read, waiting = text.context
        begin, rows = text.number * self.capacity, self._runner.rows(n)
        rows.token[:] = token
        rows.context_begin[:] = begin
        rows.context_end[:] = end = begin + read + n
        rows.kv_slots[:n] = self._facts.tree_slots + np.arange(begin + read, end)
        rows.features[:n] = waiting[:n]
        found = self._run(n, end, self._block_noise(depth, noise), upload_features=True)
        text.context = _Context(read + n, waiting[n:])
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
