"""Devices for the first layers: ONNX Runtime's CPU and CUDA providers. webgpu/device.py of the drafter is a third.

All keep arrays as OrtValues.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.drafter.cuda_api import PROVIDER, cuda_problem, gpu_name, preload
from dovetail.runtime.drafter.graph_io import Spec
from dovetail.runtime.drafter.ort import CPU, failures, run_failed
from dovetail.runtime.errors import DeviceError


class LayerDevice(Protocol):
    """A device that runs the first layers. Its methods raise DeviceError."""

    name: str
    provider: str  # the execution provider

    def add_to(self, options: Any, *, capture: bool) -> None:
        """Let a session with these options run on the device."""

    def allocate(self, session: Any, spec: Spec) -> Any:
        """Return an OrtValue of zeros on the device."""

    def upload(self, to: Any, source: NDArray[Any]) -> None:
        """Copy an array up."""

    def download(self, to: Mapping[str, NDArray[Any]], sources: Mapping[str, Any]) -> None:
        """Wait for the queued work, and copy the device's arrays into those of the same names."""


class OrtDevice:
    """A device of ONNX Runtime's own."""

    def __init__(self, kind: str, name: str, provider: str, options: Mapping[str, str] | None = None):
        """kind: ONNX Runtime's name for the memory. options: of the provider."""
        self.kind, self.name, self.provider, self._options = kind, name, provider, options or {}

    @classmethod
    def cpu(cls) -> OrtDevice:
        """Return the CPU as a device: for tests, because OpenVINO is quicker there."""
        return cls("cpu", "CPU", CPU)

    @classmethod
    def cuda(cls) -> OrtDevice:
        """Return the first CUDA device. Raises DeviceError."""
        if problem := cuda_problem():
            raise DeviceError(problem)
        preload()
        options = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
        return cls("cuda", gpu_name() or "CUDA", PROVIDER, options)

    @property
    def providers(self) -> Sequence[Any]:
        return [(self.provider, dict(self._options))] if self._options else [self.provider]

    def add_to(self, options: Any, *, capture: bool) -> None:
        """Let idle threads sleep: the target's need the cores."""
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    def allocate(self, session: Any, spec: Spec) -> Any:
        import onnxruntime as ort

        shape, dtype = spec
        try:
            value = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self.kind, 0)
        except failures() as error:
            raise run_failed(error) from error
        self.upload(value, np.zeros(shape, dtype))
        return value

    def upload(self, to: Any, source: NDArray[Any]) -> None:
        try:
            to.update_inplace(source)
        except failures() as error:
            raise run_failed(error) from error

    def download(self, to: Mapping[str, NDArray[Any]], sources: Mapping[str, Any]) -> None:
        try:
            for name, value in sources.items():
                to[name][...] = value.numpy()
        except failures() as error:
            raise run_failed(error) from error
