"""The texts whose first layers run on a device: which tokens it holds of each, and the calls of a pass.

A text is its tokens. The device has buffers for a number of texts; a text without a buffer gets
that of the text which ran longest ago, and is read again from its tokens.

Axes: T rows of a text in a pass, R rows of a call, H hidden size, D feature size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.errors import InputError
from dovetail.runtime.system.arrays import SequenceId, TokenArray, common_prefix
from dovetail.runtime.target.front import FrontPass
from dovetail.runtime.target.graph import HIDDEN, MIXED
from dovetail.runtime.target.layers.attention import LARGEST_TREE, ROWS, begin, prefixes
from dovetail.runtime.target.layers.device import LayerDevice
from dovetail.runtime.target.layers.session import Call, LayerSession
from dovetail.runtime.tree.draft_tree import DraftTree


@dataclass
class _Text:
    """One text. `held` grows after a call and shrinks before one, so that an interrupt leaves it right."""

    tokens: list[int] = field(default_factory=list)  # committed
    buffer: int | None = None  # without one the next two say nothing
    held: int = 0  # first tokens whose keys and values the buffer has
    moves: list[tuple[int, int]] = field(default_factory=list)  # (slot, slot) of rows that the next call moves
    offer: DraftTree | None = None  # verified, until `commit`
    turn: int = 0  # of its last call


class FirstLayers:
    """The target's first layers on a device; implements Front."""

    largest_tree = LARGEST_TREE

    def __init__(self, session: LayerSession, count: int, device: LayerDevice) -> None:
        """count: of layers."""
        self.count, self.device, self.device_key = count, device.name, device.key
        self._session = session
        self._prefixes = np.array(prefixes(session.capacity))
        self._texts: dict[SequenceId, _Text] = {}
        self._turns = 0

    @property
    def bus_bytes(self) -> int:
        return self._session.bus_bytes

    def open(self, seq: SequenceId) -> None:
        self._texts[seq] = _Text()

    def fork(self, seq: SequenceId, new: SequenceId, keep: int) -> None:
        """Begin a text with the first tokens of another. Its first call copies them on the device."""
        self._texts[new] = _Text(self._texts[seq].tokens[:keep])

    def tokens(self, seq: SequenceId) -> TokenArray:
        return np.array(self._texts[seq].tokens, np.int64)

    def read(self, seq: SequenceId, length: int, tokens: TokenArray) -> FrontPass:
        """See Front. Raises DeviceError."""
        text = self._ready(seq, length)
        found = self._chain(text, length, tokens)
        text.tokens += tokens.tolist()
        text.held = len(text.tokens)
        return found

    def verify(self, seq: SequenceId, length: int, tree: DraftTree) -> FrontPass:
        """See Front. Raises InputError for a tree that is too large, DeviceError."""
        text = self._ready(seq, length)
        chain = (tree.parents == np.arange(-1, len(tree) - 1)).all()
        found = self._chain(text, length, tree.tokens) if chain else self._tree(text, length, tree)
        text.offer = tree
        return found

    def commit(self, seq: SequenceId, path: NDArray[np.int64]) -> None:
        text = self._texts[seq]
        assert text.offer is not None
        length = len(text.tokens)
        if text.buffer is not None and text.held == length:
            moved = [(length + node, length + place) for place, node in enumerate(path.tolist()) if node != place]
            text.moves, text.held = [*text.moves, *moved], length + len(path)
        text.tokens += text.offer.tokens[path].tolist()
        text.offer = None

    def rewind(self, seq: SequenceId, keep: int) -> None:
        if (text := self._texts.get(seq)) is None:  # an interrupted `close` may come twice
            return
        text.held, text.offer = min(text.held, keep), None
        text.moves = [(source, target) for source, target in text.moves if target < keep]
        del text.tokens[keep:]

    def close(self, seq: SequenceId) -> None:
        self._texts.pop(seq, None)

    def pretend_length(self, seq: SequenceId, tokens: int) -> None:
        """Act as if `tokens` tokens were committed, for timing only."""
        text = self._texts[seq]
        self._take_buffer(text)
        text.tokens, text.held, text.moves, text.offer = [0] * tokens, tokens, [], None

    def release(self) -> None:
        """Free the device's memory."""
        self._session.close()

    # --- buffers

    def _ready(self, seq: SequenceId, length: int) -> _Text:
        """Return a text of which the device holds `length` tokens. An interrupted pass may have committed more."""
        self.rewind(seq, length)
        text = self._texts[seq]
        if text.buffer is None:
            self._begin(text)
        self._turns += 1
        text.turn = self._turns
        if text.held < len(text.tokens):
            unread = np.array(text.tokens[text.held :], np.int64)
            self._chain(text, text.held, unread, wanted=False)
            text.held = len(text.tokens)
        return text

    def _begin(self, text: _Text) -> None:
        """Give a text a buffer, if possible with what another text has in common with it."""
        others = [other for other in self._texts.values() if other.buffer is not None]
        shared = {id(other): common_prefix(other.tokens[: other.held], text.tokens) for other in others}
        source = max(others, key=lambda other: shared[id(other)], default=None)
        if source is None or shared[id(source)] <= ROWS:  # a copy takes longer than a call
            self._take_buffer(text)
            return
        moves = source.moves
        self._take_buffer(text, other_than=source)
        assert text.buffer is not None
        if source.buffer is None:  # the only buffer
            return
        given = Call.empty(self._session.capacity)
        _fill_moves(given, moves)
        self._session.copy(source.buffer, text.buffer, given, int(self._prefixes[0]))
        text.held = shared[id(source)]

    def _take_buffer(self, text: _Text, other_than: _Text | None = None) -> None:
        """Give a text a free buffer, or that of the text which ran longest ago."""
        if text.buffer is not None:
            return
        holders = [other for other in self._texts.values() if other.buffer is not None]
        free = {*range(self._session.texts)} - {other.buffer for other in holders}
        if not free:
            left = min(holders, key=lambda other: (other is other_than, other.turn))
            free, left.buffer = {left.buffer}, None
        text.buffer, text.held, text.moves = min(number for number in free if number is not None), 0, []

    # --- calls

    def _chain(self, text: _Text, length: int, tokens: TokenArray, *, wanted: bool = True) -> FrontPass:
        """Run tokens that follow one another after `length` tokens. wanted: whether anybody reads the result."""
        found = []
        parents = np.maximum(np.arange(-1, ROWS - 1), 0)
        positions = length + np.arange(len(tokens))
        for part in self._parts(positions):
            begins = int(positions[part[0]])
            found.append(self._call(text, begins, tokens[part], positions[part], positions[part], parents, wanted))
        return _joined(found)

    def _tree(self, text: _Text, length: int, tree: DraftTree) -> FrontPass:
        depths = tree.depths()
        if len(tree) > LARGEST_TREE.nodes or depths.max() > LARGEST_TREE.depth:
            raise InputError(
                f"a tree of {len(tree)} nodes and depth {depths.max()} is too large for layers on the GPU, which take "
                f"{LARGEST_TREE.nodes} nodes and a depth of {LARGEST_TREE.depth}: lower --width or --depth, or "
                "leave out --gpu-layers"
            )
        parents = np.maximum(tree.parents, 0)
        positions, slots = length + depths, length + np.arange(len(tree))
        order, found = [], []
        for part in self._parts(positions):
            order.append(part)
            found.append(self._call(text, length, tree.tokens[part], positions[part], slots[part], parents, True))
        return _joined(found).at(np.argsort(np.concatenate(order)))

    def _parts(self, positions: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Yield the rows of each call: those with one size of the first part, parents before children."""
        sizes = np.searchsorted(self._prefixes, begin(positions))
        for size in np.unique(sizes):
            rows = np.flatnonzero(sizes == size)
            for start in range(0, len(rows), ROWS):
                yield rows[start : start + ROWS]

    def _call(
        self, text: _Text, length: int, tokens: TokenArray, positions: NDArray[np.int64],
        slots: NDArray[np.int64], parents: NDArray[np.int64], wanted: bool,
    ) -> FrontPass:  # fmt: skip
        assert text.buffer is not None
        count = len(tokens)
        given = Call.empty(self._session.capacity)
        given.ids[:count], given.positions[:count], given.slots[:count] = tokens, positions, slots
        given.parents[: len(parents)], given.length[:] = parents, length
        prefix = int(self._prefixes[np.searchsorted(self._prefixes, begin(positions[:1]))[0]])
        moves, held = text.moves, text.held
        _fill_moves(given, moves)
        if moves:  # an interrupt leaves it open whether they were made
            text.held, text.moves = min(target for _, target in moves), []
        found = self._session.run(text.buffer, given, prefix, count if wanted else 1)
        text.held = held
        return FrontPass(found[HIDDEN], found.get(MIXED))


def _fill_moves(given: Call, moves: list[tuple[int, int]]) -> None:
    for index, (source, target) in enumerate(moves):
        given.sources[index], given.targets[index] = source, target


def _joined(parts: list[FrontPass]) -> FrontPass:
    if len(parts) == 1:
        return parts[0]
    mixed = [part.mixed for part in parts if part.mixed is not None]
    return FrontPass(np.concatenate([part.hidden for part in parts]), np.concatenate(mixed) if mixed else None)
