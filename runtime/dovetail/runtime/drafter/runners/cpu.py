"""Run the drafter's INT8 graph on the CPU.

Axes: n rows of a call, T tree slots, S context pairs, K children per row, D feature size, V draft
vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dovetail.runtime.devices.ort import CPU, call, open_session, session_options
from dovetail.runtime.drafter.graph_io import (
    CHUNK,
    NOISE,
    OUTPUTS,
    STATE,
    Ports,
    check_ports,
    input_specs,
    output_name,
    read_draft_ids,
    row_specs,
    rows_of,
    state_shapes,
)
from dovetail.runtime.drafter.runners.buckets import Noise
from dovetail.runtime.drafter.session import DRAFTING
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.pair.manifest import DrafterFacts
from dovetail.runtime.system.arrays import Array
from dovetail.runtime.system.page_release import LookupMapping
from dovetail.runtime.tree.growth import Candidates

PREFIX_STEP = 256  # context pairs by which the bound part of the KV buffer grows
SPIN_US = 100  # microseconds for which the session's idle threads wait before they sleep


class CpuRunner:
    """Runner for the INT8 graph. KV and bank are numpy arrays, both inputs and outputs."""

    device_key = "cpu"
    bus_bytes = 0

    def __init__(self, file: Path, facts: DrafterFacts, threads: int, pairs: int | None = None):
        """pairs: of all texts; None for one text of the longest context. Raises DeviceError."""
        import onnxruntime as ort

        options = session_options(ort)
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads spin between the operators of a call; waking them for each operator would take
        # longer. Between calls the target's threads need the cores.
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        self._embedding = LookupMapping(file.with_name(file.name + ".data"))
        with self._embedding:
            self._session = open_session(ort, file, options, [CPU], DRAFTING)
        ports = Ports.of(self._session, file)
        check_ports(ports, file, facts, np.float32)
        self.max_context, self._slots, self._facts = pairs or facts.max_context, facts.tree_slots, facts
        specs = row_specs(facts, CHUNK, np.float32)
        self._arrays: dict[str, Array] = {name: np.zeros(*spec) for name, spec in specs.items()}
        self._rows = rows_of(facts, self._arrays)
        # Linux reserves pages for the whole context and provides them as the context grows.
        shapes = state_shapes(facts, self.max_context)
        try:
            self._bank = np.zeros(shapes.pop(STATE, 0), np.float32)  # empty for a block graph
            self._kv = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        except MemoryError:
            raise DeviceError(
                f"the drafter's context of {self.max_context} tokens does not fit into memory: free memory, or "
                "generate without speculation"
            ) from None
        # An older pair's graph without queries answers for every row.
        self.many_texts = "context_begin" in ports.given
        self._inputs = [name for name in input_specs(facts, 0, np.float32) if name in ports.given]
        self.draft_ids = read_draft_ids(ports, file, facts)
        self._noise = Noise(facts)
        self._lanes: dict[tuple[int, int], tuple[int, Any]] = {}  # (rows, answers) -> (bound KV rows, binding)

    def rows(self, n: int) -> Any:
        return self._rows

    def run(
        self, n: int, context: int, noise: Array | None, *, upload_features: bool, answers: int | None = None
    ) -> Candidates:
        self._noise.write(noise)
        kv_rows = self._slots + min(-(-context // PREFIX_STEP) * PREFIX_STEP, self.max_context)
        answers = self._facts.positions or (answers if answers and "queries" in self._inputs else n)
        bound, binding = self._lanes.get((n, answers), (0, None))
        if bound != kv_rows:
            binding = self._bind(n, answers, kv_rows, binding)
        call(self._session, binding, DRAFTING)
        self._embedding.add(n)
        return Candidates(self._rows.top_logprobs[:answers], self._rows.top_ids[:answers])

    def touch(self, context: int) -> None:
        """See Runner. Unwritten pages share one page of zeros, which is read too quickly."""
        for buffer in self._kv.values():
            buffer[: self._slots + context, :, :, 0] += 0

    def clear(self) -> None:
        written = max((rows for rows, _ in self._lanes.values()), default=0)  # the system need not provide the others
        for buffer in (self._bank, *(kv[:written] for kv in self._kv.values())):
            buffer.fill(0)

    def close(self) -> None:
        """Do nothing: Python frees the memory with the last reference."""

    def _bind(self, n: int, answers: int, kv_rows: int, binding: Any | None) -> Any:
        """Bind n rows, `answers` of the outputs, and the first `kv_rows` of each buffer."""
        if binding is None:
            binding = self._session.io_binding()
            specs = row_specs(self._facts, n, np.float32)
            for name in self._inputs:
                begin, end = n - answers if name == "queries" else 0, specs[name][0][0]
                _bind_array(binding.bind_input, name, self._arrays[name][begin:end])
            for name in OUTPUTS:
                _bind_array(binding.bind_output, name, self._arrays[name][:answers])
            if self.draft_ids is not None:
                _bind_array(binding.bind_input, NOISE, self._noise.array)
            if self._bank.size:
                _bind_array(binding.bind_input, STATE, self._bank)
                _bind_array(binding.bind_output, output_name(STATE), self._bank)
        for name, buffer in self._kv.items():
            _bind_array(binding.bind_input, name, buffer[:kv_rows])
            _bind_array(binding.bind_output, output_name(name), buffer[:kv_rows])
        self._lanes[n, answers] = (kv_rows, binding)
        return binding


def _bind_array(bind: Any, name: str, array: Array) -> None:
    """Bind a numpy array by address, without a copy. The array must stay alive."""
    bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
