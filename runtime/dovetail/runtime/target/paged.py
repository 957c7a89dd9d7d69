"""A compiled paged-attention model and its KV blocks.

Axes: T rows of a pass (new tokens of all sequences), A attention rows, S sequences of the
attention, R rows whose logits are wanted, V vocabulary, D feature size. KV tensors are [blocks,
kv_heads, BLOCK, head_size], one key and one value per layer. With 8 bits a row begins with its scales.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.errors import DeviceError
from dovetail.runtime.system import machine
from dovetail.runtime.system.page_release import LookupMapping, releasing_pages
from dovetail.runtime.system.telemetry import decline_telemetry
from dovetail.runtime.target.blocks import BlockIds, BlockPool, untouched_zeros
from dovetail.runtime.target.features import FeatureMix, mix_tap, widen_tap
from dovetail.runtime.target.front import Front, FrontPass, Take
from dovetail.runtime.target.graph import (
    EXPERT_ROWS,
    FEATURES,
    HIDDEN,
    LOGITS,
    MIXED,
    NODE_ROWS,
    PATH_ROWS,
    ROW_EXPERTS,
    SAMPLED,
    read_model,
    to_paged,
)
from dovetail.runtime.target.properties import default_properties, kv_properties, remedy

decline_telemetry()  # the commands do so too, but an embedding program may not

BLOCK = 32  # tokens per KV block: the CPU plugin's fixed size
# For a matrix of one row, and for the attention of a sequence of one row, OpenVINO has other kernels.
# Their sums differ.
ALONE, TOGETHER = 1, 2
_PAGE = 4096  # bytes


@dataclass(frozen=True)
class Part:
    """The rows of one text in a pass."""

    tokens: NDArray[np.int64]  # [T]
    positions: NDArray[np.int64]  # [T]
    paths: Sequence[NDArray[np.int64]]  # rows of T, each after those before it; a row in no path has no meaning
    past: int  # tokens cached before the first row of each path
    tables: Sequence[BlockIds]  # each path's KV blocks
    wanted: NDArray[np.int64]  # [R] rows of T whose logits are wanted
    split: bool = False  # whether the attention takes each row of a path as a sequence, or the whole path
    front: FrontPass | None = None  # what the first layers gave for the rows, if they run elsewhere

    def sequences(self) -> Iterator[tuple[NDArray[np.int64], int, BlockIds]]:
        """Yield the attention's sequences: rows, tokens before them, KV blocks.

        A row may be a sequence that ends in it, because the plugin writes the KV of all rows before
        it computes the attention of any. A further copy of a row only writes its KV into the blocks
        of another path: it gets the block that it writes to, and no text before that block.
        """
        seen = set[int]()
        for path, table in zip(self.paths, self.tables, strict=True):
            if not self.split:
                yield path, self.past, table
                continue
            for past, row in enumerate(path.tolist(), self.past):
                block = past // BLOCK
                if row in seen:
                    yield np.array([row]), past % BLOCK, table[block : block + 1]
                else:
                    yield np.array([row]), past, table[: block + 1]
                seen.add(row)


@dataclass(frozen=True)
class Batch:
    """The rows of one pass, and the sequences of its attention."""

    tokens: NDArray[np.int64]  # [T]
    positions: NDArray[np.int64]  # [T]
    past: NDArray[np.int32]  # [S] tokens already cached per sequence
    begins: NDArray[np.int32]  # [S + 1] where each sequence's attention rows begin
    blocks: NDArray[np.int32]  # block ids of all sequences, flat
    block_begins: NDArray[np.int32]  # [S + 1]
    wanted: NDArray[np.int64]  # [R] rows of T whose logits are wanted
    path_rows: NDArray[np.int32] | None = None  # [A] row of T that each attention row takes; None: the same rows
    node_rows: NDArray[np.int32] | None = None  # [T] attention row whose output each row takes
    surplus_rows: int = 0  # the last rows of T, which copy the row before them
    front: FrontPass | None = None  # [T, H] and [T, D] if the first layers run elsewhere

    @classmethod
    def of(cls, parts: Sequence[Part], rows: int, least: int, surplus: Sequence[BlockIds] = ()) -> Batch:
        """Return one pass of `rows` rows for all parts. Surplus rows copy the last row.

        least: rows that the lm_head computes; `wanted` repeats its last row to have as many.
        surplus: KV blocks for further sequences of one row and no context, which nobody reads.
        """
        starts = [0, *accumulate(len(part.tokens) for part in parts)]
        placed = list(zip(parts, starts, strict=False))
        sequences = [(rows + start, past, table) for part, start in placed for rows, past, table in part.sequences()]
        sequences += [(np.zeros(1, np.int64), 0, table) for table in surplus[len(sequences) :]]
        paths, past, tables = zip(*sequences, strict=True)
        path_rows = np.concatenate(paths, dtype=np.int32, casting="same_kind")
        node_rows = np.zeros(rows, np.int32)
        node_rows[path_rows[::-1]] = np.arange(len(path_rows) - 1, -1, -1)  # the first copy of each row
        wanted = np.concatenate([part.wanted + start for part, start in placed])
        return cls(
            tokens=_filled(np.concatenate([part.tokens for part in parts]), rows),
            positions=_filled(np.concatenate([part.positions for part in parts]), rows),
            past=np.array(past, np.int32),
            begins=np.array([0, *accumulate(map(len, paths))], np.int32),
            blocks=np.concatenate(tables),
            block_begins=np.array([0, *accumulate(map(len, tables))], np.int32),
            wanted=_filled(wanted, least),
            path_rows=path_rows,
            node_rows=node_rows,
            surplus_rows=rows - sum(len(part.tokens) for part in parts),
            front=_joined([part.front for part in parts if part.front], rows),
        )


def _filled(values: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return `values`, with the last value repeated up to `count` values."""
    missing = count - len(values)
    return np.concatenate([values, np.repeat(values[-1:], missing)]) if missing > 0 else values


def _joined(parts: Sequence[FrontPass], count: int) -> FrontPass | None:
    """Return the rows of all parts, with the last row repeated up to `count` rows."""
    if not parts:
        return None
    mixed = [part.mixed for part in parts if part.mixed is not None]
    whole = FrontPass(np.concatenate([part.hidden for part in parts]), np.concatenate(mixed) if mixed else None)
    return whole.at(np.minimum(np.arange(count), len(whole.hidden) - 1))


@dataclass
class _KVGroup:
    """All KV tensors of one shape and type: bytes [tensors, blocks, heads, BLOCK, row]."""

    names: list[str]
    element_type: Any
    heads: int
    size: int  # elements of a row, with the scales and zero points of 8 bits
    data: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))

    @property
    def row_bytes(self) -> int:
        return self.size * int(self.element_type.size)

    @property
    def block_bytes(self) -> int:
        return len(self.names) * self.heads * BLOCK * self.row_bytes

    def grown(self, blocks: int, kept: BlockIds) -> _KVGroup:
        """Return the group with `blocks` blocks, `kept` ones with their content. Raises OSError."""
        data = untouched_zeros((len(self.names), blocks, self.heads, BLOCK, self.row_bytes))
        if len(kept):
            data[:, kept] = self.data[:, kept]
        return replace(self, data=data)


class PagedModel:
    """One compiled model, one inference request, and the model's KV blocks.

    properties: of OpenVINO's CPU plugin, by name; they override the defaults. Raises InputError for
    some of the KV cache, see `kv_properties`.
    mix: a drafter's addition to the last feature. layers: blocks whose outputs precede the last
    feature, for training. take: takes the first layers out, which then run as `front`.
    """

    def __init__(
        self,
        xml: Path,
        *,
        threads: int | None = None,
        properties: Mapping[str, Any] | None = None,
        mix: FeatureMix | None = None,
        layers: Sequence[int] = (),
        take: Take | None = None,
    ):
        import openvino as ov

        settings: dict[str, Any] = {**default_properties(), **(properties or {}), **kv_properties(properties or {})}
        if quota := machine.quota_threads():  # OpenVINO ignores quotas and pins all containers to the same cores
            settings = {"INFERENCE_NUM_THREADS": quota, "ENABLE_CPU_PINNING": False} | settings
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        weights = xml.with_suffix(".bin")
        self._embedding = LookupMapping(weights)
        with self._embedding:
            model = read_model(xml)
        if mix:
            mix_tap(model, mix, take.count if take else 0)
        if layers:
            widen_tap(model, layers)
        self.front: Front | None = None
        try:
            outputs = take.outputs(model) if take else []
            to_paged(model)
            if take:
                with releasing_pages(weights):
                    self.front = take(model, outputs, mix)
            self.compiled = ov.Core().compile_model(model, "CPU", settings)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            given = f" with {', '.join(properties)}" if properties else ""
            raise DeviceError(
                f"OpenVINO cannot compile {xml} for the CPU{given}: {reason}{remedy(reason, properties or {})}"
            ) from error
        self.request = self.compiled.create_infer_request()
        self._unpacked: Path | None = weights  # until the first pass has packed the weights
        self._inputs: dict[str, NDArray[Any]] = {}  # name -> value that the request is known to hold
        self._given: dict[str, NDArray[Any]] = {}  # name -> memory that the request points to
        self.pool = BlockPool()
        self._unused: BlockIds = np.zeros(0, np.int32)  # a block for surplus sequences
        self._threads = int(self.compiled.get_property("INFERENCE_NUM_THREADS"))
        self._groups = self._kv_groups()
        self._placed = False  # whether the request points to the memory of all groups
        self.experts = any(EXPERT_ROWS in port.names for port in self.compiled.inputs)  # of rows that copy no other
        self.feature_size = int(self.compiled.output(FEATURES).partial_shape[-1].get_length())
        self.vocab_size = int(self.compiled.output(LOGITS).partial_shape[-1].get_length())

    @property
    def blocks(self) -> int:
        return len(self.pool.owners)

    @property
    def block_bytes(self) -> int:
        return sum(group.block_bytes for group in self._groups)

    def _kv_groups(self) -> list[_KVGroup]:
        alike: dict[tuple[Any, int, int], list[str]] = defaultdict(list)
        for port in self.compiled.inputs:
            if "_cache." in port.any_name:
                _, heads, block, size = (dim.get_length() if dim.is_static else 0 for dim in port.partial_shape)
                if block != BLOCK:
                    raise DeviceError(
                        f"KV tensor {port.any_name} is {port.element_type} {port.partial_shape}: expected blocks of "
                        f"{BLOCK} rows: use an OpenVINO release in the supported range"
                    )
                alike[port.element_type, heads, size].append(port.any_name)
        return [_KVGroup(names, *shape) for shape, names in alike.items()]

    def reserve(self, blocks: int) -> None:
        """Grow to at least `blocks` KV blocks. Owned blocks keep their KV. Raises DeviceError."""
        if blocks <= self.blocks:
            return
        owned = np.flatnonzero(self.pool.owners).astype(np.int32)
        try:
            groups = [group.grown(blocks, owned) for group in self._groups]
        except OSError as error:
            raise DeviceError(
                f"the system grants no memory for {blocks} KV blocks of {self.block_bytes} bytes "
                f"({error.strerror}): export the target with a smaller --max-context"
            ) from error
        # An interrupt here leaves the old groups, or new groups that the next pass places.
        self._placed = False
        self._groups = groups
        self.pool.grow(blocks)
        if not len(self._unused):
            self._unused = self.pool.take(self.pool.new_owner(), 1)

    def surplus(self, count: int) -> list[BlockIds]:
        """Return blocks for `Batch.of`, which fill a pass up to `count` sequences, or one for each thread.

        With fewer sequences than threads the plugin shares the blocks of a row among threads, and
        adds in another order.
        """
        return [self._unused] * max(count, self._threads)

    def _place(self) -> None:
        """Point the request to the memory of all groups."""
        import openvino as ov

        for group in self._groups:
            for name, array in zip(group.names, group.data, strict=True):
                shape = ov.Shape([*array.shape[:-1], group.size])
                self.request.set_tensor(name, ov.Tensor(array, shape, group.element_type))
        self._placed = True

    def fault_in(self, blocks: BlockIds) -> None:
        """Write to the memory of `blocks` without changing their content.

        Linux maps all unwritten pages to one page of zeros, which a pass reads faster than real KV.
        """
        for group in self._groups:
            group.data[:, blocks, :, :: max(_PAGE // group.row_bytes, 1), 0] += 0

    def copy_rows(self, source: int, targets: BlockIds, rows: int) -> None:
        """Copy the first `rows` KV rows of block `source` to each of `targets`, in all layers."""
        for group in self._groups:
            group.data[:, targets, :, :rows] = group.data[:, [source], :, :rows]

    def run(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Run one pass. Return logits [R, V] and features [T, D], valid until the next pass."""
        longest = int((batch.past + np.diff(batch.begins)).max())
        same = np.arange(len(batch.tokens), dtype=np.int32)
        inputs: dict[str, NDArray[Any]] = {
            **self._read(batch),
            "position_ids": batch.positions,
            "past_lens": batch.past,
            "subsequence_begins": batch.begins,
            "block_indices": batch.blocks,
            "block_indices_begins": batch.block_begins,
            "max_context_len": np.array(longest, np.int32),
            SAMPLED: batch.wanted,
            PATH_ROWS: same if batch.path_rows is None else batch.path_rows,
            NODE_ROWS: same if batch.node_rows is None else batch.node_rows,
        }
        if self.experts:
            inputs[EXPERT_ROWS] = same[: len(same) - batch.surplus_rows]
            inputs[ROW_EXPERTS] = np.minimum(same, len(same) - batch.surplus_rows - 1)
        if not self._placed:
            self._place()
        for name, array in inputs.items():
            self._give(name, array)
        try:
            with releasing_pages(self._unpacked) if self._unpacked else nullcontext():
                self.request.infer(share_outputs=True)  # outputs are read in place
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise DeviceError(f"the target failed on the CPU: {reason}: open the engine again") from error
        self._unpacked = None
        self._embedding.add(len(batch.tokens))
        logits = self.request.get_tensor(LOGITS).data
        features = self.request.get_tensor(FEATURES).data
        if (len(logits), len(features)) != (len(batch.wanted), len(batch.tokens)):
            raise DeviceError(
                "the target failed on the CPU: OpenVINO gave no result: use other properties, or an OpenVINO release "
                "in the supported range"
            )
        return logits[:, 0], features[:, 0]

    def _read(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """Return what the first layer here reads."""
        if batch.front is None:
            return {"input_ids": batch.tokens}
        found = {HIDDEN: batch.front.hidden[:, None]}
        return found if batch.front.mixed is None else {**found, MIXED: batch.front.mixed[:, None]}

    def _give(self, name: str, array: NDArray[Any]) -> None:
        """Set an input, by a copy into the request's memory if the shape is that of the last pass.

        An interrupt leaves an input unchanged, or unknown: the next pass then sets it again.
        """
        import openvino as ov

        held = self._inputs.pop(name, None)
        if held is None or held.shape != array.shape:
            held = self._given[name] = np.array(array)
            self.request.set_tensor(name, ov.Tensor(held, shared_memory=True))
        else:
            held[...] = array
        self._inputs[name] = held
