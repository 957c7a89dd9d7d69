"""CUDA without torch: diagnose CUDA, and provide the few calls around a captured graph.

ctypes calls the CUDA runtime that onnxruntime-gpu was built for. ONNX Runtime's Python API has no
pinned memory and no copy without a wait.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from typing import Any

import numpy as np

from dovetail.runtime.devices.work import CPU_ALONE, Work
from dovetail.runtime.errors import DeviceError, install_extra
from dovetail.runtime.system.arrays import Bytes

PROVIDER = "CUDAExecutionProvider"
INSTALL = f"for CUDA and cuDNN, {install_extra('cuda')}"
DRIVER = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
CUDNN_MAJOR, CURAND_MAJOR = 9, 10  # for all supported onnxruntime-gpu versions
# Compute capabilities that onnxruntime-gpu for CUDA 13 has machine code for, as (major, least minor, most
# minor). Its wheels hold no PTX, from which a driver could compile code for other devices.
CAPABILITIES = ((7, 5, 9), (8, 0, 9), (9, 0, 0), (12, 0, 0))

_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2
_NON_BLOCKING = 1  # flag: the stream does not wait for the default stream
_OUT_OF_MEMORY = 2
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # attributes of a device

_POINTER, _SIZE, _OUT = ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)
_ARGUMENTS: dict[str, list[Any]] = {
    "cudaStreamCreateWithFlags": [_OUT, ctypes.c_uint],
    "cudaStreamSynchronize": [_POINTER],
    "cudaStreamDestroy": [_POINTER],
    "cudaMalloc": [_OUT, _SIZE],
    "cudaFree": [_POINTER],
    "cudaHostAlloc": [_OUT, _SIZE, ctypes.c_uint],
    "cudaFreeHost": [_POINTER],
    "cudaMemsetAsync": [_POINTER, ctypes.c_int, _SIZE, _POINTER],
    "cudaMemcpyAsync": [_POINTER, _POINTER, _SIZE, ctypes.c_int, _POINTER],
    "cudaMemGetInfo": [ctypes.POINTER(_SIZE), ctypes.POINTER(_SIZE)],
    "cudaGetErrorString": [ctypes.c_int],
    "cudaGetLastError": [],
}


def cuda_problem(off: str = CPU_ALONE) -> str | None:
    """Return why CUDA cannot be used, with the remedy, or None if a device and all libraries work.

    off: the remedy without CUDA. ONNX Runtime itself reports missing libraries only in its log.
    """
    import onnxruntime as ort

    if PROVIDER not in ort.get_available_providers():
        return "this onnxruntime is built without CUDA: install onnxruntime-gpu in its place"
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return f"no NVIDIA driver ({DRIVER} not found): install it, or {off}"
    count = ctypes.c_int(0)
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code or not count.value:
        return f"the NVIDIA driver shows no device (code {code}): check nvidia-smi and CUDA_VISIBLE_DEVICES"
    name, capability = _first_device(driver)
    wanted, newest = cuda_major(), driver_cuda()
    # Before the driver's version: the newest drivers leave out such devices.
    if name and wanted == 13 and not runs_on(capability):
        return (
            f"{name} has compute capability {capability[0]}.{capability[1]}, for which this onnxruntime-gpu has no "
            f"code (it has for {_supported()}): {off}"
        )
    if newest is not None and newest[0] < wanted:
        return f"the NVIDIA driver supports CUDA {newest[0]}, this onnxruntime-gpu needs {wanted}: update the driver"
    missing = missing_libraries()
    return f"{', '.join(missing)} cannot be loaded: {INSTALL}" if missing else None


def runs_on(capability: tuple[int, int]) -> bool:
    """Return whether onnxruntime-gpu has machine code for a device of this compute capability (major, minor)."""
    return any(major == capability[0] and least <= capability[1] <= most for major, least, most in CAPABILITIES)


def gpu_name() -> str | None:
    """Return the name and the compute capability of the first device, or None without a driver and a device."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return None
    if driver.cuInit(0):
        return None
    name, (major, minor) = _first_device(driver)
    return f"{name} {major}.{minor}" if name else None


def _first_device(driver: Any) -> tuple[str, tuple[int, int]]:
    """Return the name and the compute capability of device 0; "" and (0, 0) if the driver does not tell."""
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(128)
    numbers = ctypes.c_int(0), ctypes.c_int(0)
    if driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceGetName(name, len(name), device):
        return "", (0, 0)
    for number, attribute in zip(numbers, (_CAPABILITY_MAJOR, _CAPABILITY_MINOR), strict=True):
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return "", (0, 0)
    major, minor = (number.value for number in numbers)
    return name.value.decode(errors="replace"), (major, minor)


def _supported() -> str:
    return ", ".join(f"{major}.{least}" + f" to {major}.{most}" * (least < most) for major, least, most in CAPABILITIES)


def driver_cuda() -> tuple[int, int] | None:
    """Return the newest CUDA version (major, minor) of the NVIDIA driver; None without a driver."""
    version = ctypes.c_int(0)
    try:
        code = ctypes.CDLL(DRIVER).cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return None if code else (version.value // 1000, version.value % 1000 // 10)


def cuda_build() -> str | None:
    """Return the CUDA version that this ONNX Runtime was built for, if any."""
    from onnxruntime.capi import build_and_package_info as build

    return getattr(build, "cuda_version", None) or None


def cuda_major() -> int:
    """Return the major CUDA version of the build; 0 for a build without CUDA."""
    return int((cuda_build() or "0").split(".")[0])


def libraries() -> list[str]:
    """Return the file names of the CUDA provider's libraries, dependencies first."""
    major = cuda_major()
    if os.name == "nt":
        named = [f"{name}64_{major}.dll" for name in ("cudart", "cublasLt", "cublas")]
        return [*named, f"cudnn64_{CUDNN_MAJOR}.dll"]  # the provider there does without curand
    named = [f"lib{name}.so.{major}" for name in ("cudart", "cublasLt", "cublas")]
    return [*named, f"libcurand.so.{CURAND_MAJOR}", f"libcudnn.so.{CUDNN_MAJOR}"]


def missing_libraries() -> list[str]:
    """Return the `libraries` that load neither from their wheels nor from the system."""
    preload()
    return [name for name in libraries() if not _loads(name)]


@cache
def preload() -> None:
    """Load CUDA and cuDNN from their wheels if these are installed."""
    import onnxruntime as ort

    with redirect_stdout(StringIO()):  # preload_dlls prints what it does not find
        ort.preload_dlls()


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


class CudaDevice:
    """Device 0; implements Device of memory.py. Pinned memory is valid until `close`."""

    kind = "cuda"  # ONNX Runtime's name for the memory
    provider = PROVIDER

    def __init__(self, work: Work) -> None:
        """work: for the words of errors."""
        self._work = work
        preload()
        try:
            self._cuda = ctypes.CDLL(libraries()[0])
        except OSError as error:
            raise DeviceError(f"{libraries()[0]} cannot be loaded: {INSTALL}") from error
        for name, arguments in _ARGUMENTS.items():
            getattr(self._cuda, name).argtypes = arguments
        self._cuda.cudaGetErrorString.restype = ctypes.c_char_p
        self._device: list[int] = []
        self._host: list[int] = []
        stream = ctypes.c_void_p()
        self._check("cudaStreamCreateWithFlags", ctypes.byref(stream), _NON_BLOCKING)
        self._stream = stream

    def provider_options(self, arena: int | None, *, capture: bool = True) -> dict[str, str]:
        options = {
            "enable_cuda_graph": "1" if capture else "0",
            "user_compute_stream": str(self._stream.value),
            "arena_extend_strategy": "kSameAsRequested",
        }
        return options if arena is None else {**options, "gpu_mem_limit": str(arena)}

    def memory(self) -> tuple[int, int]:
        """Return free bytes and total bytes."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._check("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, size: int) -> int:
        pointer = ctypes.c_void_p()
        self._check("cudaMalloc", ctypes.byref(pointer), size)
        assert pointer.value is not None
        self._device.append(pointer.value)
        self.clear(pointer.value, size)
        return pointer.value

    def clear(self, address: int, size: int) -> None:
        self._check("cudaMemsetAsync", address, 0, size, self._stream)

    def pinned(self, size: int) -> Bytes:
        pointer = ctypes.c_void_p()
        self._check("cudaHostAlloc", ctypes.byref(pointer), size, 0)
        assert pointer.value is not None
        self._host.append(pointer.value)
        memory: Bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer.value))
        memory[:] = 0
        return memory

    def upload(self, to: int, source: Bytes) -> None:
        self._copy(to, source.ctypes.data, source.nbytes, _HOST_TO_DEVICE)

    def download(self, to: Bytes, source: int) -> None:
        self._copy(to.ctypes.data, source, to.nbytes, _DEVICE_TO_HOST)

    def wait(self) -> None:
        self._check("cudaStreamSynchronize", self._stream)

    def close(self) -> None:
        """Free memory and stream. A failed device keeps them until the process ends."""
        for pointer in self._device:
            self._cuda.cudaFree(pointer)
        for pointer in self._host:
            self._cuda.cudaFreeHost(pointer)
        self._device, self._host = [], []
        if self._stream.value:
            self._cuda.cudaStreamDestroy(self._stream)
            self._stream = ctypes.c_void_p()

    def _copy(self, to: int, source: int, size: int, kind: int) -> None:
        self._check("cudaMemcpyAsync", to, source, size, kind, self._stream)

    def _check(self, function: str, *arguments: Any) -> None:
        code = getattr(self._cuda, function)(*arguments)
        if code == 0:
            return
        self._cuda.cudaGetLastError()  # clears the error: otherwise ONNX Runtime or torch would see it as their own
        said = (self._cuda.cudaGetErrorString(code) or b"unknown error").decode(errors="replace")
        full = "free VRAM" if function == "cudaMalloc" else "free memory"
        remedy = f"{full}, or give --vram SIZE --fit" if code == _OUT_OF_MEMORY else "check nvidia-smi"
        raise DeviceError(f"{function}: {said} (code {code}): {remedy}, or {self._work.off}")
