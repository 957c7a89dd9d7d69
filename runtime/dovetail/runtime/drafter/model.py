"""A small language model as the drafter: a chain of its best tokens, with the others as leaves.

The model reads the text itself and needs no features. It runs one row for each node of the chain
and keeps the KV of a chain until the text is known to go another way. Source: speculative decoding
with a draft model (Leviathan et al., 2211.17192), here with the runners-up as further branches.

A model with another vocabulary proposes common tokens alone, and reads any token by its own ids.

Axes: T new tokens, K candidates, V own vocabulary, C tokens that the model may propose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, chain
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.drafter.session import DeviceReport, DraftNoise, check_keep
from dovetail.runtime.errors import InputError
from dovetail.runtime.system.arrays import FloatArray, SequenceId, TokenArray, common_prefix, strange_tokens
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.growth import Candidates, Judge, Level, grow_tree
from dovetail.runtime.tree.limits import TreeLimits

TOP_K = 10  # candidates of a node, as a drafter's graph has
CHUNK = 256  # tokens of a pass that reads
SLOTS = 64  # nodes of a chain, root included, as a drafter's graph has
NOISY = 256  # most probable tokens that noise can lift among the candidates


@dataclass(frozen=True, eq=False)
class Translation:
    """C tokens that a target and a draft model with another vocabulary share, and a way to read the others."""

    own: NDArray[np.int64]  # [C] ids of the draft model, each once
    target: NDArray[np.int64]  # [C] the target's ids of the same tokens, each once
    spell: Callable[[int], tuple[int, ...]]  # the target's id -> the draft model's, at least one


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


@dataclass
class _Text:
    """What the model has read of one text."""

    own: SequenceId  # the model's number of the text
    tokens: list[int] = field(default_factory=list)  # own ids, drafts included
    ends: list[int] = field(default_factory=list)  # own ids up to each known token of the target, that one included
    last: int = 0  # the last known token, by the target's id
    logits: FloatArray | None = None  # [C] after the last token, while a draft may follow

    @property
    def known(self) -> int:
        """Own ids that are no drafts."""
        return self.ends[-1] if self.ends else 0


class ModelDrafter:
    """Drafts with a small language model; implements Drafter.

    vocab_size: of the target. rows: of the model's embedding, which may have more or fewer. A token
    without a row is read as token 0, which makes a draft worse and no text wrong.
    translation: None if an id means the same token in both models.
    """

    device, device_key, reads_tokens_alone, top_k = "CPU (draft model)", "model", True, TOP_K

    def __init__(
        self, model: Model, vocab_size: int, rows: int, note: str, translation: Translation | None = None
    ) -> None:
        self.capacity = model.max_context - 1  # pairs: a text of n tokens has n - 1
        self.report = DeviceReport(note)
        self._model, self._rows, self._translation = model, rows, translation
        self._proposed = translation.own if translation else slice(vocab_size)  # C of V
        self._texts: dict[SequenceId, _Text] = {}

    def length(self, seq: SequenceId) -> int:
        return max(len(self._texts[seq].ends) - 1, 0) if seq in self._texts else 0

    def extend(
        self, seq: SequenceId, tokens: TokenArray, features: FloatArray | None = None, noise: DraftNoise | None = None
    ) -> None:
        """Append tokens [T]; the first call has the text's first token too. Raises DeviceError."""
        if not len(tokens):
            return
        text, spelled = self._text(seq), [self._spell(token) for token in tokens.tolist()]
        new, ends, dropped = list(chain.from_iterable(spelled)), text.ends, 0
        later = list(accumulate(map(len, spelled), initial=text.known))[1:]
        if later[-1] > self._model.max_context:  # tokens that the model spells longer: go on with the last half
            dropped = later[-1] - self._model.max_context // 2
            new = [*text.tokens[: text.known], *new][dropped:]
            text.ends = [0] * len(ends)
        right = common_prefix(text.tokens[text.known :], new[:-1])  # right drafts; the last token is read anew
        self._forget(text, text.known + right)
        for start in range(right, len(new), CHUNK):
            chunk = new[start : start + CHUNK]
            if len(chunk) == 1 and text.tokens:  # one row, as a node of the chain: another width would cost time
                logits = self._step(text, chunk[0])
            else:
                result = self._model.prefill(text.own, np.array(chunk, np.int64))
                logits = result.logits[-1][self._proposed].copy()
                text.tokens += chunk
        ends = [*ends, *later]
        text.ends = [max(end - dropped, 0) for end in ends] if dropped else ends
        text.logits, text.last = logits, int(tokens[-1])

    def propose(
        self, seq: SequenceId, limits: TreeLimits, judge: Judge | None = None, noise: DraftNoise | None = None
    ) -> DraftTree:
        text = self._texts.get(seq)
        if text is None or text.logits is None or len(text.tokens) != text.known:
            raise InputError("nothing to draft from: extend the drafter with the last known token first")
        logits, text.logits = text.logits, None
        names = self._translation.target if self._translation else None

        def expand(level: Level) -> Candidates:
            (own,) = self._spell(int(level.tokens[0]))
            return _candidates(self._step(text, own), level.depth + 1, noise, names)

        room = self._model.max_context - text.known + 1  # rows: the root's, and one for each node of the chain
        first = _candidates(logits, 1, noise, names)
        return grow_tree(text.last, first, expand, limits, slots=min(room, SLOTS), breadth=1, judge=judge)

    def rewind(self, seq: SequenceId, keep: int) -> None:
        """See Drafter. Raises InputError."""
        check_keep(keep, held := self.length(seq))
        if not keep:
            if text := self._texts.pop(seq, None):
                self._model.close(text.own)
        elif keep < held:
            text = self._texts[seq]
            del text.ends[keep + 1 :]
            self._forget(text, text.known)

    def pretend_length(self, seq: SequenceId, pairs: int) -> None:
        """Act as if extended to `pairs` pairs, for timing only."""
        text = self._text(seq)
        text.tokens, text.ends = [0] * (pairs + 1), [*range(1, pairs + 2)]
        self._model.pretend_length(text.own, pairs + 1)

    def time_pass(self, seq: SequenceId, rows: int, *, clock: Callable[[], float] = perf_counter) -> float:
        """Return the ms of reading `rows` tokens; one row is a node of the chain."""
        own, tokens = self._texts[seq].own, strange_tokens(0, rows, self._rows)
        begin = clock()
        if rows > 1:
            self._model.prefill(own, tokens)
        else:
            self._model.verify({own: DraftTree.root(int(tokens[0]))})
        return (clock() - begin) * 1e3

    def close(self) -> None:
        for seq in list(self._texts):
            self.rewind(seq, 0)

    def _text(self, seq: SequenceId) -> _Text:
        if seq not in self._texts:
            self._texts[seq] = _Text(self._model.open())
        return self._texts[seq]

    def _spell(self, token: int) -> tuple[int, ...]:
        """Return the own ids of a token of the target."""
        if self._translation:
            return self._translation.spell(token)
        return (token if token < self._rows else 0,)

    def _step(self, text: _Text, token: int) -> FloatArray:
        """Read one token by its own id and return the logits [C] after it."""
        result = self._model.verify({text.own: DraftTree.root(token)})[text.own]
        logits: FloatArray = result.logits[0][self._proposed].copy()
        self._model.commit(text.own, np.zeros(1, np.int64))
        text.tokens.append(token)
        return logits

    def _forget(self, text: _Text, keep: int) -> None:
        """Keep the first `keep` tokens. An interrupt may have left the model with more or fewer."""
        text.logits = None
        keep = min(keep, len(text.tokens), self._model.length(text.own))
        self._model.rewind(text.own, keep)
        del text.tokens[keep:]


def _candidates(
    logits: FloatArray, depth: int, noise: DraftNoise | None, names: NDArray[np.int64] | None
) -> Candidates:
    """Return the best tokens [1, K] after a node. logits: [C].

    depth: of these tokens. noise: see Drafter. names: [C] the target's ids; None for 0 to C - 1.
    """
    shifted = logits - logits.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    ids = np.argpartition(-logprobs, min(NOISY if noise else TOP_K, len(logprobs) - 1))
    ids = ids[: NOISY if noise else TOP_K]
    scores = logprobs[ids]
    ids = ids if names is None else names[ids]
    if noise:
        scores = scores + noise(depth, ids)
        scores -= scores.max()
        scores -= np.log(np.exp(scores).sum())
    order = np.argsort(-scores, kind="stable")[:TOP_K]
    return Candidates(scores[order][None].astype(np.float32), ids[order][None])
