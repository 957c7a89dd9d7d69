"""Run the first layers on a device. Keys and values stay there, those of each text in buffers of its own.

Axes: R rows of a call, n rows that a call returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.devices.memory import keep
from dovetail.runtime.devices.ort import call, check_placement, open_session, placed_options
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.system.arrays import FloatArray
from dovetail.runtime.target.layers.attention import ANSWERS, CALL, FIELDS, PREFIX, slots_for
from dovetail.runtime.target.layers.device import WORK, LayerDevice
from dovetail.runtime.target.layers.graph import LayerGraph


@dataclass
class Call:
    """The inputs of one call, with nothing in them yet."""

    data: NDArray[np.int32]
    ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    slots: NDArray[np.int32]
    parents: NDArray[np.int32]
    sources: NDArray[np.int32]
    targets: NDArray[np.int32]
    length: NDArray[np.int32]

    @classmethod
    def empty(cls, capacity: int) -> Call:
        """Return a call whose rows write to the slot that nobody reads."""
        data = np.zeros(sum(FIELDS.values()), np.int32)
        ends = np.cumsum([*FIELDS.values()])[:-1]
        made = cls(data, *np.split(data, ends))
        for slots in (made.slots, made.sources, made.targets):
            slots[:] = slots_for(capacity) - 1
        return made


class LayerSession:
    """The layers' graph on a device, with buffers for the keys and values of some texts."""

    def __init__(self, graph: LayerGraph, device: LayerDevice, texts: int, threads: int | None = None):
        """texts: whose keys and values the device holds at once. Raises DeviceError."""
        import onnxruntime as ort

        options = placed_options(ort)
        if threads is not None:
            options.intra_op_num_threads = threads
        held = [ort.OrtValue.ortvalue_from_numpy(array) for array in graph.weights.values()]
        options.add_external_initializers([*graph.weights], held)
        device.add_to(options, capture=False)
        self._session: Any = open_session(ort, graph.model, options, device.providers, WORK)
        check_placement(self._session, device.provider, WORK)
        self._device, self._sizes = device, graph.outputs  # not the graph: its weights are on the device now
        self.texts, self.capacity, self.bus_bytes = texts, graph.capacity, 0
        specs = {name: (shape, graph.kv_type) for name, shape in graph.kv_shapes.items()}
        self._kv = [{name: device.allocate(self._session, spec) for name, spec in specs.items()} for _ in range(texts)]
        self._call = device.allocate(self._session, ((sum(FIELDS.values()),), np.int32))
        self._outputs: dict[int, dict[str, Any]] = {}  # n -> values on the device
        self._answers: dict[int, Any] = {}
        self._bindings: dict[tuple[int, int, int, int], Any] = {}

    def run(self, text: int, given: Call, prefix: int, count: int) -> Mapping[str, FloatArray]:
        """Run a call for a text. Return the outputs of its first `count` rows. Raises DeviceError."""
        return self._run(text, text, given, prefix, count)

    def copy(self, source: int, target: int, given: Call, prefix: int) -> None:
        """Copy the keys and values of one text to those of another, and move rows of the copy. Raises DeviceError."""
        self._run(source, target, given, prefix, 1)

    def close(self) -> None:
        """Free the device's memory, unless the device has failed: see keep_on_failed."""
        try:
            self._device.upload(self._call, np.zeros(sum(FIELDS.values()), np.int32))
        except DeviceError:
            keep(self._session, self._call, self._kv, self._outputs, self._answers, self._bindings)
        self._session = self._call = None
        self._kv, self._outputs, self._answers, self._bindings = [], {}, {}, {}

    def _run(self, source: int, target: int, given: Call, prefix: int, count: int) -> Mapping[str, FloatArray]:
        binding = self._binding(source, target, prefix, count)
        self._device.upload(self._call, given.data)
        call(self._session, binding, WORK)
        found = {name: np.empty((count, size), np.float32) for name, size in self._sizes.items()}
        self._device.download(found, self._outputs[count])
        self.bus_bytes += given.data.nbytes + sum(array.nbytes for array in found.values())
        if not all(np.isfinite(array).all() for array in found.values()):
            raise DeviceError(f"the layers on {self._device.name} returned values that are no numbers: {WORK.off}")
        return found

    def _binding(self, source: int, target: int, prefix: int, count: int) -> Any:
        key = source, target, prefix, count
        if key not in self._bindings:
            if count not in self._outputs:
                self._outputs[count] = {
                    name: self._device.allocate(self._session, ((count, size), np.float32))
                    for name, size in self._sizes.items()
                }
                self._answers[count] = self._device.allocate(self._session, ((count,), np.int32))
                self._device.upload(self._answers[count], np.arange(count, dtype=np.int32))
            binding = self._session.io_binding()
            binding.bind_ortvalue_input(CALL, self._call)
            binding.bind_ortvalue_input(ANSWERS, self._answers[count])
            binding.bind_cpu_input(PREFIX, np.array([prefix], np.int64))
            for name, value in self._kv[source].items():
                binding.bind_ortvalue_input(name, value)
            for name, value in self._kv[target].items():
                binding.bind_ortvalue_output(f"{name}.out", value)
            for name, value in self._outputs[count].items():
                binding.bind_ortvalue_output(name, value)
            self._bindings[key] = binding
        return self._bindings[key]
