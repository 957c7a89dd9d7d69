"""OpenVINO's GPU: find it, and compile and call graphs, with each failure in one line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dovetail.runtime.devices.ort import failed, run_failed
from dovetail.runtime.devices.work import Work
from dovetail.runtime.errors import DeviceError

GPU = "GPU"  # OpenVINO's name for the first Intel GPU, which is the integrated one if there is one
CHOICE = "DOVETAIL_OPENVINO_GPU"  # environment variable: OpenVINO's name for another one, such as GPU.1
INSTALL = "install the system's package intel-opencl-icd"


def chosen_gpu() -> str:
    """Return OpenVINO's name for the GPU that the user wants."""
    return os.environ.get(CHOICE) or GPU


def openvino_gpus() -> dict[str, str]:
    """Return OpenVINO's GPUs: names such as GPU.0, and their facts."""
    import openvino as ov

    names = [name for name in ov.Core().available_devices if name.split(".")[0] == GPU]
    return {name: gpu_facts(name) or name for name in names}


def openvino_gpu_problem() -> str | None:
    """Return why OpenVINO does not have the chosen GPU, with the remedy, or None if it has."""
    chosen, found = chosen_gpu(), openvino_gpus()
    if not found:
        return f"OpenVINO finds no Intel GPU: {INSTALL} if there is one, or use --drafter-device cpu"
    if chosen in {GPU, f"{GPU}.0", *found}:
        return None
    return f"{CHOICE} is {chosen!r}, but OpenVINO's GPUs are {', '.join(found)}: name one of these, or unset it"


def openvino_gpu_expected() -> bool:
    """Return whether OpenVINO has a GPU, or the user has chosen one."""
    return CHOICE in os.environ or not openvino_gpu_problem()


@cache
def gpu_facts(device: str) -> str | None:
    """Return the full name of a device, and its driver if OpenVINO knows that; None without the device."""
    import openvino as ov

    core, facts = ov.Core(), list[str]()
    for name, text in (("FULL_DEVICE_NAME", "{}"), ("GPU_DRIVER_VERSION", "driver {}")):
        try:
            facts.append(text.format(core.get_property(device, name)))
        except RuntimeError:  # no device, or no such property
            continue
    return ", ".join(facts) or None


class OpenVinoDevice:
    """A device of OpenVINO. Its methods raise DeviceError."""

    def __init__(self, work: Work, device: str | None = None, properties: Mapping[str, str] | None = None):
        """work: for the words of errors. device: OpenVINO's name, None for the chosen GPU.

        properties: more of OpenVINO's properties.
        """
        import openvino as ov

        if device is None:
            if problem := openvino_gpu_problem():
                raise DeviceError(problem)
            device = chosen_gpu()
        self.name, self._device, self._core = gpu_facts(device) or device, device, ov.Core()
        self._work = work
        self._properties = {"PERFORMANCE_HINT": "LATENCY", **(properties or {})}

    def read(self, graph: Path | bytes) -> Any:
        """Return the model of an ONNX file."""
        try:
            return self._core.read_model(graph)
        except RuntimeError as error:
            what = graph if isinstance(graph, Path) else "a graph"
            raise failed(f"OpenVINO cannot read {what}", error, self._work, self._work.again) from error

    def request(self, model: Any) -> Any:
        """Compile a model, and return its request for calls, with variables of zeros."""
        try:
            return self._core.compile_model(model, self._device, self._properties).create_infer_request()
        except RuntimeError as error:
            what = f"OpenVINO cannot compile the graph for {self.name}"
            raise failed(what, error, self._work, "update its driver") from error

    def call(self, request: Any, inputs: Mapping[str, Any]) -> None:
        """Run a request with tensors as its inputs."""
        try:
            for name, tensor in inputs.items():
                request.set_tensor(name, tensor)
            request.infer()
        except RuntimeError as error:
            raise run_failed(error, self._work) from error

    def clear(self, request: Any) -> None:
        """Fill a request's variables with zeros."""
        try:
            request.reset_state()
        except RuntimeError as error:
            raise run_failed(error, self._work) from error
