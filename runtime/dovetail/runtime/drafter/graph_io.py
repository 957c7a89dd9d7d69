"""Inputs and outputs of a drafter's graph: names, shapes and rows, and the protocol of its engine.

There are two kinds of graphs. A tree graph runs the nodes of one level of a tree, or new context
pairs. A block graph (DrafterFacts.positions) reads new context and drafts P tokens in one call.

Axes: n rows of a call, T slots before the context, S context pairs, P drafted tokens of a block, K
children per row or position, D feature size, V draft vocabulary, g KV heads, d head size.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.errors import DeviceError
from dovetail.runtime.pair.manifest import DrafterFacts
from dovetail.runtime.system.arrays import Array, Spec
from dovetail.runtime.tree.growth import Candidates

CHUNK = 128  # the most rows of a call
BLOCKED = -1e4  # additive mask: not attended to; float16 holds it

INDEXES = (
    "input_ids", "position_ids", "feature_rows", "kv_slots", "bank_slots", "context_begin", "context_end", "queries",
)  # fmt: skip
LATER = ("context_begin", "queries")  # inputs that graphs of older pairs do not have
OUTPUTS = ("top_logprobs", "top_ids")
NOISE = "noise"  # float32, added to the logits: [1, V] for every row, or [P, V]; graphs of older pairs have none
DRAFT_IDS = "draft_ids"  # key of the graph's metadata: V target ids, little-endian int32 in base64
TYPES: dict[type[np.generic], str] = {
    np.int64: "tensor(int64)", np.int32: "tensor(int32)", np.float32: "tensor(float)", np.float16: "tensor(float16)"
}  # fmt: skip
STATE = "bank"  # of a tree graph, an input like kv.0, kv.1 ..; the outputs are bank_out, kv.0.out ..


@dataclass(frozen=True)
class Rows:
    """Inputs and outputs of a call, one row each: [rows, ..]. Names are the graph's."""

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    feature_rows: NDArray[np.int64]
    kv_slots: NDArray[np.int64]
    bank_slots: NDArray[np.int64]
    context_begin: NDArray[np.int64]
    context_end: NDArray[np.int64]
    queries: NDArray[np.int64]  # 0, 1, 2 ..; a call takes the rows whose children are wanted
    tree_mask: Array  # [rows, T] additive
    features: Array  # [rows, D]
    top_logprobs: NDArray[np.float32]  # [rows, K]
    top_ids: NDArray[np.int32]  # [rows, K]

    def __post_init__(self) -> None:
        self.queries[:] = np.arange(len(self.queries))

    def pad(self, n: int, slots: int) -> None:
        """Make the rows from `n` on harmless: they attend to nothing and write to bank row `slots`, T."""
        self.input_ids[n:] = self.position_ids[n:] = self.feature_rows[n:] = 0
        self.kv_slots[n:] = self.context_begin[n:] = self.context_end[n:] = 0
        self.bank_slots[n:] = slots
        self.tree_mask[n:] = BLOCKED


@dataclass(frozen=True)
class BlockRows:
    """Inputs and outputs of a block graph's call. Names are the graph's."""

    token: NDArray[np.int64]  # [1], the last known token
    context_begin: NDArray[np.int64]  # [1], first pair that the block attends to
    context_end: NDArray[np.int64]  # [1], the pair after the last one, new pairs included
    kv_slots: NDArray[np.int64]  # [rows]
    features: Array  # [rows, D], of new context
    top_logprobs: NDArray[np.float32]  # [P, K]
    top_ids: NDArray[np.int32]  # [P, K]

    def pad(self, n: int, slots: int) -> None:
        """Let the rows from `n` on write zeros to row T - 1, to which nobody attends. slots: T."""
        self.kv_slots[n:] = slots - 1
        self.features[n:] = 0


def row_specs(facts: DrafterFacts, rows: int, dtype: type[np.floating[Any]]) -> dict[str, Spec]:
    """Return shape and dtype of every array of a call: inputs first, features the last input."""
    specs: dict[str, Spec]
    if facts.positions:
        specs = {name: ((1,), np.int64) for name in ("token", "context_begin", "context_end")}
        specs["kv_slots"] = ((rows,), np.int64)
    else:
        specs = {name: ((rows,), np.int64) for name in INDEXES}
        specs["tree_mask"] = ((rows, facts.tree_slots), dtype)
    specs["features"] = ((rows, facts.feature_size), dtype)
    specs["top_logprobs"] = ((facts.positions or rows, facts.top_k), np.float32)
    specs["top_ids"] = ((facts.positions or rows, facts.top_k), np.int32)
    return specs


def input_specs(facts: DrafterFacts, rows: int, dtype: type[np.floating[Any]]) -> dict[str, Spec]:
    """Return those of `row_specs` that are inputs."""
    return {name: spec for name, spec in row_specs(facts, rows, dtype).items() if name not in OUTPUTS}


def noise_spec(facts: DrafterFacts) -> Spec:
    """Return shape and dtype of the noise: a row for all rows of a call, or one for each position."""
    return (facts.positions or 1, facts.draft_vocab_size), np.float32


def rows_of(facts: DrafterFacts, arrays: Mapping[str, Any]) -> Rows | BlockRows:
    """Return the arrays of a call, by their names in `row_specs`, as a record."""
    return BlockRows(**arrays) if facts.positions else Rows(**arrays)


def state_shapes(facts: DrafterFacts, context: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the state: per block kv.i [T + context, 2, g, d]; of trees, bank [T + 1, D]."""
    kv = (facts.tree_slots + context, 2, facts.num_kv_heads, facts.head_size)
    bank = {} if facts.positions else {STATE: (facts.tree_slots + 1, facts.feature_size)}
    return {**{f"kv.{i}": kv for i in range(facts.blocks)}, **bank}


def output_name(state: str) -> str:
    """Return the name of the output that is bound to the memory of the input `state`."""
    return "bank_out" if state == STATE else f"{state}.out"


class Runner(Protocol):
    """Runs the graph and owns its KV and bank."""

    device_key: str  # "cuda", "webgpu", "openvino-gpu" or "cpu"
    max_context: int  # pairs that it holds
    bus_bytes: int  # moved between host and device so far, both ways; 0 on the CPU
    many_texts: bool  # whether rows may attend to the pairs of different texts
    draft_ids: NDArray[np.int32] | None  # [V] target ids of the draft vocabulary, None if the graph takes no noise

    def rows(self, n: int) -> Any:
        """Return the Rows or BlockRows for the inputs of a call of n rows. They may have more rows."""

    def run(
        self, n: int, context: int, noise: Array | None, *, upload_features: bool, answers: int | None = None
    ) -> Candidates:
        """Run the first n of `rows(n)` against the first `context` pairs. Valid until the next run.

        noise: [V] or [P, V] float32, None for none. upload_features: whether the graph reads the
        features too. answers: a tree graph's last rows whose children are wanted, None for all; the
        result then ends with them.
        """

    def touch(self, context: int) -> None:
        """Make the system provide memory for the KV of `context` pairs, whatever it holds."""

    def clear(self) -> None:
        """Fill KV and bank with zeros. A NaN in any row would reach every later call, masked or not."""

    def close(self) -> None:
        """Free the device's memory. No further run is possible."""


class Port(Protocol):
    """An input or output of a graph, as ONNX Runtime describes one."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> str: ...  # one of TYPES' values, or another
    @property
    def shape(self) -> list[int | str]: ...  # a text for any size


@dataclass(frozen=True)
class Ports:
    """The inputs, the outputs and the metadata of a graph."""

    inputs: Sequence[Port]
    outputs: Sequence[Port]
    metadata: Mapping[str, str]

    @classmethod
    def of(cls, session: Any, file: Path) -> Ports:
        """Return those of a session of ONNX Runtime. Raises DeviceError."""
        try:
            inputs, outputs = session.get_inputs(), session.get_outputs()
        except ValueError as error:  # a name that is not UTF-8
            raise DeviceError(f"{file} has inputs without readable names ({error}): export the drafter again") from None
        return cls(inputs, outputs, session.get_modelmeta().custom_metadata_map)

    @property
    def given(self) -> set[str]:
        """The names of the inputs, of which an older pair's graph has fewer."""
        return {port.name for port in self.inputs}


def check_ports(
    ports: Ports, file: Path, facts: DrafterFacts, dtype: type[np.floating[Any]], more: Mapping[str, Spec] | None = None
) -> None:
    """Check names, dtypes and fixed sizes of a graph's inputs and outputs. Raises DeviceError.

    dtype: of the graph's activations. more: inputs that a runner added, 0 for any size. Graphs of
    older pairs lack the inputs LATER and `noise`.
    """
    rows, state = row_specs(facts, 0, dtype), state_shapes(facts, -facts.tree_slots)  # 0: any number
    inputs = {**input_specs(facts, 0, dtype), NOISE: noise_spec(facts), **(more or {})}
    inputs |= {name: (shape, dtype) for name, shape in state.items()}
    outputs: dict[str, Spec] = {name: rows[name] for name in OUTPUTS}
    outputs |= {output_name(name): (shape, dtype) for name, shape in state.items()}
    lacking = {*inputs} - ports.given - {*LATER, NOISE}
    lacking |= {*outputs} - {port.name for port in ports.outputs}
    odd = ports.given - {*inputs}
    if lacking or odd:
        found = f"no {min(lacking)!r}" if lacking else f"an unknown input {min(odd)!r}"
        raise DeviceError(f"{file} has {found}: export the drafter again")
    for port in (*ports.inputs, *ports.outputs):
        if port.name not in inputs | outputs:
            continue
        shape, kind = (inputs | outputs)[port.name]
        pairs = zip(port.shape, shape, strict=False)
        fits = all(size == wanted or not wanted or not isinstance(size, int) for size, wanted in pairs)
        if port.type != TYPES[kind] or len(port.shape) != len(shape) or not fits:
            raise DeviceError(
                f"{file}: {port.name} is {port.type} {port.shape}, the manifest says {TYPES[kind]} {list(shape)} "
                "(0 is any): export the drafter again"
            )


def read_draft_ids(ports: Ports, file: Path, facts: DrafterFacts) -> NDArray[np.int32] | None:
    """Return [V], target ids of the draft vocabulary; None without noise. Raises DeviceError."""
    if NOISE not in ports.given:
        return None
    try:
        ids = np.frombuffer(b64decode(ports.metadata[DRAFT_IDS], validate=True), "<i4")
        if len(ids) != facts.draft_vocab_size or not 0 <= ids.min() <= ids.max() < facts.target_vocab_size:
            raise ValueError(f"{len(ids)} ids")
    except (KeyError, ValueError) as error:
        raise DeviceError(f"{file} does not say its draft vocabulary ({error}): export the drafter again") from None
    return ids
