"""Devices for the first layers: ONNX Runtime's CPU and CUDA providers, and its WebGPU plugin.

All keep arrays as OrtValues.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from dovetail.runtime.devices.cuda import PROVIDER, cuda_problem, gpu_name, preload
from dovetail.runtime.devices.ort import CPU, failures, run_failed
from dovetail.runtime.devices.webgpu import WebGpuDevice
from dovetail.runtime.devices.work import Work
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.system.arrays import Array, Spec

_WITHOUT = "leave out --gpu-layers, or give --gpu-layers 0"
WORK = Work(
    name="a call of the target's first layers",
    again=_WITHOUT,
    off=_WITHOUT,
    without=_WITHOUT,
    less="give fewer --gpu-layers",
)


class LayerDevice(Protocol):
    """A device that runs the first layers. Its methods raise DeviceError."""

    name: str
    key: str  # "cuda", "webgpu" or "cpu"
    provider: str  # the execution provider
    compressed: bool  # whether it multiplies compressed matrices; else weights are float32
    expands: bool  # whether it does so by a float32 copy for the call
    kv_type: type[np.floating[Any]]  # of keys and values

    @property
    def providers(self) -> Sequence[Any]:
        """Return providers of a session with their options, none if `add_to` adds them."""

    def add_to(self, options: Any, *, capture: bool) -> None:
        """Let a session with these options run on the device."""

    def allocate(self, session: Any, spec: Spec) -> Any:
        """Return an OrtValue of zeros on the device."""

    def upload(self, to: Any, source: Array) -> None:
        """Copy an array up."""

    def download(self, to: Mapping[str, Array], sources: Mapping[str, Any]) -> None:
        """Wait for the queued work, and copy the device's arrays into those of the same names."""


class OrtDevice:
    """A device of ONNX Runtime's own."""

    compressed = expands = True
    kv_type = np.float16  # as OpenVINO's, so that both compute alike

    def __init__(self, kind: str, name: str, provider: str, *, compressed: bool, **options: str):
        """kind: ONNX Runtime's name for the memory. options: of the provider."""
        self.key, self.name, self.provider = kind, name, provider
        self.compressed, self.expands = compressed, kind == "cuda"
        self._options = options

    @classmethod
    def cpu(cls, *, compressed: bool = False) -> OrtDevice:
        """Return the CPU as a device, for tests. Its kernel for compressed matrices is slow with 8 bits."""
        return cls("cpu", "CPU", CPU, compressed=compressed)

    @classmethod
    def cuda(cls) -> OrtDevice:
        """Return the first CUDA device. Raises DeviceError."""
        if problem := cuda_problem(WORK.off):
            raise DeviceError(problem)
        preload()
        options = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}  # TF32 rounds to 10 bits
        return cls("cuda", gpu_name() or "CUDA", PROVIDER, compressed=True, **options)

    @property
    def providers(self) -> Sequence[Any]:
        return [(self.provider, dict(self._options))] if self._options else [self.provider]

    def add_to(self, options: Any, *, capture: bool) -> None:
        """Let idle threads sleep: the target needs the cores."""
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    def allocate(self, session: Any, spec: Spec) -> Any:
        import onnxruntime as ort

        shape, dtype = spec
        try:
            value = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self.key, 0)
        except failures() as error:
            raise run_failed(error, WORK) from error
        self.upload(value, np.zeros(shape, dtype))
        return value

    def upload(self, to: Any, source: Array) -> None:
        try:
            to.update_inplace(source)
        except failures() as error:
            raise run_failed(error, WORK) from error

    def download(self, to: Mapping[str, Array], sources: Mapping[str, Any]) -> None:
        try:
            for name, value in sources.items():
                to[name][...] = value.numpy()
        except failures() as error:
            raise run_failed(error, WORK) from error


class WebGpuLayers(WebGpuDevice):
    """The adapter of the WebGPU plugin. Keys and values are float32, which every adapter has."""

    key, compressed, expands, kv_type, providers = "webgpu", True, False, np.float32, ()

    def __init__(self, *, software: bool):
        """software: see webgpu_problem."""
        super().__init__(WORK, software=software)


KINDS: Mapping[str, type[OrtDevice | WebGpuLayers]] = {"cuda": OrtDevice, "webgpu": WebGpuLayers}  # on GPUs
