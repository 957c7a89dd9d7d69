"""Run the INT8 graph on an Intel GPU, by OpenVINO: state on the device, few numbers of rows.

OpenVINO reads the exported file as it is. KV and bank become variables of OpenVINO, which stay on
the device from call to call, in the type that its kernels compute with. A variable belongs to one
compiled graph. All buckets therefore share one graph with any number of rows, which also holds the
weights once. OpenVINO prepares kernels for each new number of rows. The runner pads calls to
the buckets, and opening runs each bucket once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dovetail.runtime.devices.openvino import OpenVinoDevice
from dovetail.runtime.devices.ort import check_endless
from dovetail.runtime.drafter.graph_io import (
    DRAFT_IDS,
    NOISE,
    OUTPUTS,
    TYPES,
    BlockRows,
    Ports,
    Rows,
    check_ports,
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

_METADATA = "framework"  # where OpenVINO keeps the metadata of an ONNX file


@dataclass(frozen=True)
class Bucket:
    """The arrays of one number of rows on the host."""

    rows: Rows | BlockRows
    arrays: Mapping[str, Array]
    inputs: Mapping[str, Any]  # OpenVINO's tensors over the arrays that the graph reads
    bus_bytes: int  # of a call


class OpenVinoRunner(BucketRunner[Bucket]):
    """Runner on a GPU of Intel. Raises DeviceError if OpenVINO does not run the graph there."""

    device_key = "openvino-gpu"

    def __init__(self, file: Path, facts: DrafterFacts, plan: VramPlan, device: OpenVinoDevice):
        """plan: the context, and bytes for the message of an error."""
        self.max_context, self.bus_bytes, self._device, self._facts = plan.context, 0, device, facts
        try:
            check_endless(file, DRAFTING)
            model = device.read(file)
            ports = _ports(model)
            check_ports(ports, file, facts, np.float32)
            self.draft_ids = read_draft_ids(ports, file, facts)
            self.many_texts = "context_begin" in ports.given
            self._noise = None if self.draft_ids is None else Noise(facts)
            self._request: Any = device.request(_with_variables(model, state_shapes(facts, plan.context)))
            self._buckets = {bucket: self._bucket(bucket, ports.given) for bucket in BUCKETS}
            for bucket in self._buckets.values():  # OpenVINO prepares its kernels now
                bucket.rows.pad(0, facts.tree_slots)
                self._call(bucket, upload_features=True)
            self.clear()
        except DeviceError as error:
            raise DeviceError(f"{error} (planned: {plan})") from error
        self.bus_bytes = 0

    def clear(self) -> None:
        self._device.clear(self._request)

    def close(self) -> None:
        """Free the compiled graph with its variables."""
        self._buckets, self._request = {}, None

    def _bucket(self, rows: int, given: set[str]) -> Bucket:
        """Return the arrays of one bucket. given: the graph's inputs."""
        import openvino as ov

        specs = row_specs(self._facts, rows, np.float32)
        arrays: dict[str, Array] = {name: np.zeros(*spec) for name, spec in specs.items()}
        read = {name: array for name, array in arrays.items() if name in given}  # an older pair's graph has no queries
        if self._noise:
            read[NOISE] = self._noise.array
        inputs = {name: ov.Tensor(array, shared_memory=True) for name, array in read.items()}
        moved = sum(array.nbytes for array in (*read.values(), *(arrays[name] for name in OUTPUTS)))
        return Bucket(rows_of(self._facts, arrays), arrays, inputs, moved)

    def _call(self, bucket: Bucket, *, upload_features: bool) -> None:
        """Run the graph. OpenVINO copies each input, also if the call reads no features."""
        self._device.call(self._request, bucket.inputs)
        for name in OUTPUTS:
            bucket.arrays[name][:] = self._request.get_tensor(name).data
        self.bus_bytes += bucket.bus_bytes


def _with_variables(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """Fix the shapes of a model's state, and make it variables in place of inputs and outputs."""
    from openvino import PartialShape
    from openvino.passes import MakeStateful, Manager

    model.reshape({name: PartialShape(shape) for name, shape in shapes.items()})
    passes = Manager()
    passes.register_pass(MakeStateful({name: output_name(name) for name in shapes}))
    passes.run_passes(model)
    return model


class _Port(NamedTuple):
    """An input or output as ONNX Runtime describes one."""

    name: str
    type: str
    shape: list[int | str]

    @classmethod
    def of(cls, port: Any) -> _Port:
        kind = TYPES.get(port.element_type.to_dtype().type, str(port.element_type))
        sizes = [size.get_length() if size.is_static else "any" for size in port.partial_shape]
        return cls(port.any_name, kind, sizes)


def _ports(model: Any) -> Ports:
    path = [_METADATA, DRAFT_IDS]
    metadata = {DRAFT_IDS: str(model.get_rt_info(path).value)} if model.has_rt_info(path) else {}
    return Ports([*map(_Port.of, model.inputs)], [*map(_Port.of, model.outputs)], metadata)
