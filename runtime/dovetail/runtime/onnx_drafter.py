"""The drafter on ONNX Runtime: one graph, static buffers bound once, state updated in place.

On the CPU (INT8) numpy arrays are the graph's inputs and outputs, so a tree level costs one run and a few
small writes; the KV buffer is bound as a prefix that grows with the context.  On CUDA (float16) the same
arrays are the host side of device tensors, in buckets of rows, each captured as a CUDA graph.

Axes: n rows of a call, T tree slots, S context pairs, L pairs so far, K children per row, D feature size.
KV row i < T belongs to tree node i, row T + j to pair j.  Bank row 0 is the root's feature, row i tree
node i's; row T takes what nobody will read.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .devices import cuda_problem, physical_cores
from .errors import ContextOverflow, DeviceError, InputError, PairError
from .manifest import DrafterFacts, Manifest
from .sessions import FloatArray, TokenArray
from .tree import Candidates, DraftTree, Judge, Level, TreeLimits, grow_tree

CHUNK = 128  # pairs of a prompt per call
PREFIX_STEP = 256  # context pairs by which the bound prefix of the KV buffer grows
BUCKETS = (8, 16, CHUNK)  # rows per captured CUDA graph
BLOCKED = -1e4  # additive mask: not attended to; float16 holds it

Array = NDArray[Any]


class OnnxDrafter:
    """DraftSession on ONNX Runtime.  `device` says where it runs, `device_note` why.

    file_key: of its graph in DrafterFacts.files.  max_context: pairs that it holds.  top_k: children it offers.
    """

    def __init__(self, facts: DrafterFacts, runner: Runner, *, device: str, device_note: str):
        self.device, self.device_note = device, device_note
        self.file_key, self.max_context, self.top_k = runner.file_key, facts.max_context, facts.top_k
        self._facts, self._runner, self._rows = facts, runner, runner.rows
        self._length = 0
        self._root: tuple[int, Candidates] | None = None  # last known token and its children

    @classmethod
    def open(cls, pair: Path, manifest: Manifest, *, device: str = "auto", threads: int | None = None) -> OnnxDrafter:
        """Load the pair's drafter: "cuda", "cpu", or "auto" (CUDA when there is one, else the CPU).

        threads: of the CPU session, default one per physical core.
        Raises PairError (no drafter), InputError (unknown device), DeviceError (CUDA asked for and missing,
        or ONNX Runtime refuses the file).
        """
        facts = manifest.drafter
        if facts is None:
            raise PairError(f"{pair} has no drafter: add one with dovetail-export drafter, or run without speculation")
        if device not in ("auto", "cpu", "cuda"):
            raise InputError(f"drafter device {device!r} is unknown: choose auto, cpu or cuda")
        note = "asked for"
        if device != "cpu":
            problem = _cuda_missing(facts)
            if problem is None:
                try:
                    runner = CudaRunner(Path(pair) / facts.files["cuda"], facts)
                    return cls(facts, runner, device="CUDA (fp16)", device_note="a CUDA device was found")
                except DeviceError as error:
                    problem = str(error)
            if device == "cuda":
                raise DeviceError(f"the drafter cannot run on CUDA: {problem}")
            note = f"no CUDA: {problem}"
        cpu = CpuRunner(Path(pair) / facts.files["cpu"], facts, threads or physical_cores())
        return cls(facts, cpu, device="CPU (int8)", device_note=note)

    @property
    def length(self) -> int:
        """(feature, token) pairs it has been extended with."""
        return self._length

    def extend(self, tokens: TokenArray, features: FloatArray) -> None:
        """Append pairs; the children of the last token are kept for `propose`.  tokens: [n], features: [n, D].

        Raises ContextOverflow, InputError (shapes, ids), DeviceError; the length counts finished chunks only.
        """
        self._check(tokens, features)
        self._root = None
        for start in range(0, len(tokens), CHUNK):
            chunk = slice(start, min(start + CHUNK, len(tokens)))
            found = self._extend(tokens[chunk], features[chunk])
            self._length += len(found.ids)
        if len(tokens):
            last = Candidates(found.logprobs[-1:].copy(), found.ids[-1:].copy())
            self._root = int(tokens[-1]), last

    def propose(self, limits: TreeLimits, judge: Judge | None = None) -> DraftTree:
        """Grow a tree below the last token of `extend`; each level is one run of the graph."""
        if self._root is None:
            raise InputError("nothing to draft from: extend the drafter with the last known token first")
        if limits.top_k > self._facts.top_k:
            raise InputError(
                f"tree top_k {limits.top_k} exceeds the drafter's {self._facts.top_k}: lower it or export again"
            )
        token, first = self._root
        return grow_tree(token, first, self._expand, limits, slots=self._facts.tree_slots, judge=judge)

    def reset(self, keep: int = 0) -> None:
        """Forget everything after the first `keep` pairs; drafting then needs a new `extend`."""
        if not 0 <= keep <= self._length:
            raise InputError(f"cannot keep {keep} pairs of {self._length}: give 0 to {self._length}")
        if keep < self._length:
            self._length, self._root = keep, None

    def assume(self, length: int) -> None:
        """Behave as if extended by `length` pairs, for timing alone: their KV is whatever lies there."""
        self._runner.touch(length)
        self._length, self._root = length, None

    def _extend(self, tokens: TokenArray, features: FloatArray) -> Candidates:
        """One chunk of at most CHUNK pairs."""
        n, start, slots, rows = len(tokens), self._length, self._facts.tree_slots, self._rows
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
        return self._runner.run(n, start + n, upload_features=True)

    def _expand(self, level: Level) -> Candidates:
        """One level of the tree: features of the parents come from the bank."""
        n, length, rows = len(level.rows), self._length, self._rows
        rows.input_ids[:n] = level.tokens
        rows.position_ids[:n] = length - 1 + level.depth
        rows.feature_rows[:n] = level.parent_rows
        rows.kv_slots[:n] = level.rows
        rows.bank_slots[:n] = level.rows
        rows.context_end[:n] = length
        mask = rows.tree_mask[:n]
        mask[...] = BLOCKED
        mask[level.attend] = 0
        return self._runner.run(n, length, upload_features=False)

    def _check(self, tokens: TokenArray, features: FloatArray) -> None:
        facts = self._facts
        if features.shape != (len(tokens), facts.feature_size):
            raise InputError(
                f"features {features.shape} do not fit {len(tokens)} tokens of feature size {facts.feature_size}"
            )
        if self._length + len(tokens) > facts.max_context:
            raise ContextOverflow(
                f"{self._length + len(tokens)} tokens exceed the drafter's context of {facts.max_context}: shorten "
                "the prompt or generate without speculation"
            )
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < facts.target_vocab_size:
            raise InputError(
                f"token ids {int(tokens.min())}..{int(tokens.max())} leave the vocabulary of {facts.target_vocab_size}"
            )


class Rows:
    """Per-row inputs and outputs of a call, [CHUNK, ..] each; a call of n rows uses the first n of all."""

    def __init__(self, facts: DrafterFacts, dtype: type[np.floating[Any]]):
        def index() -> NDArray[np.int64]:
            return np.zeros(CHUNK, np.int64)

        self.input_ids, self.position_ids, self.feature_rows = index(), index(), index()
        self.kv_slots, self.bank_slots, self.context_end = index(), index(), index()
        self.features: Array = np.zeros((CHUNK, facts.feature_size), dtype)
        self.tree_mask: Array = np.zeros((CHUNK, facts.tree_slots), dtype)
        self.top_logprobs = np.zeros((CHUNK, facts.top_k), np.float32)
        self.top_ids = np.zeros((CHUNK, facts.top_k), np.int32)

    INPUTS = (
        "input_ids", "position_ids", "features", "feature_rows", "kv_slots", "bank_slots", "context_end", "tree_mask",
    )  # fmt: skip
    OUTPUTS = ("top_logprobs", "top_ids")

    def pad(self, n: int, bucket: int, trash: int) -> None:
        """Make rows n..bucket harmless: they attend to nothing and write where nobody reads."""
        self.input_ids[n:bucket] = self.position_ids[n:bucket] = self.feature_rows[n:bucket] = 0
        self.kv_slots[n:bucket] = self.context_end[n:bucket] = 0
        self.bank_slots[n:bucket] = trash
        self.tree_mask[n:bucket] = BLOCKED


class Runner(Protocol):
    """Runs the graph on `rows`, owning KV and bank.  file_key: of the graph in DrafterFacts.files."""

    file_key: str
    rows: Rows

    def run(self, n: int, context: int, *, upload_features: bool) -> Candidates:
        """Run the first n rows against `context` pairs; the result is valid until the next run."""
        ...

    def touch(self, context: int) -> None:
        """Have memory of its own under the KV of `context` pairs, whatever it holds."""
        ...


class CpuRunner:
    """INT8 graph on the CPU.  KV and bank are numpy arrays, input and output of the graph at once."""

    file_key = "cpu"

    def __init__(self, file: Path, facts: DrafterFacts, threads: int):
        import onnxruntime as ort

        options = _options(ort)
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # The target's threads need the cores between levels: sleep, do not spin.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        self._session = _session(ort, file, options, ["CPUExecutionProvider"])
        self._slots, self._max_context = facts.tree_slots, facts.max_context
        self.rows = Rows(facts, np.float32)
        # Pages of the whole context are reserved, not touched: memory is taken as the context grows.
        self._kv = [np.zeros(shape, np.float32) for shape in _kv_shapes(facts)]
        self._bank = np.zeros((facts.tree_slots + 1, facts.feature_size), np.float32)
        self._lanes: dict[int, tuple[int, Any]] = {}  # n -> (KV rows bound, binding)

    def run(self, n: int, context: int, *, upload_features: bool) -> Candidates:
        """See Runner."""
        kv_rows = self._slots + min(-(-context // PREFIX_STEP) * PREFIX_STEP, self._max_context)
        bound, binding = self._lanes.get(n, (0, None))
        if bound != kv_rows:
            binding = self._bind(n, kv_rows, binding)
        _call(self._session, binding)
        return Candidates(self.rows.top_logprobs[:n], self.rows.top_ids[:n])

    def touch(self, context: int) -> None:
        """See Runner: pages that were never written share one page of zeros, which is read too quickly."""
        for buffer in self._kv:
            buffer[: self._slots + context, :, :, 0] += 0

    def _bind(self, n: int, kv_rows: int, binding: Any | None) -> Any:
        """Point the graph at the first n rows and the first `kv_rows` of each KV buffer."""
        if binding is None:
            binding = self._session.io_binding()
            for name in Rows.INPUTS:
                _bind_array(binding.bind_input, name, getattr(self.rows, name)[:n])
            for name in Rows.OUTPUTS:
                _bind_array(binding.bind_output, name, getattr(self.rows, name)[:n])
            _bind_array(binding.bind_input, "bank", self._bank)
            _bind_array(binding.bind_output, "bank_out", self._bank)
        for layer, buffer in enumerate(self._kv):
            _bind_array(binding.bind_input, f"kv.{layer}", buffer[:kv_rows])
            _bind_array(binding.bind_output, f"kv.{layer}.out", buffer[:kv_rows])
        self._lanes[n] = (kv_rows, binding)
        return binding


class CudaRunner:
    """float16 graph on CUDA: device tensors, one captured graph per bucket of rows, fixed KV length.

    ONNX Runtime replays a captured graph without looking at shapes, so `_graphs` keeps which bucket a
    graph id was captured for, and nothing else is ever run under that id.
    """

    file_key = "cuda"

    def __init__(self, file: Path, facts: DrafterFacts):
        import onnxruntime as ort

        self._ort, self._trash = ort, facts.tree_slots
        with redirect_stdout(StringIO()):  # it prints what it does not find
            ort.preload_dlls()  # CUDA and cuDNN from their wheels, where those are installed
        options = _options(ort)
        kv_shapes = _kv_shapes(facts)
        options.add_free_dimension_override_by_name("slots", kv_shapes[0][0])
        self._session = _session(ort, file, options, [("CUDAExecutionProvider", {"enable_cuda_graph": "1"})])
        if self._session.get_providers()[0] != "CUDAExecutionProvider":
            raise DeviceError(
                "ONNX Runtime could not load its CUDA provider: pip install 'dovetail-spec[cuda]' brings CUDA and cuDNN"
            )
        self.rows = Rows(facts, np.float16)
        state = {f"kv.{layer}": shape for layer, shape in enumerate(kv_shapes)}
        state["bank"] = (facts.tree_slots + 1, facts.feature_size)
        self._state = {name: self._to_device(np.zeros(shape, np.float16)) for name, shape in state.items()}
        self._graphs = {bucket: self._capture(graph_id, bucket) for graph_id, bucket in enumerate(BUCKETS, 1)}

    def run(self, n: int, context: int, *, upload_features: bool) -> Candidates:
        """See Runner; `context` needs no binding here, the mask says how far rows see."""
        bucket = next(size for size in BUCKETS if size >= n)
        self.rows.pad(n, bucket, self._trash)
        tensors, binding, run_options = self._graphs[bucket]
        try:
            for name in Rows.INPUTS:
                if upload_features or name != "features":
                    tensors[name].update_inplace(getattr(self.rows, name)[:bucket])
        except _failures() as error:
            raise DeviceError(f"the CUDA device failed: {_one_line(error)}: use --drafter-device cpu") from error
        _call(self._session, binding, run_options)
        return Candidates(tensors["top_logprobs"].numpy()[:n], tensors["top_ids"].numpy()[:n])

    def touch(self, context: int) -> None:
        """See Runner: device memory is there from the start."""

    def _capture(self, graph_id: int, bucket: int) -> tuple[dict[str, Any], Any, Any]:
        """Device tensors, binding and run options of one bucket; the first runs capture its graph."""
        self.rows.pad(0, bucket, self._trash)
        names = (*Rows.INPUTS, *Rows.OUTPUTS)
        tensors = {name: self._to_device(getattr(self.rows, name)[:bucket]) for name in names}
        binding = self._session.io_binding()
        for name in Rows.INPUTS:
            binding.bind_ortvalue_input(name, tensors[name])
        for name in Rows.OUTPUTS:
            binding.bind_ortvalue_output(name, tensors[name])
        for name, value in self._state.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output("bank_out" if name == "bank" else f"{name}.out", value)
        run_options = self._ort.RunOptions()
        run_options.add_run_config_entry("gpu_graph_id", str(graph_id))
        for _ in range(3):  # memory patterns, capture, first replay
            _call(self._session, binding, run_options)
        return tensors, binding, run_options

    def _to_device(self, array: Array) -> Any:
        try:
            return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), "cuda", 0)
        except _failures() as error:  # out of memory, most likely
            raise DeviceError(f"{array.nbytes} bytes do not fit on the CUDA device: {_one_line(error)}") from error


def _kv_shapes(facts: DrafterFacts) -> list[tuple[int, ...]]:
    """Per block [T + S, 2, g, d] for the whole context."""
    return [(facts.tree_slots + facts.max_context, 2, facts.num_kv_heads, facts.head_size)] * facts.blocks


def _cuda_missing(facts: DrafterFacts) -> str | None:
    """Why the drafter cannot run on CUDA, known before ONNX Runtime is asked: it complains on stderr."""
    if "cuda" not in facts.files:
        return "the pair holds no float16 drafter: export it again"
    return cuda_problem()


def _options(ort: Any) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors reach the user as exceptions, not on stderr as well
    return options


def _session(ort: Any, file: Path, options: Any, providers: Sequence[Any]) -> Any:
    try:
        return ort.InferenceSession(str(file), options, providers=list(providers))
    except _failures() as error:
        raise DeviceError(f"ONNX Runtime cannot load {file}: {_one_line(error)}: export the drafter again") from error


def _call(session: Any, binding: Any, run_options: Any = None) -> None:
    try:
        session.run_with_iobinding(binding, run_options)
    except _failures() as error:
        raise DeviceError(f"the drafter failed: {_one_line(error)}: generate without speculation") from error


def _bind_array(bind: Any, name: str, array: Array) -> None:
    """Bind a numpy array by address: no copy, and the array must stay alive."""
    bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def _failures() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: its own exceptions have no common base; a run with bindings raises RuntimeError."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = (
        "EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented",
        "RuntimeException",
    )  # fmt: skip
    return (RuntimeError, *(getattr(state, name) for name in names))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
