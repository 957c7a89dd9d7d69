"""Why WebGPU cannot be used: each reason is one line with a remedy."""

from __future__ import annotations

import ctypes
import re
import struct
import sys
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("onnxruntime")

from dovetail.runtime.devices import webgpu
from dovetail.runtime.devices.webgpu import SOFTWARE, Adapter, webgpu_problem

DISCRETE, INTEGRATED, CPU = 2, 1, 4
ARC, IRIS, LLVMPIPE = (DISCRETE, "Intel Arc A770"), (INTEGRATED, "Intel Iris Xe"), (CPU, "llvmpipe")


class Vulkan:
    """Vulkan's loader as far as it is asked. devices: type and name. code: of vkCreateInstance."""

    def __init__(self, *devices: tuple[int, str], code: int = 0):
        self.devices, self.code, self.instances = devices, code, 0

    def vkCreateInstance(self, _info: Any, _allocator: Any, _instance: Any) -> int:
        self.instances += not self.code
        return self.code

    def vkEnumeratePhysicalDevices(self, _instance: Any, count: Any, handles: Any) -> int:
        count._obj.value = len(self.devices)
        handles[: len(self.devices)] = range(1, len(self.devices) + 1)
        return 0

    def vkGetPhysicalDeviceProperties(self, handle: Any, facts: Any) -> None:
        kind, name = self.devices[handle.value - 1]
        facts.value = b""
        ctypes.memmove(facts, struct.pack("=IIIII256s", 1, 2, 3, 4, kind, name.encode()), 276)

    def vkDestroyInstance(self, _instance: Any, _allocator: Any) -> None:
        self.instances -= 1


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    webgpu.adapters.cache_clear()
    yield
    webgpu.adapters.cache_clear()


def with_loader(monkeypatch: pytest.MonkeyPatch, loader: Vulkan | None, devices: int = 1) -> None:
    """The plugin is installed and finds `devices` GPUs; without a loader libvulkan does not load."""

    def load(name: str) -> Any:
        if loader is None:
            raise OSError(f"{name}: cannot open shared object file")
        return loader

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(webgpu, "find_spec", lambda name: name)
    monkeypatch.setattr(webgpu, "register", lambda: None)
    monkeypatch.setattr(webgpu, "ep_devices", lambda: [object()] * devices)
    monkeypatch.setattr("sys.platform", "linux")


def test_a_plugin_and_a_gpu_are_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    with_loader(monkeypatch, loader := Vulkan(ARC))
    assert webgpu_problem(software=False) is None and loader.instances == 0
    assert webgpu.webgpu_expected() and webgpu.adapter_name() == "Intel Arc A770"


@pytest.mark.parametrize("order", [(LLVMPIPE, IRIS, ARC), (ARC, LLVMPIPE, IRIS), (IRIS, ARC, LLVMPIPE)])
def test_the_plugin_s_adapter_comes_first(monkeypatch: pytest.MonkeyPatch, order: tuple[tuple[int, str], ...]) -> None:
    with_loader(monkeypatch, Vulkan(*order))
    assert webgpu.adapters() == (Adapter(ARC[1], False), Adapter(IRIS[1], False), Adapter(LLVMPIPE[1], True))


@pytest.mark.parametrize(
    ("loader", "devices", "said"),
    [
        (None, 1, r"no Vulkan loader \(libvulkan.so.1 not found\): install libvulkan1"),
        (Vulkan(code=-9), 1, "Vulkan shows no adapter: install the GPU's Vulkan driver"),
        (Vulkan(), 1, "Vulkan shows no adapter"),
        (Vulkan(LLVMPIPE), 1, f"llvmpipe is no GPU.*: use --drafter-device cpu; for a test, set {SOFTWARE}=1"),
        (Vulkan(ARC), 0, "ONNX Runtime finds no GPU in this system: use --drafter-device cpu"),
    ],
    ids=["no loader", "no driver", "no adapter", "software", "not found"],
)
def test_each_reason_has_a_remedy(monkeypatch: pytest.MonkeyPatch, loader: Any, devices: int, said: str) -> None:
    monkeypatch.delenv(SOFTWARE, raising=False)
    with_loader(monkeypatch, loader, devices)
    problem = webgpu_problem(software=True)
    assert problem and "\n" not in problem
    assert re.search(said, problem)


def test_a_software_adapter_needs_the_variable_and_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    with_loader(monkeypatch, Vulkan(LLVMPIPE))
    for value, software, allowed in (("1", True, True), ("1", False, False), ("0", True, False)):
        monkeypatch.setenv(SOFTWARE, value)
        assert (webgpu_problem(software=software) is None) is allowed
    assert not webgpu.webgpu_expected()


@pytest.mark.parametrize("missing", [["onnxruntime-ep-webgpu"], ["onnx"], ["onnxruntime-ep-webgpu", "onnx"]])
def test_packages_that_are_not_installed_are_named_with_their_extra(
    monkeypatch: pytest.MonkeyPatch, missing: list[str]
) -> None:
    with_loader(monkeypatch, Vulkan(ARC))
    modules = {package.replace("-", "_") for package in missing}
    monkeypatch.setattr(webgpu, "find_spec", lambda name: None if name in modules else name)
    assert webgpu_problem(software=False) == (
        f"packages for WebGPU are not installed ({', '.join(missing)}): "
        "run pip install '.[webgpu]' in a clone of Dovetail"
    )
    assert not webgpu.webgpu_expected()


def test_an_onnx_that_cannot_be_imported_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime_ep_webgpu")
    register = webgpu.register.__wrapped__
    with_loader(monkeypatch, Vulkan(ARC))
    monkeypatch.setattr(webgpu, "register", register)
    monkeypatch.setitem(sys.modules, "onnx", None)
    problem = webgpu_problem(software=False)
    assert problem and problem.startswith("packages for WebGPU do not load (import of onnx halted")


def test_a_plugin_that_does_not_load_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("ORT runtime version 1.2\nis below the minimum required version")

    with_loader(monkeypatch, Vulkan(ARC))
    monkeypatch.setattr(webgpu, "register", refuse)
    problem = webgpu_problem(software=False)
    assert problem and "packages for WebGPU do not load (ORT runtime version 1.2 is below" in problem
