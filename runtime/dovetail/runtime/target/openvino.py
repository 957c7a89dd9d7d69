"""The target on the CPU: OpenVINO paged attention verifies a whole token tree in one pass.

Axes: N nodes, T new tokens, V target vocabulary, D feature size.

Every path from a tree's root to a leaf has KV blocks of its own. The paths share the blocks of the
committed text except the last block, which is rarely full and of which each has its own. The attention
takes each row of a path as a sequence that ends in the row, so that one kernel computes all rows of
answers, whatever the tree. A row's logits and KV depend on the tokens before the row alone. They are
therefore the same bits as in a chain. Prompts are sequences of many rows, for which OpenVINO's kernel
is quicker and adds in another order. Which tokens were prompt is thus a part of a text.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.errors import ContextOverflow, DeviceError, InputError
from dovetail.runtime.pair.layout import TARGET_GRAPH
from dovetail.runtime.pair.manifest import Manifest
from dovetail.runtime.system.arrays import SequenceId, TokenArray, strange_tokens
from dovetail.runtime.target.blocks import BlockIds
from dovetail.runtime.target.features import FeatureMix
from dovetail.runtime.target.front import Front, FrontPass, Take
from dovetail.runtime.target.paged import ALONE, BLOCK, TOGETHER, Batch, PagedModel, Part
from dovetail.runtime.target.paths import Paths, blocks_for, prompt_rows
from dovetail.runtime.target.session import NO_PROMPTS, TargetPass
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.limits import LargestTree

_SPARE_BLOCKS = 64  # on top of a full context: each path of a tree ends in blocks of its own
_AGAIN = 256  # tokens of a pass that reads a text again
_SHARED_SPARE_BLOCKS = 191  # for the trees of many texts, and the block that each of them ends in

log = logging.getLogger(__name__)


@dataclass
class _Text:
    """The target's record of one sequence."""

    blocks: BlockIds = field(default_factory=lambda: np.zeros(0, np.int32))  # the text's in order, then for trees
    length: int = 0  # committed tokens that the blocks hold
    shared: int = 0  # first blocks that other texts may have too: full, and never written to
    verified: Paths | None = None  # paths of the verified tree, until `commit`
    lost: TokenArray | None = None  # all committed tokens, if the blocks do not hold all of them


class OpenVINOTarget:
    """The target LLM on the CPU; implements `Target`.

    exact: let no matrix have one row, so that equal tokens give equal bits in every pass. Without
    `exact` a pass of one node runs through OpenVINO's kernels for single rows, which are quicker and add in
    another order. sequences: how many whole texts get memory at once; more texts can be opened.
    kv_cache: bytes for the KV of all texts, which then never grows; None for no limit. Only if first layers
    move here, whose KV was elsewhere, it grows to the size of one context, if it is smaller than that.
    """

    def __init__(
        self,
        model: PagedModel,
        max_context: int,
        *,
        exact: bool = True,
        sequences: int = 1,
        kv_cache: int | None = None,
        open_whole: Callable[[], PagedModel] | None = None,
    ):
        """open_whole: opens the model with all layers, if the first ones run elsewhere and that fails.

        Raises DeviceError, InputError for a kv_cache that is too small for one context.
        """
        self.model, self._open_whole = model, open_whole
        self._left_bytes = 0  # that a front moved which has failed
        self.max_context = max_context
        self.exact = exact
        self._texts: dict[SequenceId, _Text] = {}
        self._kv_cache = kv_cache
        if kv_cache is None:
            self._reserve(sequences)
            return
        least = self._limited_blocks(1)
        if kv_cache < least * model.block_bytes:
            raise InputError(
                f"kv_cache of {kv_cache} bytes is too small for a context of {max_context} tokens: give "
                f"{least * model.block_bytes} bytes or more, or export the target with a smaller --max-context"
            )
        model.reserve(min(kv_cache // model.block_bytes, self._limited_blocks(sequences)))

    @classmethod
    def load(
        cls,
        pair: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        ov_config: Mapping[str, str] | None = None,
        exact: bool = True,
        sequences: int = 1,
        kv_cache: int | None = None,
        take: Take | None = None,
    ) -> OpenVINOTarget:
        """Load the target of a pair, with the features that its drafter reads mixed in.

        threads: default OpenVINO's own choice. ov_config: properties of OpenVINO's CPU plugin.
        take: takes the first layers out, which run elsewhere.
        Raises IntegrityError, InputError (a property that verification depends on), DeviceError.
        """
        facts, xml = manifest.drafter, pair / TARGET_GRAPH
        mix = facts.files.get("features") if facts else None
        features = FeatureMix.load(pair / mix, facts) if facts and mix else None
        opened = partial(PagedModel, xml, threads=threads, properties=ov_config, mix=features)
        return cls(
            opened(take=take), manifest.target.max_context, exact=exact, sequences=sequences, kv_cache=kv_cache,
            open_whole=opened if take else None,
        )  # fmt: skip

    def open(self) -> SequenceId:
        seq = self.model.pool.new_owner()  # the number of the sequence and of its blocks
        self._reserve(len(self._texts) + 1)
        if self._front:
            self._front.open(seq)
        self._texts[seq] = _Text()
        return seq

    def length(self, seq: SequenceId) -> int:
        text = self._text(seq)
        return text.length if text.lost is None else len(text.lost)

    def fork(self, seq: SequenceId, keep: int) -> SequenceId:
        """See Target. Both texts have the same full blocks; the new text begins after them."""
        self._read_again(seq)
        source, new = self._text(seq), self.open()
        shared = min(keep, source.length) // BLOCK
        blocks = source.blocks[:shared].copy()
        self.model.pool.share(blocks)
        source.shared = max(source.shared, shared)
        if self._front:
            self._front.fork(seq, new, shared * BLOCK)
        self._texts[new] = _Text(blocks, shared * BLOCK, shared)
        return new

    @property
    def room(self) -> int:
        """See Target."""
        if self._kv_cache is None:  # the pool grows
            return sys.maxsize
        lost = sum(
            blocks_for(len(text.lost)) - len(text.blocks) for text in self._texts.values() if text.lost is not None
        )
        return BLOCK * max(self.model.pool.free - lost - _SHARED_SPARE_BLOCKS, 0)

    def prefill(self, seq: SequenceId, tokens: TokenArray) -> TargetPass:
        return self._pass({}, {seq: tokens}, prompt_rows(len(tokens)), TOGETHER)[seq]

    def verify(
        self,
        offers: Mapping[SequenceId, DraftTree],
        prompts: Mapping[SequenceId, TokenArray] = NO_PROMPTS,
        *,
        rows: int = 0,
    ) -> dict[SequenceId, TargetPass]:
        rows = max(rows, sum(map(len, offers.values())))
        if prompts:
            rows = prompt_rows(rows + sum(map(len, prompts.values())))
        return self._pass(offers, prompts, max(rows, self.least_rows), self.least_rows)

    def commit(self, seq: SequenceId, path: NDArray[np.int64]) -> None:
        text = self._text(seq)
        found = text.verified.find(path) if text.verified else None
        if found is None:
            raise DeviceError(f"commit of {len(path)} nodes, not a path of a verified tree: verify the tree first")
        if self._front:  # first: it can go back
            self._front.commit(seq, path)
        full = text.length // BLOCK
        if found.start > full:  # not the first path, whose blocks are in place
            others = np.delete(text.blocks[full:], slice(found.start - full, found.stop - full))
            # One assignment: an interrupt after it leaves the old text, whose last block the path
            # has copied.
            text.blocks = np.concatenate([text.blocks[:full], text.blocks[found], others])
        text.length += len(path)
        text.verified = None

    def rewind(self, seq: SequenceId, keep: int) -> None:
        text = self._text(seq)
        if text.lost is not None:
            text.lost = text.lost[:keep]
        text.length = min(text.length, keep)
        text.verified = None
        if self._front:
            self._front.rewind(seq, self.length(seq))
        if text.shared > text.length // BLOCK:
            self._unshare(seq, text)
        text.blocks = text.blocks[: blocks_for(text.length)]
        self.model.pool.keep(seq, text.blocks)

    def _unshare(self, seq: SequenceId, text: _Text) -> None:
        """Leave the shared blocks after the text's end. A block that the text ends in is copied."""
        full, part = divmod(text.length, BLOCK)
        left = text.blocks[full : text.shared]
        text.blocks, text.shared = text.blocks[:full], full
        if part:
            self._hold(seq, full + 1)
            self.model.copy_rows(int(left[0]), text.blocks[full:], part)
        self.model.pool.release(left)

    def close(self, seq: SequenceId) -> None:
        if text := self._texts.get(seq):
            self.rewind(seq, 0)
            text.blocks = np.zeros(0, np.int32)
            self.model.pool.keep(seq, text.blocks)
            if self._front:
                self._front.close(seq)
            del self._texts[seq]

    def pretend_length(self, seq: SequenceId, tokens: int) -> None:
        """Act as if `tokens` tokens were committed, for timing only: KV content is arbitrary."""
        text, blocks = self._text(seq), blocks_for(tokens)
        self._hold(seq, blocks)
        self.model.fault_in(text.blocks[:blocks])
        if self._front:
            self._front.pretend_length(seq, tokens)
        text.length, text.lost, text.verified = tokens, None, None

    def time_pass(self, seq: SequenceId, rows: int, *, clock: Callable[[], float] = perf_counter) -> float:
        """Return the ms of a pass over a chain of `rows` nodes.

        The nodes are different tokens: equal tokens would share the experts that a mixture of experts reads.
        """
        tree = DraftTree.chain(strange_tokens(self.length(seq), rows, self.model.vocab_size))
        begin = clock()
        self.verify({seq: tree})
        return (clock() - begin) * 1e3

    @property
    def least_rows(self) -> int:
        return TOGETHER if self.exact else ALONE

    @property
    def plain_rows(self) -> int:
        """The number of nodes that take as long as one. A copy of a row is not free, but reads no experts."""
        return ALONE if self.model.experts else self.least_rows

    def _reserve(self, sequences: int) -> None:
        """Reserve blocks for `sequences` whole contexts, and for the trees of one sequence."""
        if self._kv_cache is not None:
            return
        self.model.reserve(sequences * blocks_for(self.max_context) + _SPARE_BLOCKS)

    def _text(self, seq: SequenceId) -> _Text:
        if seq not in self._texts:
            raise InputError(f"sequence {seq!r} is not open on this target: take the number that its open() gives")
        return self._texts[seq]

    def _limited_blocks(self, sequences: int) -> int:
        """Return the blocks of `sequences` whole contexts under a limit of memory, and of trees."""
        return sequences * blocks_for(self.max_context) + _SHARED_SPARE_BLOCKS + 1  # the model takes one for surplus

    def _pass(
        self, offers: Mapping[SequenceId, DraftTree], prompts: Mapping[SequenceId, TokenArray], rows: int, least: int
    ) -> dict[SequenceId, TargetPass]:
        """Run one pass, after what its texts have lost. It runs twice if the first layers move to the CPU meanwhile."""
        while True:
            for seq in (*prompts, *offers):
                self._read_again(seq)
            if (found := self._run(offers, prompts, rows, least)) is not None:
                return found

    def _read_again(self, seq: SequenceId) -> None:
        """Read the tokens again that a text has lost. An interrupt leaves the rest of them lost."""
        while (text := self._text(seq)).lost is not None:
            if text.length >= len(text.lost):
                text.lost = None
                return
            tokens = text.lost[text.length : text.length + _AGAIN]
            self._run({}, {seq: tokens}, prompt_rows(len(tokens)), TOGETHER)

    def _run(
        self, offers: Mapping[SequenceId, DraftTree], prompts: Mapping[SequenceId, TokenArray], rows: int, least: int
    ) -> dict[SequenceId, TargetPass] | None:
        """Run one pass of `rows` rows, of which the lm_head computes at least `least`.

        None if the first layers failed, which now run here: all texts have lost their KV.
        """
        parts = dict[SequenceId, Part]()
        for seq, tokens in prompts.items():
            order = np.arange(len(tokens))
            path = order if len(order) >= TOGETHER else np.repeat(order, TOGETHER)
            parts[seq] = self._part(seq, tokens, order, Paths([path], self._text(seq).length), order[-1:], split=False)
        for seq, tree in offers.items():
            paths = Paths(tree.paths(), self._text(seq).length)
            parts[seq] = self._part(seq, tree.tokens, tree.depths(), paths, np.arange(len(tree)), split=True)
            self._texts[seq].verified = paths
        fronts = self._run_front(offers, prompts)
        if fronts is None:
            return None
        # Passes of one size get one number of sequences, unless their trees have more paths: a change
        # of the number would cost as much as 5% of a small target's pass.
        sequences = 2 * rows if rows > TOGETHER and not prompts else 0
        surplus = self.model.surplus(sequences) if self.exact or sequences else ()
        for seq, front in fronts.items():
            parts[seq] = replace(parts[seq], front=front)
        logits, features = self.model.run(Batch.of([*parts.values()], rows, least, surplus))
        for seq, tokens in prompts.items():
            self._texts[seq].length += len(tokens)
        results, row, wanted = dict[SequenceId, TargetPass](), 0, 0
        for seq, part in parts.items():
            end, last = row + len(part.tokens), wanted + len(part.wanted)
            results[seq] = TargetPass(logits[wanted:last], features[row:end])
            row, wanted = end, last
        return results

    @property
    def _front(self) -> Front | None:
        return self.model.front

    @property
    def device(self) -> str:
        """See Target."""
        front = self._front
        return f"CPU with the {_first(front.count)} on {front.device}" if front else "CPU"

    @property
    def layers(self) -> tuple[int, str] | None:
        """The number of layers that run elsewhere, and the key of their device; None if none does."""
        return (self._front.count, self._front.device_key) if self._front else None

    @property
    def largest_tree(self) -> LargestTree | None:
        """See Target."""
        return self._front.largest_tree if self._front else None

    @property
    def bus_bytes(self) -> int:
        """See Target."""
        return self._left_bytes + (self._front.bus_bytes if self._front else 0)

    def _run_front(
        self, offers: Mapping[SequenceId, DraftTree], prompts: Mapping[SequenceId, TokenArray]
    ) -> dict[SequenceId, FrontPass] | None:
        """Run the first layers, if they run elsewhere. None if that fails: all layers then run here from now on."""
        if (front := self._front) is None:
            return {}
        try:
            found = {seq: front.read(seq, self._texts[seq].length, tokens) for seq, tokens in prompts.items()}
            return found | {seq: front.verify(seq, self._texts[seq].length, tree) for seq, tree in offers.items()}
        except DeviceError as error:
            problem = str(error)
        # Outside the handler: the traceback's frames hold objects of the device.
        self._take_back(front, problem)
        return None

    def _take_back(self, front: Front, problem: str) -> None:
        """Open the whole model, in which all texts are lost. Raises DeviceError."""
        assert self._open_whole
        log.warning("from now on the CPU runs the %s instead of %s: %s", _first(front.count), front.device, problem)
        model = self._open_whole()
        model.pool.follow(self.model.pool)
        if self._kv_cache is None:
            model.reserve(self.model.blocks)
        else:  # its blocks are larger; one context has room in any case
            model.reserve(max(min(self._kv_cache // model.block_bytes, self.model.blocks), self._limited_blocks(1)))
        # The texts first: an interrupt in between leaves the old model, which reads them again.
        self._texts = {seq: _Text(lost=front.tokens(seq)[: self.length(seq)]) for seq in self._texts}
        self.model = model
        self._left_bytes += front.bus_bytes
        front.release()

    def _part(
        self, seq: SequenceId, tokens: TokenArray, depths: NDArray[np.int64], paths: Paths,
        wanted: NDArray[np.int64], *, split: bool,
    ) -> Part:  # fmt: skip
        """Return rows for `tokens` at `depths` after the committed text.

        Every path gets its blocks, beginning with a copy of the text's last block. Raises
        ContextOverflow, DeviceError.
        """
        text = self._text(seq)
        text.verified = None
        if (end := text.length + int(depths.max()) + 1) > self.max_context:
            raise ContextOverflow(
                f"{end} tokens exceed the context of {self.max_context}: shorten the prompt or ask for fewer tokens"
            )
        full, part = divmod(text.length, BLOCK)
        self._hold(seq, paths.ends[-1].stop)
        begun = text.blocks[full:]
        if part and len(paths.rows) > 1:
            copies = begun[[blocks.start - full for blocks in paths.ends[1:]]]
            self.model.copy_rows(int(begun[0]), copies, part)
        tables = [np.concatenate([text.blocks[:full], text.blocks[blocks]]) for blocks in paths.ends]
        return Part(np.asarray(tokens, np.int64), text.length + depths, paths.rows, text.length, tables, wanted, split)

    def _hold(self, seq: SequenceId, blocks: int) -> None:
        """Own at least `blocks` blocks."""
        text = self._text(seq)
        if (missing := blocks - len(text.blocks)) > 0:
            pool = self.model.pool
            pool.keep(seq, text.blocks)
            if self._kv_cache is not None and missing > pool.free:
                raise DeviceError(
                    f"the memory for KV is full: {missing} blocks of {self.model.block_bytes} bytes are needed and "
                    f"{pool.free} free: give the engine a larger kv_cache"
                )
            self.model.reserve(int(np.count_nonzero(pool.owners)) + missing)
            text.blocks = np.concatenate([text.blocks, pool.take(seq, missing)])


def _first(layers: int) -> str:
    return "first layer" if layers == 1 else f"first {layers} layers"
