"""WebGPU through ONNX Runtime's plugin: find the plugin and an adapter, and move arrays.

The plugin picks the adapter itself, and tells no name. On Linux it runs on Vulkan. There ctypes
asks Vulkan's loader for the adapters: for their names, and because the plugin prints warnings of its
own where there is no adapter.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.devices.ort import failures, run_failed
from dovetail.runtime.devices.work import CPU_ALONE, Work
from dovetail.runtime.errors import DeviceError, install_extra, one_line
from dovetail.runtime.system.arrays import Spec
from dovetail.runtime.system.machine import package_versions

PROVIDER = "WebGpuExecutionProvider"
PACKAGE = "onnxruntime-ep-webgpu"
MODULES = {PACKAGE: "onnxruntime_ep_webgpu", "onnx": "onnx"}  # of the extra; the drafter's graph is rewritten with onnx
SOFTWARE = "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"  # environment variable of the plugin, "1" allows CPU adapters
LOADER = "libvulkan.so.1"
KIND = "webgpu"  # ONNX Runtime's name for the memory

# Of Vulkan.
_INSTANCE_INFO = 1  # VkStructureType
_INTEGRATED, _DISCRETE, _CPU = 1, 2, 4  # VkPhysicalDeviceType
_PREFERRED = (_DISCRETE, _INTEGRATED)  # by the plugin, which asks for the adapter with the most performance
_PROPERTIES, _TYPE_AT, _NAME_AT, _NAME_SIZE = 1024, 16, 20, 256  # bytes of VkPhysicalDeviceProperties, rounded up
_MOST = 64  # adapters


class Adapter(NamedTuple):
    """A GPU that WebGPU can use, or a program that computes like one on the CPU."""

    name: str
    software: bool

    def __str__(self) -> str:
        return f"{self.name} (software)" if self.software else self.name


def webgpu_problem(*, software: bool, off: str = CPU_ALONE) -> str | None:
    """Return why WebGPU cannot be used, with the remedy, or None if the plugin has an adapter.

    software: whether an adapter may compute on the CPU if SOFTWARE allows that too. off: the remedy without WebGPU.
    """
    if problem := packages_problem():
        return problem
    if sys.platform == "linux" and (problem := _vulkan_problem(software, off)):
        return problem
    refused: tuple[type[Exception], ...] = (ImportError, *failures())
    try:
        register()
    except refused as error:
        return f"packages for WebGPU do not load ({one_line(error):.300}): {install_extra('webgpu')}"
    return None if ep_devices() else f"ONNX Runtime finds no GPU in this system: {off}"


def plugin_version() -> str | None:
    """Return the version of the installed plugin, None without it."""
    return package_versions(PACKAGE).get(PACKAGE)


def adapter_name() -> str | None:
    """Return the name of the adapter that the plugin takes, None if there is none."""
    found = adapters()
    return found[0].name if found else None


def webgpu_expected() -> bool:
    """Return whether the packages are installed and a GPU is there, so that WebGPU should work."""
    return not packages_problem() and any(not adapter.software for adapter in adapters() or ())


def packages_problem() -> str | None:
    """Return which packages are not installed, with the remedy, or None."""
    missing = [package for package, module in MODULES.items() if find_spec(module) is None]
    return (
        f"packages for WebGPU are not installed ({', '.join(missing)}): {install_extra('webgpu')}" if missing else None
    )


def _vulkan_problem(software: bool, off: str) -> str | None:
    found = adapters()
    if found is None:
        return f"there is no Vulkan loader ({LOADER} not found): install libvulkan1 and the GPU's Vulkan driver"
    if not found:
        return "Vulkan shows no adapter: install the GPU's Vulkan driver, such as mesa-vulkan-drivers"
    if found[0].software and not (software and os.environ.get(SOFTWARE) == "1"):
        return (
            f"{found[0].name} is no GPU, but computes on the CPU: {off}; for a test, set "
            f"{SOFTWARE}=1 and give --drafter-device webgpu"
        )
    return None


@cache
def register() -> None:
    """Import the packages, and load the plugin into ONNX Runtime. Raises ImportError, or one of `failures`.

    A second registration fails, and takes the library away from the first.
    """
    import onnxruntime as ort
    import onnxruntime_ep_webgpu as plugin

    import_module("onnx")  # find out here whether it loads
    ort.set_default_logger_severity(4)  # it warns of SOFTWARE
    try:
        ort.register_execution_provider_library(KIND, plugin.get_library_path())
    finally:
        ort.set_default_logger_severity(2)


def ep_devices() -> list[Any]:
    """Return the plugin's devices, GPUs first; none before `register`."""
    import onnxruntime as ort

    found = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    return sorted(found, key=lambda device: device.device.type != ort.OrtHardwareDeviceType.GPU)


@cache
def adapters() -> tuple[Adapter, ...] | None:
    """Return the adapters, the one first that the plugin takes. None without Vulkan's loader.

    Outside Linux, where the plugin does not use Vulkan, they are what ONNX Runtime finds.
    """
    if sys.platform != "linux":
        found = (device.device for device in ep_devices())
        return tuple(Adapter(f"{gpu.vendor} {gpu.device_id:#06x}", False) for gpu in found)
    try:
        vulkan = ctypes.CDLL(LOADER)
    except OSError:
        return None
    return _vulkan_adapters(vulkan)


def _vulkan_adapters(vulkan: Any) -> tuple[Adapter, ...]:
    class InstanceInfo(ctypes.Structure):
        _fields_ = (
            ("kind", ctypes.c_int), ("next", ctypes.c_void_p),
            ("flags", ctypes.c_uint32), ("application", ctypes.c_void_p),
            ("layer_count", ctypes.c_uint32), ("layers", ctypes.c_void_p),
            ("extension_count", ctypes.c_uint32), ("extensions", ctypes.c_void_p),
        )  # fmt: skip

    instance, info = ctypes.c_void_p(), InstanceInfo(_INSTANCE_INFO)
    if vulkan.vkCreateInstance(ctypes.byref(info), None, ctypes.byref(instance)):
        return ()  # no driver
    count, handles = ctypes.c_uint32(_MOST), (ctypes.c_void_p * _MOST)()
    found = list[tuple[int, str]]()
    if vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), handles) >= 0:
        for handle in handles[: count.value]:
            facts = ctypes.create_string_buffer(_PROPERTIES)
            vulkan.vkGetPhysicalDeviceProperties(ctypes.c_void_p(handle), facts)
            name = facts.raw[_NAME_AT : _NAME_AT + _NAME_SIZE].split(b"\0")[0].decode(errors="replace")
            found.append((int.from_bytes(facts.raw[_TYPE_AT:_NAME_AT], sys.byteorder), name))
    vulkan.vkDestroyInstance(instance, None)
    ranks = {kind: rank for rank, kind in enumerate(_PREFERRED)}
    found.sort(key=lambda each: (each[0] == _CPU, ranks.get(each[0], len(ranks))))
    return tuple(Adapter(name, kind == _CPU) for kind, name in found)


class WebGpuDevice:
    """The adapter that the plugin picks. Its methods raise DeviceError."""

    provider = PROVIDER

    def __init__(self, work: Work, *, software: bool):
        """work: for the words of errors. software: see webgpu_problem."""
        if problem := webgpu_problem(software=software, off=work.off):
            raise DeviceError(problem)
        self.name, self._work = adapter_name() or PROVIDER, work

    def add_to(self, options: Any, *, capture: bool) -> None:
        """Let a session with these options run on the device. capture: whether it captures its calls."""
        options.enable_mem_pattern = False  # a captured call keeps its buffers, and refuses a pattern
        chosen = {"enableInt64": "1", "enableGraphCapture": str(int(capture))}
        options.add_provider_for_devices(ep_devices()[:1], chosen)

    def allocate(self, session: Any, spec: Spec) -> Any:
        """Return an OrtValue of zeros on the device. It must not outlive the session's use."""
        shape, dtype = spec
        try:
            value = session.create_ortvalue_from_shape_and_type(shape, dtype, KIND)
        except failures() as error:
            raise run_failed(error, self._work) from error
        self.upload(value, np.zeros(shape, dtype))
        return value

    def upload(self, to: Any, source: NDArray[Any]) -> None:
        """Queue a copy of an array, which may then change."""
        try:
            to.update_inplace(source)
        except failures() as error:
            raise run_failed(error, self._work) from error

    def download(self, to: Mapping[str, NDArray[Any]], sources: Mapping[str, Any]) -> None:
        """Wait for the queued work, and copy the device's arrays into those of the same names."""
        import onnxruntime as ort

        try:
            ort.copy_tensors([*sources.values()], [ort.OrtValue.ortvalue_from_numpy(to[name]) for name in sources])
        except failures() as error:
            raise run_failed(error, self._work) from error
