"""Run the INT8 graph on any GPU, by ONNX Runtime's WebGPU plugin: state on the device, captured calls.

The design is that of cuda.py: a bucket of rows has buffers of its own and one captured call. KV and
bank have one buffer each, which is both input and output of the graph: the plugin's ScatterND
copies nothing then.

The graph is the CPU's INT8 graph, rewritten in memory by webgpu_graph.py. It runs on each adapter,
and the float16 graph only on those with `shader-f16`. Its weights are half as many bytes, which
counts on a GPU that shares the memory of the CPU. The embedding stays on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.devices.ort import call, check_placement, open_session, placed_options
from dovetail.runtime.devices.webgpu import WebGpuDevice
from dovetail.runtime.drafter.graph_io import (
    NOISE,
    OUTPUTS,
    BlockRows,
    Ports,
    Rows,
    check_ports,
    noise_spec,
    output_name,
    read_draft_ids,
    row_specs,
    rows_of,
    state_shapes,
)
from dovetail.runtime.drafter.runners.buckets import BucketRunner, Noise
from dovetail.runtime.drafter.runners.webgpu_graph import EMBEDDED, WebGpuGraph
from dovetail.runtime.drafter.session import DRAFTING
from dovetail.runtime.drafter.vram import BUCKETS, VramPlan
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.pair.manifest import DrafterFacts
from dovetail.runtime.system.arrays import Array, Spec

SKIP_CAPTURE = -1  # the number of a plain call


@dataclass(frozen=True)
class Bucket:
    """One bucket's arrays on both sides, and its captured call."""

    rows: Rows | BlockRows
    arrays: Mapping[str, NDArray[Any]]  # on the host
    inputs: dict[str, Any]  # on the device, those that a call changes
    outputs: Mapping[str, Any]
    binding: Any
    run_options: Any

    @property
    def levels(self) -> dict[str, Any]:
        """The inputs of a call that does not read features."""
        return {name: value for name, value in self.inputs.items() if name != "features"}


class WebGpuRunner(BucketRunner[Bucket]):
    """Runner on a GPU of any make. Raises DeviceError if the adapter does not run or capture the graph."""

    device_key = "webgpu"

    def __init__(self, file: Path, graph: WebGpuGraph, facts: DrafterFacts, plan: VramPlan, device: WebGpuDevice):
        """file: where the graph and its weights lie. plan: the context, and bytes for the message of an error."""
        import onnxruntime as ort

        self.max_context, self.bus_bytes = plan.context, 0
        self._ort, self._device, self._facts, self._embedding = ort, device, facts, graph.embedding
        try:
            self._session: Any = self._open(file, graph.model)
            extra = {EMBEDDED: self._embedded(0)} if graph.embedding else {}
            ports = Ports.of(self._session, file)
            given = ports.given
            check_ports(ports, file, facts, np.float32, extra)
            self.many_texts = "context_begin" in given
            self.draft_ids = read_draft_ids(ports, file, facts)
            self._noise = None if self.draft_ids is None else Noise(facts)
            self._noise_there = device.allocate(self._session, noise_spec(facts)) if self._noise else None
            self._shapes = state_shapes(facts, plan.context)
            self._state = {
                name: device.allocate(self._session, (shape, np.float32)) for name, shape in self._shapes.items()
            }
            self._buckets = {bucket: self._capture(number, bucket, given) for number, bucket in enumerate(BUCKETS, 1)}
            # A buffer for which there was no memory is an error only when it is read.
            device.download({name: np.zeros(shape, np.float32) for name, shape in self._shapes.items()}, self._state)
            self.clear()
        except DeviceError as error:
            raise DeviceError(f"{error} (planned: {plan})") from error
        self.bus_bytes = 0

    def clear(self) -> None:
        for name, value in self._state.items():
            self._upload(value, np.zeros(self._shapes[name], np.float32))

    def close(self) -> None:
        """Free buffers, captured calls and session. The plugin keeps freed buffers for a later session."""
        self._buckets, self._state, self._noise_there, self._session = {}, {}, None, None

    def _open(self, file: Path, model: bytes) -> Any:
        """Open a session that captures. Raises DeviceError, which names unsuitable nodes."""
        slots = self._facts.tree_slots + self.max_context

        def session(*, capture: bool) -> Any:
            options = placed_options(self._ort, slots=slots)
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
            self._device.add_to(options, capture=capture)
            return open_session(self._ort, model, options, [], DRAFTING, DRAFTING.off)

        try:
            opened = session(capture=True)
        except DeviceError:  # ONNX Runtime does not name the nodes that it cannot capture
            check_placement(session(capture=False), self._device.provider, DRAFTING)
            raise
        check_placement(opened, self._device.provider, DRAFTING)
        return opened

    def _embedded(self, rows: int) -> Spec:
        assert self._embedding
        return (rows, self._embedding.size), np.float32

    def _capture(self, number: int, bucket: int, given: set[str]) -> Bucket:
        """Allocate and bind one bucket, and capture its call under this number. given: the graph's inputs."""
        specs = row_specs(self._facts, bucket, np.float32)
        if self._embedding:
            specs = {EMBEDDED: self._embedded(1 if self._facts.positions else bucket), **specs}
        arrays: dict[str, Array] = {name: np.zeros(shape, dtype) for name, (shape, dtype) in specs.items()}
        values = {
            name: self._device.allocate(self._session, specs[name]) for name in specs if name in {*given, *OUTPUTS}
        }
        rows = rows_of(self._facts, {name: array for name, array in arrays.items() if name != EMBEDDED})
        binding = self._session.io_binding()
        for name, value in values.items():
            (binding.bind_ortvalue_output if name in OUTPUTS else binding.bind_ortvalue_input)(name, value)
        if self._noise:
            binding.bind_ortvalue_input(NOISE, self._noise_there)
        for name, value in self._state.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(output_name(name), value)
        inputs = {name: value for name, value in values.items() if name not in OUTPUTS}
        made = Bucket(rows, arrays, inputs, {name: values[name] for name in OUTPUTS}, binding, self._options(number))
        rows.pad(0, self._facts.tree_slots)
        for _ in range(2):  # capture, first replay
            self._call(made, upload_features=True)
        self._check_replay(made)
        inputs.pop("queries", None)  # the same in each call
        return made

    def _check_replay(self, bucket: Bucket) -> None:
        """Raise DeviceError unless a replay computes what a plain call does. A replay leaves out copies."""
        self._fill(bucket)
        found = []
        for options in (bucket.run_options, self._options(SKIP_CAPTURE)):
            bucket.rows.top_logprobs[:], bucket.rows.top_ids[:] = np.nan, 0
            for name in OUTPUTS:  # so that nothing passes which the call did not write
                self._upload(bucket.outputs[name], bucket.arrays[name])
            self._call(replace(bucket, run_options=options), upload_features=True)
            found.append([bucket.arrays[name].copy() for name in OUTPUTS])
        (logprobs, ids), (wanted, wanted_ids) = found
        if not (np.isfinite(wanted).all() and np.allclose(logprobs, wanted, atol=1e-3) and (ids == wanted_ids).all()):
            raise DeviceError(
                f"{self._device.name} does not repeat a captured call: update its driver, or {DRAFTING.off}"
            )

    def _fill(self, bucket: Bucket) -> None:
        """Give each row of a call a token, features and a pair of its own."""
        rng, n = np.random.default_rng(0), len(bucket.rows.kv_slots)
        bucket.rows.features[:] = rng.standard_normal(bucket.rows.features.shape)
        bucket.rows.kv_slots[:] = self._facts.tree_slots + np.arange(n) % self.max_context
        bucket.rows.context_end[:] = min(n, self.max_context)
        if isinstance(bucket.rows, Rows):
            bucket.rows.input_ids[:] = rng.integers(0, self._facts.target_vocab_size, n)
            bucket.rows.feature_rows[:] = self._facts.tree_slots + 1 + np.arange(n)

    def _options(self, graph: int) -> Any:
        made = self._ort.RunOptions()
        made.add_run_config_entry("gpu_graph_id", str(graph))
        return made

    def _call(self, bucket: Bucket, *, upload_features: bool) -> None:
        """Copy the inputs up, run, and copy the outputs down. Raises DeviceError."""
        if self._embedding:
            ids = bucket.rows.token if isinstance(bucket.rows, BlockRows) else bucket.rows.input_ids
            self._embedding.look_up(ids, bucket.arrays[EMBEDDED])
        for name, value in (bucket.inputs if upload_features else bucket.levels).items():
            self._upload(value, bucket.arrays[name])
        call(self._session, bucket.binding, DRAFTING, bucket.run_options)
        self._device.download(bucket.arrays, bucket.outputs)
        self.bus_bytes += sum(bucket.arrays[name].nbytes for name in OUTPUTS)

    def _send_noise(self, noise: Array) -> None:
        self._upload(self._noise_there, noise)

    def _upload(self, to: Any, array: Array) -> None:
        self._device.upload(to, array)
        self.bus_bytes += array.nbytes
