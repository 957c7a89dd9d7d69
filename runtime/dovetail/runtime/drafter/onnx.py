"""The drafter: one exported graph, whose rows a runner of runners/ holds.

Axes: T tree slots, V draft vocabulary, t texts at a time. KV row i < T belongs to tree node i, row
T + j to pair j. Each text has a part of the pairs for itself. Bank row i < t is the root's feature
of text i, and the others belong to tree nodes. Row T takes features that no call reads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.drafter.graph_io import BLOCKED, CHUNK, Runner
from dovetail.runtime.drafter.session import (
    KEPT,
    Ask,
    DeviceReport,
    DraftNoise,
    check_keep,
)
from dovetail.runtime.errors import ContextOverflow, DeviceError, InputError
from dovetail.runtime.pair.manifest import DrafterFacts
from dovetail.runtime.system.arrays import FloatArray, SequenceId, TokenArray
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.growth import Candidates, Judge, Level, grow_together, levels
from dovetail.runtime.tree.limits import TreeLimits

# A call of at most LEVEL rows is timed as a tree's level, which returns children for every row. A
# larger call is timed as a read. A short read is cheaper than a level of as many rows. The
# scheduler's pace of drafts corrects for that.
LEVEL = 16

log = logging.getLogger(__name__)


class _Place(NamedTuple):
    """Where the rows of a tree are."""

    nodes: NDArray[np.int64]  # row of the tree's i-th expanded node, the root's first
    begin: int  # of the text's part
    length: int  # rows of the text


@dataclass
class _Text:
    """What the drafter holds of one text."""

    number: int  # of its part of the pairs, and of its root's bank row
    length: int = 0  # rows: one for each pair, and in a TokenDrafter one for the first token
    root: tuple[int, Candidates] | None = None  # last known token and its children


_Part = tuple[_Text, TokenArray, FloatArray]  # a text, and pairs to append


class OnnxDrafter:
    """A drafter with the KV of one text or several; implements Drafter and DraftsTogether."""

    _before: ClassVar[int] = 0  # tokens that a text has before those of its pairs
    caveat = ""  # what makes the device slower than it should be; the report has it after the note

    def __init__(self, facts: DrafterFacts, runner: Runner, *, device: str, note: str, texts: int = 1):
        """texts: at a time. Raises DeviceError if the graph or its context has no room for them."""
        if texts > 1 and not runner.many_texts:
            raise DeviceError(
                f"the drafter's graph holds one text at a time, not {texts}: export the drafter again with "
                "dovetail-export drafter, or give 1 slot"
            )
        if texts >= facts.tree_slots:
            raise DeviceError(f"the drafter's graph has {facts.tree_slots} tree slots: give fewer slots than that")
        if (part := runner.max_context // texts) < min(KEPT, runner.max_context):
            raise DeviceError(
                f"the drafter's context of {runner.max_context} pairs is too short for {texts} texts of {KEPT}: give "
                f"{runner.max_context // KEPT} slots or fewer"
            )
        self.device, self.capacity = device, part - self._before
        self.device_key = runner.device_key
        self.top_k = facts.top_k  # children that it offers
        self._facts, self._runner, self.note, self._count = facts, runner, note, texts
        self._part = part  # rows of each text
        self._feature_size = 0 if facts.reads_tokens else facts.feature_size
        self._texts: dict[SequenceId, _Text] = {}

    def length(self, seq: SequenceId) -> int:
        return max(self._texts[seq].length - self._before, 0) if seq in self._texts else 0

    @property
    def report(self) -> DeviceReport:
        return DeviceReport("; ".join(filter(None, (self.note, self.caveat))), self._runner.bus_bytes)

    def extend(
        self, seq: SequenceId, tokens: TokenArray, features: FloatArray, noise: DraftNoise | None = None
    ) -> None:
        """See Drafter. Raises ContextOverflow, InputError (shapes, ids), DeviceError."""
        text = self._text(seq)
        self._check(text.length, tokens, features)
        text.root = None
        for start in range(0, len(tokens), CHUNK):
            chunk = slice(start, min(start + CHUNK, len(tokens)))
            self._extend([(text, tokens[chunk], features[chunk])], noise)

    def extend_all(self, pairs: Mapping[SequenceId, tuple[TokenArray, FloatArray]]) -> None:
        """See DraftsTogether. Each call but the last reads CHUNK pairs. Raises as `extend` does."""
        for seq, (tokens, features) in pairs.items():
            held = self._texts[seq].length if seq in self._texts else 0
            self._check(held, tokens, features)
        group, rows = list[_Part](), 0
        for seq, (tokens, features) in pairs.items():
            text, begin = self._text(seq), 0
            text.root = None
            while begin < len(tokens):
                end = min(begin + CHUNK - rows, len(tokens))
                group.append((text, tokens[begin:end], features[begin:end]))
                begin, rows = end, rows + end - begin
                if rows == CHUNK:
                    self._extend(group)
                    group, rows = [], 0
        if group:
            self._extend(group)

    def propose(
        self, seq: SequenceId, limits: TreeLimits, judge: Judge | None = None, noise: DraftNoise | None = None
    ) -> DraftTree:
        return self._grow({seq: Ask(limits, judge)}, noise)[seq]

    def propose_all(self, asks: Mapping[SequenceId, Ask]) -> dict[SequenceId, DraftTree]:
        """See DraftsTogether. The trees share the slots, and a call runs a level of each tree."""
        return self._grow(asks)

    def rewind(self, seq: SequenceId, keep: int) -> None:
        """See Drafter. A draft then needs a new `extend`. Raises InputError."""
        check_keep(keep, held := self.length(seq))
        if not keep:
            self._texts.pop(seq, None)
        elif keep < held:
            self._texts[seq].length, self._texts[seq].root = keep + self._before, None

    def pretend_length(self, seq: SequenceId, pairs: int) -> None:
        """Act as if extended by `pairs` pairs, for timing only: KV content is arbitrary."""
        text = self._text(seq)
        text.length, text.root = pairs + self._before, None
        self._runner.touch(self._pair(text, text.length))

    def time_pass(self, seq: SequenceId, rows: int, *, clock: Callable[[], float] = perf_counter) -> float:
        """Return the ms of a call: a level of `rows` nodes up to LEVEL, else `rows` new pairs."""
        if rows > LEVEL:
            tokens, features = np.zeros(rows, np.int64), np.zeros((rows, self._feature_size), np.float32)
            begin = clock()
            self.extend(seq, tokens, features)
        else:
            nodes = np.minimum(np.arange(1, rows + 1), self._facts.tree_slots - self._count)  # all below the root
            attend = nodes[:, None] == np.arange(self._facts.tree_slots)
            level, place = Level(1, nodes, np.zeros_like(nodes), np.zeros_like(nodes), attend), self._place(seq, 0)
            begin = clock()
            self._expand([(place, level)])
        return (clock() - begin) * 1e3

    def close(self) -> None:
        self._runner.close()

    def _text(self, seq: SequenceId) -> _Text:
        """Return the record of a text, which gets the first free part of the pairs."""
        if seq not in self._texts:
            self._texts[seq] = _Text(self._free_part(self._texts, seq))
        return self._texts[seq]

    def _free_part(self, texts: Mapping[SequenceId, Any], seq: SequenceId) -> int:
        taken = {text.number for text in texts.values()}
        free = [number for number in range(self._count) if number not in taken]
        if not free:
            held = ", ".join(map(str, texts))
            raise InputError(
                f"this drafter has room for {self._count} sequence{'s' if self._count > 1 else ''} and holds number "
                f"{held}: rewind one to 0 first, or decode number {seq} without a drafter"
            )
        return free[0]

    def _pair(self, text: _Text, index: int) -> int:
        """Return the number of a text's row among the rows of all texts."""
        return text.number * self._part + index

    def _check_top_k(self, limits: TreeLimits) -> None:
        if limits.top_k > self._facts.top_k:
            raise InputError(f"tree top_k {limits.top_k} exceeds the drafter's {self._facts.top_k}: lower it")

    def _extend(self, parts: Sequence[_Part], noise: DraftNoise | None = None) -> None:
        """Read pairs of several texts in one call of at most CHUNK rows. The last row of each text comes last."""
        slots, count = self._facts.tree_slots, len(parts)
        places = np.cumsum([0, *(len(tokens) - 1 for _, tokens, _ in parts)])
        n, ends = int(places[-1]) + count, int(places[-1])
        rows = self._runner.rows(n)
        rows.feature_rows[:n] = np.arange(slots + 1, slots + 1 + n)
        rows.bank_slots[:n] = slots
        rows.tree_mask[:n] = BLOCKED
        highest = 0
        for index, (text, tokens, features) in enumerate(parts):
            at = np.append(np.arange(places[index], places[index + 1]), ends + index)
            positions, begin = text.length + np.arange(len(tokens)), self._pair(text, 0)
            rows.input_ids[at] = tokens
            rows.position_ids[at] = positions
            if self._feature_size:
                rows.features[at] = features
            rows.kv_slots[at] = slots + begin + positions
            rows.context_begin[at] = begin
            rows.context_end[at] = begin + positions + 1
            rows.bank_slots[ends + index] = text.number
            highest = max(highest, begin + text.length + len(tokens))
        found = self._run(n, highest, self._noise(1, noise), upload_features=self._feature_size > 0, answers=count)
        for index, (text, tokens, _) in enumerate(parts):
            row = slice(len(found.ids) - count + index, len(found.ids) - count + index + 1)
            text.length += len(tokens)
            text.root = int(tokens[-1]), Candidates(found.logprobs[row].copy(), found.ids[row].copy())

    def _grow(self, asks: Mapping[SequenceId, Ask], noise: DraftNoise | None = None) -> dict[SequenceId, DraftTree]:
        """Grow a tree for each text. Each tree has an equal share of the slots behind the roots' rows."""
        share, growing, places = (self._facts.tree_slots - self._count) // len(asks), [], []
        for index, (seq, (limits, judge)) in enumerate(asks.items()):
            text = self._texts.get(seq)
            if text is None or text.root is None:
                raise InputError("nothing to draft from: extend the drafter with the last known token first")
            self._check_top_k(limits)
            growing.append(levels(*text.root, limits, slots=1 + share, judge=judge))
            places.append(self._place(seq, index * share))

        def expand(wanted: Mapping[int, Level]) -> dict[int, Candidates]:
            found = self._expand([(places[index], level) for index, level in wanted.items()], noise)
            ends = np.cumsum([0, *(len(level.rows) for level in wanted.values())])
            parts = zip(wanted, ends, ends[1:], strict=False)
            return {index: Candidates(found.logprobs[i:j], found.ids[i:j]) for index, i, j in parts}

        return dict(zip(asks, grow_together(growing, expand), strict=True))

    def _place(self, seq: SequenceId, before: int) -> _Place:
        """Return where a tree's rows are. before: slots of the trees before it."""
        text = self._text(seq)
        nodes = np.arange(self._facts.tree_slots) + self._count - 1 + before
        nodes[0] = text.number
        return _Place(nodes, self._pair(text, 0), text.length)

    def _expand(self, wanted: Sequence[tuple[_Place, Level]], noise: DraftNoise | None = None) -> Candidates:
        """Run one level of each tree: features of the parents come from the bank."""
        n = sum(len(level.rows) for _, level in wanted)
        rows, at, highest = self._runner.rows(n), 0, 0
        rows.tree_mask[:n] = BLOCKED
        for place, level in wanted:
            part = slice(at, at + len(level.rows))
            rows.input_ids[part] = level.tokens
            rows.position_ids[part] = place.length - 1 + level.depth
            rows.feature_rows[part] = place.nodes[level.parent_rows]
            rows.kv_slots[part] = rows.bank_slots[part] = place.nodes[level.rows]
            rows.context_begin[part] = place.begin
            rows.context_end[part] = place.begin + place.length
            row, node = np.nonzero(level.attend)
            rows.tree_mask[at + row, place.nodes[node]] = 0
            at, highest = part.stop, max(highest, place.begin + place.length)
        (depth, *_) = (level.depth for _, level in wanted)  # with noise there is one tree
        return self._run(n, highest, self._noise(depth + 1, noise), upload_features=False)

    def _noise(self, depth: int, noise: DraftNoise | None) -> FloatArray | None:
        """Return [V] for children at `depth`; None without sampling, or if the graph takes none."""
        ids = self._runner.draft_ids
        return None if noise is None or ids is None else noise(depth, ids)

    def _run(
        self, n: int, context: int, noise: FloatArray | None, *, upload_features: bool, answers: int | None = None
    ) -> Candidates:
        found = self._runner.run(n, context, noise, upload_features=upload_features, answers=answers)
        if not np.isfinite(found.logprobs).all():
            self._forget()
            self._runner.clear()
            raise DeviceError(
                f"the drafter on {self.device} returned log-probabilities that are no numbers: use another "
                "--drafter-device, or generate without speculation"
            )
        return found

    def _forget(self) -> None:
        """Forget all texts, whose KV the runner is about to clear."""
        self._texts.clear()

    def _check(self, held: int, tokens: TokenArray, features: FloatArray) -> None:
        vocabulary, size = self._facts.target_vocab_size, self._feature_size
        if features.shape != (len(tokens), size):
            raise InputError(f"features {features.shape} do not fit {len(tokens)} tokens of feature size {size}")
        if held + len(tokens) > self._part:
            raise ContextOverflow(
                f"{held + len(tokens)} tokens exceed the drafter's context of {self._part}: shorten "
                "the prompt or generate without speculation"
            )
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
            raise InputError(f"token ids {int(tokens.min())}..{int(tokens.max())} leave the vocabulary of {vocabulary}")


class TokenDrafter(OnnxDrafter):
    """A drafter that reads a text by its tokens alone; a small language model is such a drafter.

    A row is a token. A text of n pairs has n + 1 tokens, because its first token is no pair's.
    """

    reads_tokens_alone = True
    _before = 1
