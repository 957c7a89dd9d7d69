"""The drafter on ONNX Runtime: one graph, whose rows a runner holds (cpu.py, cuda.py).

Axes: T tree slots, V draft vocabulary. KV row i < T belongs to tree node i, row T + j to pair j.
Bank row 0 is the root's feature, row i tree node i's. Row T takes features that no call reads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np

from dovetail.runtime.drafter.cpu import CpuRunner
from dovetail.runtime.drafter.cuda import CudaRunner, Device
from dovetail.runtime.drafter.cuda_api import CudaDevice, cuda_problem, driver_cuda
from dovetail.runtime.drafter.graph_io import BLOCKED, CHUNK, Runner
from dovetail.runtime.drafter.session import DeviceReport, DraftNoise, check_keep
from dovetail.runtime.drafter.vram import check_limit, plan_pair
from dovetail.runtime.errors import ContextOverflow, DeviceError, InputError
from dovetail.runtime.pair.manifest import DrafterFacts, Manifest
from dovetail.runtime.system.arrays import FloatArray, SequenceId, TokenArray
from dovetail.runtime.system.machine import usable_cores
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.growth import Candidates, Judge, Level, grow_tree
from dovetail.runtime.tree.limits import TreeLimits

# A call of at most LEVEL rows is timed as a tree's level, which returns children for every row. A
# larger call is timed as a read. A short read is cheaper than a level of as many rows. The
# scheduler's pace of drafts corrects for that.
LEVEL = 16

log = logging.getLogger(__name__)


class OnnxDrafter:
    """A drafter with the KV of one sequence; implements Drafter."""

    def __init__(self, facts: DrafterFacts, runner: Runner, *, device: str, note: str):
        self.device, self.capacity = device, runner.max_context
        self.file_key = runner.file_key  # of its graph in DrafterFacts.files
        self.top_k = facts.top_k  # children that it offers
        self._facts, self._runner, self._note = facts, runner, note
        self._seq: SequenceId | None = None  # of the pairs that it holds
        self._length = 0
        self._root: tuple[int, Candidates] | None = None  # last known token and its children

    @classmethod
    def open(
        cls,
        pair: Path,
        manifest: Manifest,
        *,
        device: str = "auto",
        threads: int | None = None,
        vram: int | None = None,
        fit: bool = False,
    ) -> OnnxDrafter:
        """Load a drafter; see Engine.from_pretrained. threads: default one per usable core.

        A log warning says why "auto" does not use a GPU that is there, or that `vram` is for.
        Raises PairError (no drafter), InputError, DeviceError.
        """
        facts = manifest.needed_drafter
        if device not in ("auto", "cpu", "cuda"):
            raise InputError(f"drafter device {device!r} is unknown: choose auto, cpu or cuda")
        check_limit(vram, fit, device)
        note = "asked for"
        if device != "cpu":
            try:
                return cls.open_cuda(pair, manifest, vram=vram, fit=fit)
            except DeviceError as error:
                if device == "cuda":
                    raise DeviceError(f"the drafter cannot run on CUDA: {error}") from error
                note = f"no CUDA: {error}"
                if vram is not None or driver_cuda() is not None:  # somebody counts on a GPU
                    log.warning("the drafter runs on the CPU: %s", error)
        return cls.open_cpu(pair, facts, note, threads=threads)

    @classmethod
    def open_cpu(cls, pair: Path, facts: DrafterFacts, note: str, *, threads: int | None) -> OnnxDrafter:
        """Return the INT8 drafter. note: why the drafter runs on the CPU. Raises DeviceError."""
        runner = CpuRunner(Path(pair) / facts.files["cpu"], facts, threads or usable_cores())
        return cls(facts, runner, device="CPU (int8)", note=note)

    @classmethod
    def open_cuda(
        cls,
        pair: Path,
        manifest: Manifest,
        *,
        vram: int | None = None,
        fit: bool = False,
        new_device: Callable[[], Device] | None = None,
    ) -> OnnxDrafter:
        """Return the float16 drafter. new_device: in place of CUDA's. Raises DeviceError."""
        facts = manifest.needed_drafter
        if new_device is None and (problem := cuda_problem()):
            raise DeviceError(problem)
        plan, limit = plan_pair(manifest, vram, fit=fit), facts.vram if vram is None else vram
        device = (new_device or CudaDevice)()
        runner = CudaRunner(Path(pair) / facts.files["cuda"], facts, plan, device, limit=limit)
        return cls(facts, runner, device="CUDA (fp16)", note="a CUDA device was found")

    def length(self, seq: SequenceId) -> int:
        return self._held if seq == self._seq else 0

    @property
    def _held(self) -> int:
        """Pairs of the sequence `_seq`."""
        return self._length

    @property
    def report(self) -> DeviceReport:
        return DeviceReport(self._note, self._runner.bus_bytes)

    def extend(
        self, seq: SequenceId, tokens: TokenArray, features: FloatArray, noise: DraftNoise | None = None
    ) -> None:
        """See Drafter. Raises ContextOverflow, InputError (shapes, ids), DeviceError."""
        self._check_room(seq)
        self._check(tokens, features)
        self._seq, self._root = seq, None
        for start in range(0, len(tokens), CHUNK):
            chunk = slice(start, min(start + CHUNK, len(tokens)))
            found = self._extend(tokens[chunk], features[chunk], noise)
            self._length += len(tokens[chunk])
        if len(tokens):
            last = Candidates(found.logprobs[-1:].copy(), found.ids[-1:].copy())
            self._root = int(tokens[-1]), last

    def propose(
        self, seq: SequenceId, limits: TreeLimits, judge: Judge | None = None, noise: DraftNoise | None = None
    ) -> DraftTree:
        if self._root is None or seq != self._seq:
            raise InputError("nothing to draft from: extend the drafter with the last known token first")
        self._check_top_k(limits)
        token, first = self._root
        expand = partial(self._expand, noise=noise)
        return grow_tree(token, first, expand, limits, slots=self._facts.tree_slots, judge=judge)

    def rewind(self, seq: SequenceId, keep: int) -> None:
        """See Drafter. A draft then needs a new `extend`. Raises InputError."""
        check_keep(keep, held := self.length(seq))
        if keep < held:
            self._length, self._root = keep, None

    def pretend_length(self, seq: SequenceId, pairs: int) -> None:
        """Act as if extended by `pairs` pairs, for timing only: KV content is arbitrary."""
        self._check_room(seq)
        self._runner.touch(pairs)
        self._seq, self._length, self._root = seq, pairs, None

    def time_pass(self, seq: SequenceId, rows: int, *, clock: Callable[[], float] = perf_counter) -> float:
        """Return the ms of a call: a level of `rows` nodes up to LEVEL, else `rows` new pairs."""
        if rows > LEVEL:
            tokens, features = np.zeros(rows, np.int64), np.zeros((rows, self._facts.feature_size), np.float32)
            begin = clock()
            self.extend(seq, tokens, features)
        else:
            nodes = np.minimum(np.arange(1, rows + 1), self._facts.tree_slots - 1)  # all below the root
            attend = nodes[:, None] == np.arange(self._facts.tree_slots)
            begin = clock()
            self._expand(Level(1, nodes, np.zeros_like(nodes), np.zeros_like(nodes), attend))
        return (clock() - begin) * 1e3

    def close(self) -> None:
        self._runner.close()

    def _check_room(self, seq: SequenceId) -> None:
        if self._held and seq != self._seq:
            raise InputError(
                f"this drafter has room for one sequence and holds number {self._seq}: rewind that to 0 first, or "
                f"decode number {seq} without a drafter"
            )

    def _check_top_k(self, limits: TreeLimits) -> None:
        if limits.top_k > self._facts.top_k:
            raise InputError(f"tree top_k {limits.top_k} exceeds the drafter's {self._facts.top_k}: lower it")

    def _extend(self, tokens: TokenArray, features: FloatArray, noise: DraftNoise | None) -> Candidates:
        """Read one chunk of at most CHUNK pairs."""
        n, start, slots = len(tokens), self._length, self._facts.tree_slots
        rows = self._runner.rows(n)
        positions = np.arange(start, start + n)
        rows.input_ids[:n] = tokens
        rows.position_ids[:n] = positions
        rows.features[:n] = features
        rows.feature_rows[:n] = np.arange(slots + 1, slots + 1 + n)
        rows.kv_slots[:n] = positions + slots
        rows.bank_slots[:n] = slots
        rows.bank_slots[n - 1] = 0
        rows.context_end[:n] = positions + 1
        rows.tree_mask[:n] = BLOCKED
        return self._run(n, start + n, self._noise(1, noise), upload_features=True)

    def _expand(self, level: Level, noise: DraftNoise | None = None) -> Candidates:
        """Run one level of the tree: features of the parents come from the bank."""
        n, length = len(level.rows), self._length
        rows = self._runner.rows(n)
        rows.input_ids[:n] = level.tokens
        rows.position_ids[:n] = length - 1 + level.depth
        rows.feature_rows[:n] = level.parent_rows
        rows.kv_slots[:n] = level.rows
        rows.bank_slots[:n] = level.rows
        rows.context_end[:n] = length
        mask = rows.tree_mask[:n]
        mask[...] = BLOCKED
        mask[level.attend] = 0
        return self._run(n, length, self._noise(level.depth + 1, noise), upload_features=False)

    def _noise(self, depth: int, noise: DraftNoise | None) -> FloatArray | None:
        """Return [V] for children at `depth`; None without sampling, or if the graph takes none."""
        ids = self._runner.draft_ids
        return None if noise is None or ids is None else noise(depth, ids)

    def _run(self, n: int, context: int, noise: FloatArray | None, *, upload_features: bool) -> Candidates:
        found = self._runner.run(n, context, noise, upload_features=upload_features)
        if not np.isfinite(found.logprobs).all():
            raise DeviceError(
                f"the drafter on {self.device} returned log-probabilities that are no numbers: use another "
                "--drafter-device, or generate without speculation"
            )
        return found

    def _check(self, tokens: TokenArray, features: FloatArray) -> None:
        facts = self._facts
        if features.shape != (len(tokens), facts.feature_size):
            raise InputError(
                f"features {features.shape} do not fit {len(tokens)} tokens of feature size {facts.feature_size}"
            )
        if self._held + len(tokens) > self.capacity:
            raise ContextOverflow(
                f"{self._held + len(tokens)} tokens exceed the drafter's context of {self.capacity}: shorten "
                "the prompt or generate without speculation"
            )
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < facts.target_vocab_size:
            raise InputError(
                f"token ids {int(tokens.min())}..{int(tokens.max())} leave the vocabulary of {facts.target_vocab_size}"
            )
