"""Why CUDA cannot be used: each reason is one sentence with a remedy, asked of a driver that answers as told."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import pytest

from dovetail.runtime.devices import cuda as cuda
from dovetail.runtime.drafter.session import DRAFTING
from dovetail.runtime.errors import DeviceError

pytest.importorskip("onnxruntime")


class Driver:
    """libcuda as far as it is asked. version: as cuDriverGetVersion gives it, 13000 for 13.0."""

    def __init__(self, *, code: int = 0, devices: int = 1, version: int = 13000, capability: tuple[int, int] = (8, 6)):
        self.code, self.devices, self.version, self.capability = code, devices, version, capability

    def cuInit(self, _flags: int) -> int:
        return self.code

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.devices
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:
        device._obj.value = number
        return 0

    def cuDeviceGetName(self, name: Any, size: int, _device: Any) -> int:
        name.value = b"GeForce GTX 1050"[: size - 1]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, _device: Any) -> int:
        value._obj.value = self.capability[{75: 0, 76: 1}[attribute]]
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self.version
        return 0


def with_driver(monkeypatch: pytest.MonkeyPatch, driver: Driver | None, lacks: tuple[str, ...] = ()) -> None:
    """Libraries load but those named; without a driver libcuda does not."""

    def load(name: str) -> Any:
        if (name.startswith(("libcuda.", "nvcuda")) and driver is None) or any(name.startswith(part) for part in lacks):
            raise OSError(f"{name}: cannot open shared object file")
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(cuda, "cuda_major", lambda: 13)
    monkeypatch.setattr(cuda, "preload", lambda: None)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [cuda.PROVIDER, "CPUExecutionProvider"])


def test_a_driver_a_device_and_all_libraries_are_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, Driver())
    assert cuda.cuda_problem() is None


@pytest.mark.parametrize(
    ("driver", "lacks", "said"),
    [
        (None, (), r"no NVIDIA driver \(.*\): install it"),
        (Driver(code=100), (), r"shows no device \(code 100\): check nvidia-smi"),
        (Driver(devices=0), (), r"shows no device \(code 0\)"),
        (Driver(version=12080), (), "supports CUDA 12, this onnxruntime-gpu needs 13: update the driver$"),
        (Driver(capability=(6, 1)), (), r"GeForce GTX 1050 has compute capability 6.1.*7.5 to 7.9.*-device cpu$"),
        (Driver(version=12080, capability=(6, 1)), (), r"compute capability 6.1.*: use --drafter-device cpu$"),
        (Driver(), ("libcudnn", "cudnn64"), r"cudnn.*9.* cannot be loaded: .*pip install '\.\[cuda\]'"),
        (Driver(), ("libcudart", "cudart64", "libcublas", "cublas"), "cudart.*13.*, .*cublasLt.*13.* cannot be loaded"),
    ],
    ids=[
        "no driver",
        "no device",
        "no visible device",
        "older major",
        "old device",
        "old device and driver",
        "no cuDNN",
        "no CUDA",
    ],
)
def test_each_lack_is_one_line_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, driver: Driver | None, lacks: tuple[str, ...], said: str
) -> None:
    with_driver(monkeypatch, driver, lacks)
    problem = cuda.cuda_problem()
    assert problem is not None and "\n" not in problem
    assert re.search(said, problem), problem


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((5, 2), False), ((6, 1), False), ((7, 0), False), ((7, 5), True), ((8, 0), True), ((8, 6), True), ((8, 9), True),
     ((9, 0), True), ((10, 0), False), ((12, 0), True), ((12, 1), False)],
)  # fmt: skip
def test_devices_run_that_the_wheel_has_machine_code_for(capability: tuple[int, int], runs: bool) -> None:
    assert cuda.runs_on(capability) == runs


def test_windows_needs_no_curand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "cuda_major", lambda: 13)
    monkeypatch.setattr("os.name", "nt")
    assert cuda.libraries() == ["cudart64_13.dll", "cublasLt64_13.dll", "cublas64_13.dll", "cudnn64_9.dll"]


def test_a_build_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "built without CUDA: install onnxruntime-gpu" in str(cuda.cuda_problem())


class Runtime:
    """The CUDA runtime's functions, remembered; `code` is what every one of them returns after `good` calls."""

    def __init__(self, code: int = 0, good: int = 0):
        self.code, self.good, self.calls = code, good, list[str]()
        self.memory: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        def function(*arguments: Any) -> Any:
            if name == "cudaGetLastError":
                return self.code
            if name == "cudaGetErrorString":
                return b"out of memory" if arguments[0] == 2 else b"unspecified launch failure"
            self.calls.append(name)
            if len(self.calls) > self.good and self.code:
                return self.code
            if name in ("cudaMalloc", "cudaHostAlloc"):
                self.memory.append(ctypes.create_string_buffer(arguments[1]))
                arguments[0]._obj.value = ctypes.addressof(self.memory[-1])
            elif name == "cudaStreamCreateWithFlags":
                arguments[0]._obj.value = 4321
            elif name == "cudaMemGetInfo":
                arguments[0]._obj.value, arguments[1]._obj.value = 5, 8
            elif name == "cudaMemcpyAsync":
                ctypes.memmove(*arguments[:3])
            return 0

        function.restype = None  # type: ignore[attr-defined]  # a function of ctypes has it
        self.__dict__[name] = function
        return function


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    fake = Runtime()
    monkeypatch.setattr(cuda, "preload", lambda: None)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: fake)
    return fake


def test_a_device_copies_in_order_on_its_stream_and_gives_all_back(runtime: Runtime) -> None:
    device = cuda.CudaDevice(DRAFTING)
    options = device.provider_options(1000)
    assert options["user_compute_stream"] == "4321" and options["gpu_mem_limit"] == "1000"
    assert options["enable_cuda_graph"] == "1" and "gpu_mem_limit" not in device.provider_options(None)
    assert device.memory() == (5, 8)
    address, sent, received = device.allocate(16), device.pinned(16), device.pinned(16)
    sent[:] = range(16)
    device.upload(address, sent)
    device.download(received, address)
    device.wait()
    assert received.tolist() == list(range(16))
    assert runtime.calls[-3:] == ["cudaMemcpyAsync", "cudaMemcpyAsync", "cudaStreamSynchronize"]
    device.close()
    device.close()
    assert sorted(runtime.calls[-4:]) == ["cudaFree", "cudaFreeHost", "cudaFreeHost", "cudaStreamDestroy"]


def test_a_full_device_and_a_failed_one_are_told_apart(runtime: Runtime) -> None:
    device = cuda.CudaDevice(DRAFTING)
    runtime.code, runtime.good = 2, 1
    with pytest.raises(DeviceError, match=r"cudaMalloc: out of memory \(code 2\): free VRAM, or give --vram"):
        device.allocate(16)
    runtime.code = 719
    with pytest.raises(DeviceError, match=r"cudaStreamSynchronize: unspecified launch failure .*check nvidia-smi"):
        device.wait()
