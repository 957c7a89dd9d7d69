"""A small language model as the drafter: a chain of its best tokens, with the others as leaves.

The model reads the text itself and needs no features. It runs one row for each node of the chain
and keeps the KV of a chain until the text is known to go another way. Source: speculative decoding
with a draft model (Leviathan et al., 2211.17192), here with the runners-up as further branches.

Axes: T new tokens, K candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.drafter.session import DeviceReport, DraftNoise, check_keep
from dovetail.runtime.errors import InputError
from dovetail.runtime.system.arrays import FloatArray, SequenceId, TokenArray
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.growth import Candidates, Judge, Level, grow_tree
from dovetail.runtime.tree.limits import TreeLimits

TOP_K = 10  # candidates of a node, as a drafter's graph has
CHUNK = 256  # tokens of a pass that reads
SLOTS = 64  # nodes of a chain, root included, as a drafter's graph has
NOISY = 256  # most probable tokens that noise can lift among the candidates


class Model(Protocol):
    """A language model that can go back in a text: what OpenVINOTarget is without its trees."""

    max_context: int

    def open(self) -> SequenceId: ...
    def length(self, seq: SequenceId) -> int: ...
    def prefill(self, seq: SequenceId, tokens: TokenArray) -> Any: ...
    def verify(self, offers: Mapping[SequenceId, DraftTree]) -> Mapping[SequenceId, Any]: ...
    def commit(self, seq: SequenceId, path: NDArray[np.int64]) -> None: ...
    def rewind(self, seq: SequenceId, keep: int) -> None: ...
    def close(self, seq: SequenceId) -> None: ...
    def pretend_length(self, seq: SequenceId, tokens: int) -> None: ...
    def time_pass(self, seq: SequenceId, rows: int, *, clock: Callable[[], float] = perf_counter) -> float: ...


class ModelDrafter:
    """Drafts with a small language model of the target's vocabulary; implements Drafter.

    vocab_size: of the target; the model may have more or fewer rows for tokens that nobody uses.
    """

    device, file_key, reads_features, top_k = "CPU (draft model)", "model", False, TOP_K

    def __init__(self, model: Model, vocab_size: int, note: str) -> None:
        self.capacity = model.max_context - 1  # pairs: a text of n tokens has n - 1
        self.report = DeviceReport(note)
        self._model, self._vocab_size = model, vocab_size
        self._own: dict[SequenceId, SequenceId] = {}  # the target's number of a text -> the model's
        self._tokens: dict[SequenceId, list[int]] = {}  # what the model has read of each, its own drafts included
        self._known: dict[SequenceId, int] = {}  # tokens of it that are no drafts
        self._logits: FloatArray | None = None  # [V] after the last token, while a draft may follow

    def length(self, seq: SequenceId) -> int:
        return max(self._known.get(seq, 0) - 1, 0)

    def extend(
        self, seq: SequenceId, tokens: TokenArray, features: FloatArray | None = None, noise: DraftNoise | None = None
    ) -> None:
        """Append tokens [T]; the first call has the text's first token too. Raises DeviceError."""
        if seq not in self._own:
            self._own[seq], self._tokens[seq], self._known[seq] = self._model.open(), [], 0
        own, held, known, new = self._own[seq], self._tokens[seq], self._known[seq], tokens.tolist()
        right = _common(held[known:], new[:-1])  # drafts that the target chose too; the last token is read anew
        self._forget(seq, known + right)
        self._known[seq] += right
        for start in range(right, len(new), CHUNK):
            chunk = tokens[start : start + CHUNK]
            if len(chunk) == 1:  # as wide as a node of the chain: another width would cost OpenVINO time
                logits = self._step(seq, new[start])
            else:
                logits = self._model.prefill(own, chunk).logits[-1, : self._vocab_size].copy()
                held += chunk.tolist()
            self._known[seq], self._logits = len(held), logits

    def propose(
        self, seq: SequenceId, limits: TreeLimits, judge: Judge | None = None, noise: DraftNoise | None = None
    ) -> DraftTree:
        if self._logits is None or len(self._tokens.get(seq, ())) != self._known.get(seq):
            raise InputError("nothing to draft from: extend the drafter with the last known token first")
        logits, self._logits = self._logits, None

        def expand(level: Level) -> Candidates:
            return _candidates(self._step(seq, int(level.tokens[0])), level.depth + 1, noise)

        room = self._model.max_context - self._known[seq] + 1  # rows: the root's, and one for each node of the chain
        first, token = _candidates(logits, 1, noise), self._tokens[seq][-1]
        return grow_tree(token, first, expand, limits, slots=min(room, SLOTS), breadth=1, judge=judge)

    def rewind(self, seq: SequenceId, keep: int) -> None:
        """See Drafter. Raises InputError."""
        check_keep(keep, held := self.length(seq))
        if not keep:
            if seq in self._own:
                self._model.close(self._own.pop(seq))
                del self._tokens[seq], self._known[seq]
        elif keep < held:
            self._known[seq] = keep + 1
            self._forget(seq, keep + 1)

    def pretend_length(self, seq: SequenceId, pairs: int) -> None:
        """Act as if extended to `pairs` pairs, for timing only."""
        if seq not in self._own:
            self._own[seq] = self._model.open()
        self._tokens[seq], self._known[seq] = [0] * (pairs + 1), pairs + 1
        self._model.pretend_length(self._own[seq], pairs + 1)

    def time_pass(self, seq: SequenceId, rows: int, *, clock: Callable[[], float] = perf_counter) -> float:
        """Return the ms of reading `rows` tokens; one row is a node of the chain."""
        begin = clock()
        if rows > 1:
            self._model.prefill(self._own[seq], np.zeros(rows, np.int64))
        else:
            self._model.verify({self._own[seq]: DraftTree.root(0)})
        return (clock() - begin) * 1e3

    def close(self) -> None:
        for seq in list(self._own):
            self.rewind(seq, 0)

    def _step(self, seq: SequenceId, token: int) -> FloatArray:
        """Read one drafted token and return the logits [V] after it."""
        own = self._own[seq]
        logits: FloatArray = self._model.verify({own: DraftTree.root(token)})[own].logits[0, : self._vocab_size]
        logits = logits.copy()
        self._model.commit(own, np.zeros(1, np.int64))
        self._tokens[seq].append(token)
        return logits

    def _forget(self, seq: SequenceId, keep: int) -> None:
        """Keep the first `keep` tokens. An interrupt may have left the model with more or fewer."""
        self._logits, own, tokens = None, self._own[seq], self._tokens[seq]
        keep = min(keep, len(tokens), self._model.length(own))
        self._model.rewind(own, keep)
        del tokens[keep:]


def _candidates(logits: FloatArray, depth: int, noise: DraftNoise | None) -> Candidates:
    """Return the best tokens [1, K] after a node. depth: of these tokens. noise: see Drafter."""
    shifted = logits - logits.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    ids = np.argpartition(-logprobs, min(NOISY if noise else TOP_K, len(logprobs) - 1))
    ids = ids[: NOISY if noise else TOP_K]
    scores = logprobs[ids]
    if noise:
        scores = scores + noise(depth, ids)
        scores -= scores.max()
        scores -= np.log(np.exp(scores).sum())
    order = np.argsort(-scores, kind="stable")[:TOP_K]
    return Candidates(scores[order][None].astype(np.float32), ids[order][None])


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = zip(left, right, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
