"""What runs a drafter's graph: the rows of a call, the seam to an engine, and the INT8 graph on the CPU.

Axes: n rows of a call, T tree slots, S context pairs, K children per row, D feature size, V draft vocabulary.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import DeviceError
from .files import open_regular
from .manifest import DrafterFacts
from .mapped import LookedUp
from .telemetry import decline_telemetry
from .tree import Candidates

decline_telemetry()  # whoever embeds this has no command line that would

CHUNK = 128  # rows of a call at most
PREFIX_STEP = 256  # context pairs by which the bound prefix of the CPU's KV buffer grows
SPIN_US = 100  # microseconds that threads of the CPU's session wait for work before they sleep
BLOCKED = -1e4  # additive mask: not attended to; float16 holds it

CPU = "CPUExecutionProvider"

Array = NDArray[Any]
INDEXES = ("input_ids", "position_ids", "feature_rows", "kv_slots", "bank_slots", "context_end", "queries")
INPUTS = (*INDEXES, "tree_mask", "features")
OUTPUTS = ("top_logprobs", "top_ids")
NOISE = "noise"  # [1, V] float32, added to the logits of every row; graphs of older pairs have none
DRAFT_IDS = "draft_ids"  # of the graph's metadata: V target ids, little-endian int32 in base64
_TYPES: dict[type[np.generic], str] = {
    np.int64: "tensor(int64)", np.int32: "tensor(int32)", np.float32: "tensor(float)", np.float16: "tensor(float16)"
}  # fmt: skip
_LOOP = b'"\x04Loop'  # an operator's type, as protobuf writes it: of all operators it alone may never end
STATE = "bank"  # beside kv.0, kv.1 ..: input, and output as bank_out, kv.0.out ..


@dataclass(frozen=True)
class Rows:
    """Inputs and outputs of a call, one row each: [rows, ..].  Names, and their meaning, are the graph's.

    queries: 0, 1, 2 .., of which a call takes the rows whose children are wanted.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    feature_rows: NDArray[np.int64]
    kv_slots: NDArray[np.int64]
    bank_slots: NDArray[np.int64]
    context_end: NDArray[np.int64]
    queries: NDArray[np.int64]
    tree_mask: Array  # [rows, T] additive
    features: Array  # [rows, D]
    top_logprobs: NDArray[np.float32]  # [rows, K]
    top_ids: NDArray[np.int32]  # [rows, K]

    def __post_init__(self) -> None:
        self.queries[:] = np.arange(len(self.queries))

    @classmethod
    def zeros(cls, facts: DrafterFacts, rows: int, dtype: type[np.floating[Any]]) -> Rows:
        """Arrays of their own; `dtype` is that of the graph's activations."""
        specs = row_specs(facts, rows, dtype)
        arrays: dict[str, Any] = {name: np.zeros(shape, kind) for name, (shape, kind) in specs.items()}
        return cls(**arrays)

    def pad(self, n: int, trash: int) -> None:
        """Make the rows from `n` on harmless: they attend to nothing and write where nobody reads."""
        self.input_ids[n:] = self.position_ids[n:] = self.feature_rows[n:] = 0
        self.kv_slots[n:] = self.context_end[n:] = 0
        self.bank_slots[n:] = trash
        self.tree_mask[n:] = BLOCKED


Spec = tuple[tuple[int, ...], type[np.generic]]  # shape and dtype


def row_specs(facts: DrafterFacts, rows: int, dtype: type[np.floating[Any]]) -> dict[str, Spec]:
    """Shape and dtype of every array of Rows, inputs first, features last of these."""
    specs: dict[str, Spec] = {name: ((rows,), np.int64) for name in INDEXES}
    specs["tree_mask"] = ((rows, facts.tree_slots), dtype)
    specs["features"] = ((rows, facts.feature_size), dtype)
    specs["top_logprobs"] = ((rows, facts.top_k), np.float32)
    specs["top_ids"] = ((rows, facts.top_k), np.int32)
    return specs


def state_shapes(facts: DrafterFacts, context: int) -> dict[str, tuple[int, ...]]:
    """Shapes of what stays with the graph: per block kv.i [T + context, 2, g, d], and the bank [T + 1, D]."""
    kv = (facts.tree_slots + context, 2, facts.num_kv_heads, facts.head_size)
    return {**{f"kv.{i}": kv for i in range(facts.blocks)}, STATE: (facts.tree_slots + 1, facts.feature_size)}


def output_name(state: str) -> str:
    """Output of the graph that is bound to the memory of the input `state`."""
    return "bank_out" if state == STATE else f"{state}.out"


class Runner(Protocol):
    """Runs the graph, owning KV and bank.

    file_key: of the graph in DrafterFacts.files.  max_context: pairs that it holds.  bus_bytes: moved so far between
    host and device, both ways; 0 where they are one.  draft_ids: [V], target ids of the draft vocabulary, None where
    the graph takes no noise.
    """

    file_key: str
    max_context: int
    bus_bytes: int
    draft_ids: NDArray[np.int32] | None

    def rows(self, n: int) -> Rows:
        """Where the inputs of a call of n rows are to be written, at least n rows each."""
        ...

    def run(self, n: int, context: int, noise: Array | None, *, upload_features: bool) -> Candidates:
        """Run the first n of `rows(n)` against `context` pairs; the result is valid until the next run.

        noise: [V] float32, None for none.
        upload_features: they are read too; then the last row's children are wanted alone, and may be all that comes.
        """
        ...

    def touch(self, context: int) -> None:
        """Have memory of its own under the KV of `context` pairs, whatever it holds."""
        ...

    def close(self) -> None:
        """Give a device's memory back; nothing may be run after it."""
        ...


class CpuRunner:
    """INT8 graph on the CPU.  KV and bank are numpy arrays, input and output of the graph at once."""

    file_key = "cpu"
    bus_bytes = 0

    def __init__(self, file: Path, facts: DrafterFacts, threads: int):
        import onnxruntime as ort

        options = session_options(ort)
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Long enough for the operators of a call, whose threads would else have to be woken for each; the target's
        # threads need the cores between calls.
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        self._embedding = LookedUp(file.with_name(file.name + ".data"))
        with self._embedding:
            self._session = open_session(ort, file, options, [CPU])
        check_ports(self._session, file, facts, np.float32)
        self.max_context, self._slots = facts.max_context, facts.tree_slots
        self._rows = Rows.zeros(facts, CHUNK, np.float32)
        # Pages of the whole context are reserved, not touched: memory is taken as the context grows.
        shapes = state_shapes(facts, facts.max_context)
        try:
            self._bank = np.zeros(shapes.pop(STATE), np.float32)
            self._kv = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        except MemoryError:
            raise DeviceError(
                f"the drafter's context of {facts.max_context} tokens does not fit into memory: free some, or generate "
                "without speculation"
            ) from None
        given = {port.name for port in self._session.get_inputs()}
        self._inputs = [name for name in INPUTS if name in given]  # a graph of an older pair answers for every row
        self.draft_ids = read_draft_ids(self._session, file, facts)
        self._noise = np.zeros((1, facts.draft_vocab_size), np.float32)
        self._noisy = False
        self._lanes: dict[tuple[int, int], tuple[int, Any]] = {}  # rows and answers -> (KV rows bound, binding)

    def rows(self, n: int) -> Rows:
        """See Runner."""
        return self._rows

    def run(self, n: int, context: int, noise: Array | None, *, upload_features: bool) -> Candidates:
        """See Runner."""
        if noise is not None or self._noisy:
            self._noisy = True  # until it is certain that there is none: an interrupt may come in between
            self._noise[:] = 0 if noise is None else noise
            self._noisy = noise is not None
        kv_rows = self._slots + min(-(-context // PREFIX_STEP) * PREFIX_STEP, self.max_context)
        answers = 1 if upload_features and "queries" in self._inputs else n
        bound, binding = self._lanes.get((n, answers), (0, None))
        if bound != kv_rows:
            binding = self._bind(n, answers, kv_rows, binding)
        call(self._session, binding)
        self._embedding.add(n)
        return Candidates(self._rows.top_logprobs[:answers], self._rows.top_ids[:answers])

    def touch(self, context: int) -> None:
        """See Runner: pages that were never written share one page of zeros, which is read too quickly."""
        for buffer in self._kv.values():
            buffer[: self._slots + context, :, :, 0] += 0

    def close(self) -> None:
        """See Runner: memory of the host is freed with the last reference."""

    def _bind(self, n: int, answers: int, kv_rows: int, binding: Any | None) -> Any:
        """Point the graph at the first n rows, the last `answers` of them, and the first `kv_rows` of each buffer."""
        if binding is None:
            binding = self._session.io_binding()
            for name in self._inputs:
                begin = n - answers if name == "queries" else 0
                _bind_array(binding.bind_input, name, getattr(self._rows, name)[begin:n])
            for name in OUTPUTS:
                _bind_array(binding.bind_output, name, getattr(self._rows, name)[:answers])
            if self.draft_ids is not None:
                _bind_array(binding.bind_input, NOISE, self._noise)
            _bind_array(binding.bind_input, STATE, self._bank)
            _bind_array(binding.bind_output, output_name(STATE), self._bank)
        for name, buffer in self._kv.items():
            _bind_array(binding.bind_input, name, buffer[:kv_rows])
            _bind_array(binding.bind_output, output_name(name), buffer[:kv_rows])
        self._lanes[n, answers] = (kv_rows, binding)
        return binding


def session_options(ort: Any) -> Any:
    """Options of a session whose errors reach the user as exceptions, and not on stderr as well."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return options


def open_session(ort: Any, model: Path | bytes, options: Any, providers: Sequence[Any]) -> Any:
    """Load a graph; providers that do not start are an error, or missing in the session.  Raises DeviceError.

    For any provider but the CPU's, ONNX Runtime's own log is silenced meanwhile, and then back at its default.
    """
    if isinstance(model, Path):
        _check_endless(model)
    source, what = (str(model), model) if isinstance(model, Path) else (model, "a graph")
    quiet = providers != [CPU]
    if quiet:
        ort.set_default_logger_severity(4)  # what fails is told below, in one line
    try:
        return ort.InferenceSession(source, options, providers=list(providers), enable_fallback=0)
    except failures() as error:
        raise _failed(f"ONNX Runtime cannot load {what}", error, "export the drafter again") from error
    finally:
        if quiet:
            ort.set_default_logger_severity(2)


def _check_endless(file: Path) -> None:
    """Raise DeviceError for a graph that could run for ever, or a file that cannot be read."""
    try:
        with open_regular(file) as stream, mmap(stream.fileno(), 0, access=ACCESS_READ) as content:
            endless = content.find(_LOOP) >= 0
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise DeviceError(f"{file} cannot be read ({error}): export the drafter again") from None
    if endless:
        raise DeviceError(f"{file} holds a Loop, which no drafter has and which may never end: export it again")


def check_ports(session: Any, file: Path, facts: DrafterFacts, dtype: type[np.floating[Any]]) -> None:
    """Check a graph's inputs and outputs: names, dtypes, and sizes that are fixed.  Raises DeviceError naming one.

    dtype: of the graph's activations.  Graphs of older pairs have no `queries` and no `noise`.
    """
    rows, state = row_specs(facts, 0, dtype), state_shapes(facts, -facts.tree_slots)  # 0: as many as a call has
    inputs: dict[str, Spec] = {name: rows[name] for name in INPUTS}
    inputs |= {NOISE: ((1, facts.draft_vocab_size), np.float32)}
    inputs |= {name: (shape, dtype) for name, shape in state.items()}
    outputs: dict[str, Spec] = {name: rows[name] for name in OUTPUTS}
    outputs |= {output_name(name): (shape, dtype) for name, shape in state.items()}
    try:
        given, returned = session.get_inputs(), session.get_outputs()
    except ValueError as error:  # a name that is not UTF-8
        raise DeviceError(f"{file} has inputs without readable names ({error}): export the drafter again") from None
    lacking = {*inputs} - {port.name for port in given} - {"queries", NOISE}
    lacking |= {*outputs} - {port.name for port in returned}
    odd = {port.name for port in given} - {*inputs}
    if lacking or odd:
        found = f"no {min(lacking)!r}" if lacking else f"an unknown input {min(odd)!r}"
        raise DeviceError(f"{file} has {found}: export the drafter again")
    for port in (*given, *returned):
        if port.name not in inputs | outputs:
            continue
        shape, kind = (inputs | outputs)[port.name]
        pairs = zip(port.shape, shape, strict=False)
        fits = all(size == wanted or not wanted or not isinstance(size, int) for size, wanted in pairs)
        if port.type != _TYPES[kind] or len(port.shape) != len(shape) or not fits:
            raise DeviceError(
                f"{file}: {port.name} is {port.type} {port.shape}, the manifest says {_TYPES[kind]} {list(shape)} "
                "(0 is any): export the drafter again"
            )


def read_draft_ids(session: Any, file: Path, facts: DrafterFacts) -> NDArray[np.int32] | None:
    """[V], target ids of the draft vocabulary, from the graph; None where it takes no noise.  Raises DeviceError."""
    if NOISE not in {port.name for port in session.get_inputs()}:
        return None
    try:
        ids = np.frombuffer(b64decode(session.get_modelmeta().custom_metadata_map[DRAFT_IDS], validate=True), "<i4")
        if len(ids) != facts.draft_vocab_size or not 0 <= ids.min() <= ids.max() < facts.target_vocab_size:
            raise ValueError(f"{len(ids)} ids")
    except (KeyError, ValueError) as error:
        raise DeviceError(f"{file} does not say its draft vocabulary ({error}): export the drafter again") from None
    return ids


def call(session: Any, binding: Any, run_options: Any = None) -> None:
    """Run a bound graph.  Raises DeviceError."""
    try:
        session.run_with_iobinding(binding, run_options)
    except failures() as error:
        raise _failed("the drafter failed", error, "generate without speculation") from error


def _failed(what: str, error: Exception, remedy: str) -> DeviceError:
    """remedy: where it is not memory that lacks."""
    said = one_line(error)
    if any(word in said.lower() for word in ("failed to allocate", "out of memory", "available memory")):
        remedy = "free memory, or shorten the drafter's context on a GPU with --vram SIZE --fit"
    return DeviceError(f"{what}: {said}: {remedy}")


def failures() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: its own exceptions have no common base; a run with bindings raises RuntimeError."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = (kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))
    return (RuntimeError, *own)


def one_line(error: Exception) -> str:
    """What an engine says, fit for a message of ours."""
    return " ".join(str(error).split())[:300]


def _bind_array(bind: Any, name: str, array: Array) -> None:
    """Bind a numpy array by address: no copy, and the array must stay alive."""
    bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
