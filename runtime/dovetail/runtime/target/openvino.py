"""The target on the CPU: OpenVINO paged attention verifies a whole token tree in one pass.

Axes: N nodes, T new tokens, V target vocabulary, D feature size.

Every path from a tree's root to a leaf is a causal sequence of its own.  The paths share the KV blocks of the committed
text but for the last, which is rarely full: each path has a copy of it, and blocks of its own after it.  A row's logits
and its KV are then the same bits as in a chain: they depend on the tokens before it alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.errors import ContextOverflow, DeviceError, InputError
from dovetail.runtime.pair.manifest import Manifest
from dovetail.runtime.system.arrays import TokenArray
from dovetail.runtime.target.blocks import BlockIds
from dovetail.runtime.target.features import FeatureMix
from dovetail.runtime.target.paged import ALONE, BLOCK, REQUIRED, TOGETHER, Batch, PagedModel, Part
from dovetail.runtime.target.session import TargetPass
from dovetail.runtime.tree.draft_tree import DraftTree

# OpenVINO prepares every size of a pass, and keeps what it prepared: prompts come in few.
_SMALL_PROMPTS = (2, 4, 8)
_STEP, _LARGE, _LARGE_STEP = 8, 64, 16  # then multiples of 8, and of 16 beyond 64 (docs/results/memory.md)
_SPARE_BLOCKS = 64  # beside those of a full context: a tree's paths end in blocks of their own


class OpenVINOTarget:
    """One conversation of the target LLM; implements `TargetSession`.

    exact: no row is computed alone, so that equal tokens give equal bits in every pass.  Without it a tree of one node
    runs through OpenVINO's kernel for single rows, which is quicker and adds in another order.

    `_blocks` are the conversation's KV blocks in the order of its text, and after them those that trees may use.
    """

    device = "CPU"

    def __init__(self, model: PagedModel, max_context: int, *, exact: bool = True):
        self.model = model
        self.max_context = max_context
        self.exact = exact
        self._owner = model.pool.new_owner()
        self._blocks: BlockIds = np.zeros(0, np.int32)
        self._length = 0
        self._verified: _Paths | None = None  # of the verified tree, until it is committed
        model.reserve(model.blocks + _blocks_for(max_context) + _SPARE_BLOCKS)

    @classmethod
    def open(
        cls,
        pair: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        ov_config: Mapping[str, str] | None = None,
        exact: bool = True,
    ) -> OpenVINOTarget:
        """Load the target of a pair; `threads` defaults to what OpenVINO finds best.

        ov_config: properties of OpenVINO's CPU plugin.  exact: see the class.  If the pair's drafter reads more than
        the last feature, the target's graph mixes that in.  Raises IntegrityError, InputError (a property that
        verification depends on), DeviceError (one that OpenVINO refuses).
        """
        if taken := [name for name in ov_config or () if name.endswith("CACHE_PRECISION")]:
            required = REQUIRED["KV_CACHE_PRECISION"]
            raise InputError(f"{taken[0]} must stay {required}, trees depend on it: leave it out")
        facts, xml = manifest.drafter, pair / "target" / "openvino_model.xml"
        mix = facts.files.get("features") if facts else None
        features = FeatureMix.load(pair / mix, facts) if facts and mix else None
        model = PagedModel(xml, threads=threads, properties=ov_config, mix=features)
        return cls(model, manifest.target.max_context, exact=exact)

    def another(self) -> OpenVINOTarget:
        """An empty conversation of the same model: `verify_together` runs both in one pass."""
        return OpenVINOTarget(self.model, self.max_context, exact=self.exact)

    @property
    def length(self) -> int:
        """Tokens committed to the KV cache."""
        return self._length

    def prefill(self, tokens: TokenArray) -> TargetPass:
        """Append and commit tokens [T]; logits [1, V] of the last one, features [T, D]."""
        count = len(tokens)
        self._verified = None
        chain = _Paths([np.arange(count)], self._length, TOGETHER)
        part = self._part(tokens, np.arange(count), chain, np.array([count - 1]))
        logits, features = self.model.run(Batch.of([part], prompt_rows(count)))
        self._length += count
        return TargetPass(logits[:1], features[:count])

    def verify(self, tree: DraftTree) -> TargetPass:
        """All nodes in one pass: logits [N, V], features [N, D]; each row has the bits that it has in a chain."""
        return verify_together({self: tree})[self]

    def commit(self, path: NDArray[np.int64]) -> None:
        """Keep the KV of `path`, root first: its blocks become the conversation's."""
        found = self._verified.find(path) if self._verified else None
        if found is None:
            raise DeviceError(f"commit of {len(path)} nodes that are no path of a verified tree: verify the tree first")
        full = self._length // BLOCK
        others = np.delete(self._blocks[full:], slice(found.start - full, found.stop - full))
        # One assignment each: an interrupt between them leaves the old text, whose last block the path has copied.
        self._blocks = np.concatenate([self._blocks[:full], self._blocks[found], others])
        self._length += len(path)
        self._verified = None

    def reset(self, keep: int = 0) -> None:
        """Forget everything after the first `keep` tokens, and any verified tree."""
        self._length = min(self._length, keep)
        self._verified = None
        self.model.pool.keep(self._owner, self._blocks)

    def close(self) -> None:
        """Forget everything and leave the KV blocks to other conversations of the model."""
        self._blocks = np.zeros(0, np.int32)
        self.reset()

    def assume(self, length: int) -> None:
        """Behave as if `length` tokens were committed, for timing alone: their KV is whatever lies there."""
        blocks = _blocks_for(length)
        self._hold(blocks)
        self.model.touch(self._blocks[:blocks])
        self._length, self._verified = length, None

    @property
    def least_rows(self) -> int:
        """Rows that a pass has at least."""
        return TOGETHER if self.exact else ALONE

    def _offer(self, tree: DraftTree) -> Part:
        """What `tree` adds to a pass."""
        self._verified = None
        paths = _Paths(tree.paths(), self._length, self.least_rows)
        part = self._part(tree.tokens, tree.depths(), paths, np.arange(len(tree)))
        self._verified = paths
        return part

    def _part(self, tokens: TokenArray, depths: NDArray[np.int64], paths: _Paths, wanted: NDArray[np.int64]) -> Part:
        """Rows for `tokens`, `depths` after the committed text; every path gets its blocks, the last one's copy first.

        Raises ContextOverflow, DeviceError.
        """
        if (end := self._length + int(depths.max()) + 1) > self.max_context:
            raise ContextOverflow(
                f"{end} tokens exceed the context of {self.max_context}: shorten the prompt or ask for fewer tokens"
            )
        full, part = divmod(self._length, BLOCK)
        self._hold(paths.ends[-1].stop)
        begun = self._blocks[full:]
        if part and len(paths.rows) > 1:
            copies = begun[[blocks.start - full for blocks in paths.ends[1:]]]
            self.model.copy_rows(int(begun[0]), copies, part)
        tables = [np.concatenate([self._blocks[:full], self._blocks[blocks]]) for blocks in paths.ends]
        return Part(np.asarray(tokens, np.int64), self._length + depths, paths.rows, self._length, tables, wanted)

    def _hold(self, blocks: int) -> None:
        """Own at least so many blocks."""
        if (missing := blocks - len(self._blocks)) > 0:
            pool = self.model.pool
            pool.keep(self._owner, self._blocks)
            self.model.reserve(int(np.count_nonzero(pool.owners)) + missing)
            self._blocks = np.concatenate([self._blocks, pool.take(self._owner, missing)])


class _Paths:
    """The paths of a tree, or of a prompt the only one, and where their blocks lie.

    rows: the rows of each path; a shorter one than `least` repeats its row.  ends: for each path the part of the
    conversation's blocks that is its own, which begins with the block that the text of `length` tokens ends in.
    """

    def __init__(self, rows: Sequence[NDArray[np.int64]], length: int, least: int) -> None:
        self.rows = [path if len(path) >= least else np.repeat(path, least) for path in rows]
        self.ends: list[slice] = []
        full, part = divmod(length, BLOCK)
        at = full
        for path in self.rows:
            begin, at = at, at + _blocks_for(part + len(path))
            self.ends.append(slice(begin, at))

    def find(self, path: NDArray[np.int64]) -> slice | None:
        """The blocks of a path that begins with `path`; None if there is none."""
        if not len(path):
            return None
        for rows, blocks in zip(self.rows, self.ends, strict=True):
            if np.array_equal(rows[: len(path)], path):
                return blocks
        return None


def verify_together(offers: Mapping[OpenVINOTarget, DraftTree]) -> dict[OpenVINOTarget, TargetPass]:
    """Every conversation's tree in one pass.  Raises InputError if they do not share one model (see `another`)."""
    if len({id(target.model) for target in offers}) != 1:
        raise InputError("conversations in one pass must be of one model: make the others with another()")
    parts = {target: target._offer(tree) for target, tree in offers.items()}
    first = next(iter(offers))
    rows = sum(map(len, offers.values()))
    logits, features = first.model.run(Batch.of([*parts.values()], max(rows, first.least_rows)))
    results, begin = {}, 0
    for target, tree in offers.items():
        end = begin + len(tree)
        results[target] = TargetPass(logits[begin:end], features[begin:end])
        begin = end
    return results


def _blocks_for(tokens: int) -> int:
    """KV blocks that hold `tokens` tokens."""
    return -(-tokens // BLOCK)


def prompt_rows(count: int) -> int:
    """Rows of the pass that reads `count` tokens of a prompt."""
    if count <= _SMALL_PROMPTS[-1]:
        return next(rows for rows in _SMALL_PROMPTS if rows >= count)
    step = _STEP if count <= _LARGE else _LARGE_STEP
    return -(-count // step) * step
