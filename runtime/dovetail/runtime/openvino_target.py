"""The target on the CPU: OpenVINO paged attention verifies a whole token tree in one pass.

Axes: N nodes, T new tokens, V target vocabulary, D feature size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import ContextOverflow, DeviceError, InputError
from .graph import FeatureMix
from .manifest import Manifest
from .paged import BLOCK, REQUIRED, Batch, PagedModel
from .sessions import TargetPass, TokenArray
from .tree import DraftTree

# OpenVINO prepares every size of a pass, and keeps what it prepared: prompts come in few.  No prompt runs as one row:
# that goes through another kernel, 12 to 20% quicker, which adds in another order than those of all other sizes.
_SMALL_PROMPTS = (2, 4, 8)
_STEP, _LARGE, _LARGE_STEP = 8, 64, 16  # then multiples of 8, and of 16 beyond 64 (docs/speed.md)


class OpenVINOTarget:
    """One conversation of the target LLM; implements `TargetSession`.

    KV slots are positions: committed token t lies in slot t, a tree's node i in slot `length + i`.
    """

    device = "CPU"

    def __init__(self, model: PagedModel, max_context: int):
        self.model = model
        self.max_context = max_context
        self._length = 0
        self._width = 0  # nodes of the verified, uncommitted tree

    @classmethod
    def open(
        cls,
        pair: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        ov_config: Mapping[str, str] | None = None,
    ) -> OpenVINOTarget:
        """Load the target of a pair; `threads` defaults to what OpenVINO finds best.

        ov_config: properties of OpenVINO's CPU plugin.  Where the pair's drafter reads more than the last feature,
        the graph gives it the mix.  Raises IntegrityError, InputError (a property that verification depends on),
        DeviceError (one that OpenVINO refuses).
        """
        if taken := [name for name in ov_config or () if name.endswith("CACHE_PRECISION")]:
            required = REQUIRED["KV_CACHE_PRECISION"]
            raise InputError(f"{taken[0]} must stay {required}, trees depend on it: leave it out")
        facts, xml = manifest.drafter, pair / "target" / "openvino_model.xml"
        mix = facts.files.get("features") if facts else None
        features = FeatureMix.load(pair / mix, facts) if facts and mix else None
        model = PagedModel(xml, threads=threads, properties=ov_config, mix=features)
        return cls(model, manifest.target.max_context)

    @property
    def length(self) -> int:
        """Tokens committed to the KV cache."""
        return self._length

    def prefill(self, tokens: TokenArray) -> TargetPass:
        """Append and commit tokens [T]; logits [1, V] of the last one, features [T, D]."""
        count = len(tokens)
        self._width = 0
        positions = np.arange(self._length, self._length + count, dtype=np.int64)
        rows = prompt_rows(count)
        if count > 1 and self._length + rows > self.max_context:  # no KV is reserved that only they would need
            rows = count
        filling = (0, rows - count)  # copies of the last row, which nobody sees: attention is causal
        tokens, positions = np.pad(tokens, filling, mode="edge"), np.pad(positions, filling, mode="edge")
        logits, features = self._run(tokens, positions, np.array([count - 1], np.int64), None)
        self._length += count
        return TargetPass(logits, features[:count])

    def verify(self, tree: DraftTree) -> TargetPass:
        """All nodes in one pass: logits [N, V], features [N, D].

        A row on the first path has the same bits for every N from 2 to 64; a root alone differs, by tenths of a logit.
        """
        width = len(tree.tokens)
        mask = None if width == 1 else tree.attention().ravel()
        wanted = np.arange(width, dtype=np.int64)
        logits, features = self._run(tree.tokens, self._length + tree.depths(), wanted, mask)
        self._width = width
        return TargetPass(logits, features[:width])

    def commit(self, path: NDArray[np.int64]) -> None:
        """Keep the rows of `path`, root first; only rows that are not yet in place move."""
        if not self._width or len(path) > self._width:
            raise DeviceError(f"commit of {len(path)} nodes without a verified tree of that size: call verify first")
        slots = np.arange(len(path), dtype=np.int64)
        moved = path != slots
        if moved.any():
            self.model.move_rows(self._length + path[moved], self._length + slots[moved])
        self._length += len(path)
        self._width = 0

    def reset(self, keep: int = 0) -> None:
        """Forget everything after the first `keep` tokens: their slots are simply written again."""
        self._length = min(self._length, keep)
        self._width = 0

    def assume(self, length: int) -> None:
        """Behave as if `length` tokens were committed, for timing alone: their KV is whatever lies there."""
        self.model.touch(-(-length // BLOCK))
        self._length, self._width = length, 0

    def _run(
        self,
        tokens: TokenArray,
        positions: NDArray[np.int64],
        wanted: NDArray[np.int64],
        mask: NDArray[np.uint8] | None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        if int(positions.max()) >= self.max_context:
            raise ContextOverflow(
                f"{int(positions.max()) + 1} tokens exceed the context of {self.max_context}: shorten the prompt or "
                "ask for fewer tokens"
            )
        count = len(tokens)
        end = self._length + count
        self.model.reserve(-(-end // BLOCK))
        batch = Batch(
            tokens=np.ascontiguousarray(tokens, np.int64),
            positions=positions,
            past=np.array([self._length], np.int32),
            begins=np.array([0, count], np.int32),
            blocks=np.arange(self.model.blocks, dtype=np.int32),
            block_begins=np.array([0, self.model.blocks], np.int32),
            wanted=wanted,
            mask=mask,
        )
        return self.model.run(batch)


def prompt_rows(count: int) -> int:
    """Rows of the pass that reads `count` tokens of a prompt."""
    if count <= _SMALL_PROMPTS[-1]:
        return next(rows for rows in _SMALL_PROMPTS if rows >= count)
    step = _STEP if count <= _LARGE else _LARGE_STEP
    return -(-count // step) * step
