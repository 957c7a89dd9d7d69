"""Run the float16 graph on a GPU: state on the device, one captured graph per bucket of rows.

A call is one copy up, one replay and one copy down, in order on one stream, and one wait at the
end. Inputs and outputs of a bucket lie in one block of memory each, on the device and, pinned, on
the host. The noise of sampled answers needs a further copy up, from one block for all buckets.
ONNX Runtime keeps captured graphs per thread, and frees none: the runner has a thread of its own for
all calls, so that an engine may be used from any thread.
"""

from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from dovetail.runtime.devices.memory import Block, Device, keep_on_failed
from dovetail.runtime.devices.ort import call, check_placement, open_session, placed_options
from dovetail.runtime.drafter.graph_io import (
    NOISE,
    OUTPUTS,
    BlockRows,
    Ports,
    Rows,
    check_ports,
    input_specs,
    noise_spec,
    output_name,
    read_draft_ids,
    row_specs,
    rows_of,
    state_shapes,
)
from dovetail.runtime.drafter.runners.buckets import BucketRunner, Noise
from dovetail.runtime.drafter.session import DRAFTING
from dovetail.runtime.drafter.vram import BUCKETS, VramPlan
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.pair.manifest import DrafterFacts
from dovetail.runtime.system.arrays import Array


@dataclass(frozen=True)
class Captured:
    """One bucket's graph."""

    rows: Rows | BlockRows
    inputs: Block
    outputs: Block
    short: int  # bytes of the inputs without features, which come last
    binding: Any
    run_options: Any


class CudaRunner(BucketRunner[Captured]):
    """Runner on a GPU. Raises DeviceError if device, libraries or graph do not permit running there.

    A graph that ONNX Runtime refuses to capture is run node by node, if every node is on the GPU.
    ONNX Runtime replays a graph by its id without checking shapes; `_buckets` is the registry.
    """

    device_key = "cuda"

    def __init__(self, file: Path, facts: DrafterFacts, plan: VramPlan, device: Device, *, limit: int):
        """plan: context and memory. limit: bytes for all memory, 0 for no limit."""
        import onnxruntime as ort

        self.max_context, self.bus_bytes = plan.context, 0
        self._ort, self._device, self._facts = ort, device, facts
        self._buckets: dict[int, Captured] = {}
        self.refused: str | None = None  # why ONNX Runtime does not capture; calls are then launched one by one
        self._held: list[Any] = [self._buckets]  # freed before the device; no other object may hold these references
        self._thread = ThreadPoolExecutor(1, "drafter")
        self._release = weakref.finalize(self, _release, self._held, device, self._thread)
        problem = None
        try:
            self._held.append(self._open(file, plan, plan.arena(limit) if limit else None))
            ports = Ports.of(self._session, file)
            check_ports(ports, file, facts, np.float16)
            self.draft_ids = read_draft_ids(ports, file, facts)
            self.many_texts = "context_begin" in ports.given
            self._noise = self._noise_block = None
            if self.draft_ids is not None:
                self._noise_block = Block.allocate(device, {NOISE: noise_spec(facts)})
                self._noise = Noise(facts, self._noise_block.array(NOISE))
            shapes = state_shapes(facts, plan.context)
            self._state = {name: (shape, device.allocate(prod(shape) * 2)) for name, shape in shapes.items()}
            for number, bucket in reversed([*enumerate(BUCKETS, 1)]):  # largest first: the others reuse its memory
                self._buckets[bucket] = self._capture(number, bucket, ports.given)
        except DeviceError as error:
            problem = str(error)
        if problem:  # outside the handler, because a traceback would keep the session longer than its stream
            self.close()
            raise DeviceError(f"{problem} (planned: {plan})")

    def clear(self) -> None:
        for shape, address in self._state.values():
            self._device.clear(address, prod(shape) * 2)

    def close(self) -> None:
        self._release()

    def _call(self, bucket: Captured, *, upload_features: bool) -> None:
        """Queue the copy up, the graph and the copy down, and wait for all. Raises DeviceError."""
        device, outputs = self._device, bucket.outputs
        sent = bucket.inputs.host if upload_features else bucket.inputs.host[: bucket.short]
        device.upload(bucket.inputs.address, sent)
        self._launch(bucket.binding, bucket.run_options)
        device.download(outputs.host, outputs.address)
        device.wait()
        self.bus_bytes += sent.nbytes + outputs.host.nbytes

    def _send_noise(self, noise: Array) -> None:
        assert self._noise_block
        self._device.upload(self._noise_block.address, self._noise_block.host)
        self.bus_bytes += self._noise_block.host.nbytes

    def _launch(self, binding: Any, run_options: Any) -> None:
        """Run a bound graph on the runner's own thread. Raises DeviceError."""
        try:
            self._thread.submit(call, self._session, binding, DRAFTING, run_options).result()
        except BaseException:
            self._thread.submit(int).result()  # an interrupt must not leave a call that reads the rows
            raise

    @property
    def _session(self) -> Any:
        return self._held[1]

    def _open(self, file: Path, plan: VramPlan, arena: int | None) -> Any:
        """Open a session, if possible one that captures. Raises DeviceError, which names unsuitable nodes."""
        provider, slots = self._device.provider, self._facts.tree_slots + plan.context

        def session(*, capture: bool) -> Any:
            options = placed_options(self._ort, slots=slots)
            chosen = self._device.provider_options(arena, capture=capture)
            return open_session(self._ort, file, options, [(provider, chosen)], DRAFTING)

        try:
            opened = session(capture=True)
        except DeviceError as error:
            self.refused = str(error)
        if self.refused:  # outside the handler, because a traceback would keep what the first session allocated
            opened = session(capture=False)
        check_placement(opened, provider, DRAFTING)  # ONNX Runtime does not name the nodes that it cannot capture
        return opened

    def _capture(self, number: int, bucket: int, given: set[str]) -> Captured:
        """Allocate and bind one bucket. The first runs capture its graph under this number, if it is captured."""
        specs = row_specs(self._facts, bucket, np.float16)
        inputs = Block.allocate(self._device, input_specs(self._facts, bucket, np.float16))
        outputs = Block.allocate(self._device, {name: specs[name] for name in OUTPUTS})
        arrays = {name: (outputs if name in OUTPUTS else inputs).array(name) for name in specs}
        binding = self._session.io_binding()
        kind = self._device.kind
        for name in given.intersection(inputs.specs):  # an older pair's graph has no queries
            inputs.bind(binding.bind_input, name, kind)
        if self._noise_block:
            self._noise_block.bind(binding.bind_input, NOISE, kind)
        for name in OUTPUTS:
            outputs.bind(binding.bind_output, name, kind)
        for name, (shape, address) in self._state.items():
            binding.bind_input(name, kind, 0, np.float16, shape, address)
            binding.bind_output(output_name(name), kind, 0, np.float16, shape, address)
        run_options = self._ort.RunOptions()
        run_options.add_run_config_entry("gpu_graph_id", str(number))
        # `run` itself waits, after its copy down.
        run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        rows = rows_of(self._facts, arrays)
        rows.pad(0, self._facts.tree_slots)
        self._device.upload(inputs.address, inputs.host)
        for _ in range(3):  # memory patterns, capture, first replay
            self._launch(binding, run_options)
        self._device.wait()
        return Captured(rows, inputs, outputs, inputs.offsets["features"], binding, run_options)


def _release(held: list[Any], device: Device, thread: ThreadPoolExecutor) -> None:
    """Free the graphs, held[0], and the session, held[1], then the device.

    The device is freed after a session that the traceback of a pending error still holds.
    """
    thread.shutdown()
    if keep_on_failed(device, *held):
        held.clear()
        device.close()
        return
    held[0].clear()  # frees the bindings first
    session = weakref.ref(held[1]) if len(held) > 1 else None
    held.clear()
    alive = session() if session else None
    if alive is None:
        device.close()
    else:
        weakref.finalize(alive, device.close).atexit = False
