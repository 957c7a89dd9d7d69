"""The drafter's INT8 graph on WebGPU and on OpenVINO, both of which compute on the CPU here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dovetail.runtime.devices.openvino import OpenVinoDevice
from dovetail.runtime.devices.webgpu import WebGpuDevice
from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.drafter.open import open_cpu, open_openvino, open_webgpu
from dovetail.runtime.drafter.session import DRAFTING
from dovetail.runtime.errors import DeviceError

# OpenVINO's CPU device otherwise quantises activations, and computes in bfloat16 on some CPUs.
EXACT = {
    "INFERENCE_NUM_THREADS": "1", "INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}  # fmt: skip


class SwiftShaderDevice(WebGpuDevice):
    """The plugin's device, with a fault. fail: whether copies down fail. spoil: whether they bring NaN."""

    def __init__(self) -> None:
        super().__init__(DRAFTING, software=True)
        self.fail = self.spoil = False
        self.moved = 0

    def upload(self, to: Any, source: np.ndarray) -> None:
        self.moved += source.nbytes
        super().upload(to, source)

    def download(self, to: Mapping[str, np.ndarray], sources: Mapping[str, Any]) -> None:
        if self.fail:
            raise DeviceError("the drafter failed: Device lost: generate without speculation")
        super().download(to, sources)
        self.moved += sum(to[name].nbytes for name in sources)
        if self.spoil:
            to["top_logprobs"][:] = np.nan


class OpenVinoCpu(OpenVinoDevice):
    """OpenVINO's CPU device, with a fault. fail: whether calls fail. spoil: whether features hold a NaN."""

    def __init__(self) -> None:
        super().__init__(DRAFTING, "CPU", EXACT)
        self.fail = self.spoil = False

    def call(self, request: Any, inputs: Mapping[str, Any]) -> None:
        if self.fail:
            raise DeviceError("the drafter failed: [GPU] CL_OUT_OF_RESOURCES: generate without speculation")
        if self.spoil:
            inputs["features"].data[:] = np.nan
        super().call(request, inputs)


@dataclass(frozen=True)
class Gpu:
    """A way to a GPU, with a device of its own that may fail."""

    name: str  # as the drafter has it
    new: Callable[[], Any]
    opener: Callable[..., OnnxDrafter]

    def on(self, pairs: Any, device: Any = None, **options: Any) -> OnnxDrafter:
        return self.opener(pairs.pair, pairs.manifest, new_device=lambda: device or self.new(), **options)


@pytest.fixture(scope="session")
def webgpu(swiftshader: None) -> Gpu:
    return Gpu("WebGPU (int8)", SwiftShaderDevice, open_webgpu)


@pytest.fixture(scope="session")
def openvino() -> Gpu:
    return Gpu("OpenVINO GPU (int8)", OpenVinoCpu, open_openvino)


@pytest.fixture
def exact_of(tmp_path: Path) -> Callable[[Any], OnnxDrafter]:
    """Opens a pair's INT8 weights on the CPU by ONNX Runtime, without quantised activations."""
    onnx = pytest.importorskip("onnx", reason="graphs are changed")

    def opened(pairs: Any) -> OnnxDrafter:
        file = pairs.pair / pairs.manifest.drafter.files["cpu"]
        model = onnx.load(file, load_external_data=False)
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 0
        changed = tmp_path / file.relative_to(pairs.pair)
        changed.parent.mkdir(parents=True)
        onnx.save(model, changed)
        data = file.with_name(file.name + ".data")
        (changed.parent / data.name).write_bytes(data.read_bytes())
        return open_cpu(tmp_path, pairs.manifest.drafter, "", threads=1)

    return opened
