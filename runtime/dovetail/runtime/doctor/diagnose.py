"""Report what a machine offers for a pair, and what is missing."""

from __future__ import annotations

import base64
import platform
import shutil
import subprocess
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from dovetail.runtime.devices.cuda import (
    INSTALL,
    CudaDevice,
    cuda_build,
    cuda_problem,
    driver_cuda,
    libraries,
    missing_libraries,
)
from dovetail.runtime.devices.memory import Block, Device, keep_on_failed
from dovetail.runtime.devices.openvino import OpenVinoDevice, chosen_gpu, gpu_facts, openvino_gpus
from dovetail.runtime.devices.ort import call, failures, open_session, session_options
from dovetail.runtime.devices.webgpu import WebGpuDevice, adapters, plugin_version
from dovetail.runtime.doctor import estimate
from dovetail.runtime.doctor.gpus import GpuModel
from dovetail.runtime.doctor.predict import Prediction, predict
from dovetail.runtime.drafter.session import DRAFTING
from dovetail.runtime.errors import DeviceError, one_line
from dovetail.runtime.system import machine

# An ONNX model of one Identity node, from x to y. It shows whether a provider really runs.
PROBE_MODEL = base64.b64decode(
    "CAg6NwoQCgF4EgF5IghJZGVudGl0eRIBZ1oPCgF4EgoKCAgBEgQKAggBYg8KAXkSCgoICAESBAoCCAFCBAoAEBE="
)


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU as its driver reports it."""

    name: str
    memory: str
    driver: str


@dataclass(frozen=True)
class Cuda:
    """Facts about CUDA on this machine. None means not known, or not tried."""

    built_for: str | None = None  # CUDA version of ONNX Runtime's build, None without CUDA
    driver: str | None = None  # newest CUDA version that the driver supports
    found: tuple[str, ...] = ()  # libraries that the build needs
    missing: tuple[str, ...] = ()
    free_mb: int | None = None  # of VRAM
    total_mb: int | None = None
    capture: bool | None = None  # whether a captured graph replays


@dataclass(frozen=True)
class WebGpu:
    """Facts about WebGPU on this machine."""

    plugin: str | None = None  # version of ONNX Runtime's plugin, None if it is not installed
    adapters: tuple[str, ...] = ()  # the one first that the plugin takes
    problem: str | None = None  # why the drafter cannot use it, with the remedy


@dataclass(frozen=True)
class OpenVinoGpu:
    """Facts about OpenVINO's GPU on this machine."""

    name: str | None = None  # of the chosen GPU, and its driver
    gpus: dict[str, str] = field(default_factory=dict)  # all, by OpenVINO's names
    problem: str | None = None  # why the drafter cannot use it, with the remedy


@dataclass(frozen=True)
class Diagnosis:
    """The whole report of `doctor`."""

    cpu: machine.Cpu
    ram_total_mb: int
    ram_available_mb: int
    memory_bandwidth: float  # GB/s
    os: str
    versions: dict[str, str]
    openvino_devices: tuple[str, ...]
    onnxruntime_providers: tuple[str, ...]
    gpus: tuple[Gpu, ...]
    cuda: Cuda
    cuda_problem: str | None
    webgpu: WebGpu
    openvino_gpu: OpenVinoGpu
    drafter_device: str
    pair: estimate.PairEstimate | None
    prediction: Prediction | None  # of the pair on another GPU; needs ONNX Runtime
    problems: tuple[str, ...]  # facts that stop every run
    notes: tuple[str, ...]  # other facts and their cost


def diagnose(named: str | None, vram: int | None, other_gpu: GpuModel | None = None) -> Diagnosis:
    """Examine the CPU, both engines, the GPUs and the named pair. Each way to a GPU loads a one-node model.

    vram: bytes that the pair's drafter may take, if given. other_gpu: predict the pair's drafter on
    it. Raises InputError, PairError.
    """
    found = None if named is None else estimate.find_pair(named)
    cpu, (total, available), bandwidth = machine.cpu(), machine.ram_mb(), machine.memory_bandwidth()
    devices, openvino_problem = openvino_devices()
    providers, onnxruntime_problem = onnxruntime_providers()
    cuda, no_cuda = (Cuda(), onnxruntime_problem) if onnxruntime_problem else try_cuda()
    webgpu = WebGpu(problem=onnxruntime_problem) if onnxruntime_problem else try_webgpu()
    openvino_gpu = OpenVinoGpu(problem=openvino_problem) if openvino_problem else try_openvino_gpu()
    ways = (("webgpu", webgpu.problem), ("openvino-gpu", openvino_gpu.problem))
    other = next((gpu for gpu, problem in ways if not problem), None)
    pair = None
    if found:
        room = None if no_cuda else cuda.free_mb
        pair = estimate.estimate_pair(
            *found, available_mb=available, bandwidth=bandwidth, free_vram_mb=room, vram=vram, other_gpu=other
        )
    prediction = predict(*found, other_gpu, vram) if found and other_gpu and not onnxruntime_problem else None
    alone = found is not None and found[1].drafter is None  # nothing of such a pair runs on a GPU
    no_gpu = no_cuda if not other and not alone else None
    return Diagnosis(
        cpu=cpu,
        ram_total_mb=total,
        ram_available_mb=available,
        memory_bandwidth=round(bandwidth, 1),
        os=platform.platform(),
        versions=machine.versions(),
        openvino_devices=devices,
        onnxruntime_providers=providers,
        gpus=nvidia_gpus(),
        cuda=cuda,
        cuda_problem=no_cuda,
        webgpu=webgpu,
        openvino_gpu=openvino_gpu,
        drafter_device=(other or "cpu") if no_cuda else "cuda",
        pair=pair,
        prediction=prediction,
        problems=tuple(filter(None, (openvino_problem, onnxruntime_problem, pair.problem if pair else None))),
        notes=(
            *notes(cpu, available, no_gpu),
            *(pair.notes if pair else ()),
        ),
    )


def openvino_devices() -> tuple[tuple[str, ...], str]:
    """Return OpenVINO's devices and the problem in one line ("" without a problem)."""
    try:
        import openvino
    except ImportError as err:
        return (), f"OpenVINO cannot be imported ({err}): pip install --force-reinstall openvino"
    devices = tuple(str(name) for name in openvino.Core().available_devices)
    return devices, "" if "CPU" in devices else "OpenVINO has no CPU device: reinstall it with pip"


def onnxruntime_providers() -> tuple[tuple[str, ...], str]:
    """Return ONNX Runtime's providers and the problem in one line ("" without a problem)."""
    try:
        import onnxruntime
    except ImportError as err:
        return (), f"ONNX Runtime cannot be imported ({err}): pip install --force-reinstall onnxruntime-gpu"
    providers = tuple(str(name) for name in onnxruntime.get_available_providers())
    lacking = "" if "CPUExecutionProvider" in providers else "ONNX Runtime has no CPU provider: reinstall it with pip"
    return providers, lacking


def nvidia_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that nvidia-smi lists; none without nvidia-smi or a driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return tuple(Gpu(*row) for row in rows if len(row) == 3 and done.returncode == 0)


def try_cuda() -> tuple[Cuda, str | None]:
    """Return facts about CUDA, and why the drafter cannot use CUDA with a remedy, or None."""
    problem = cuda_problem()
    built_for = cuda_build()
    missing = missing_libraries() if built_for else []
    found = [name for name in libraries() if name not in missing] if built_for else []
    free = total = captures = None
    if problem is None:
        try:
            with closing(CudaDevice(DRAFTING)) as device:
                free, total = (size >> 20 for size in device.memory())
                problem = capture_problem(device)
                captures = problem is None
        except DeviceError as error:
            problem = str(error)
    newest = driver_cuda()
    driver = f"{newest[0]}.{newest[1]}" if newest else None
    return Cuda(built_for, driver, tuple(found), tuple(missing), free, total, captures), problem


def try_webgpu() -> WebGpu:
    """Return facts about WebGPU. Software adapters count as a problem, as for `auto`."""
    version = plugin_version()
    names = tuple(map(str, adapters() or ())) if version else ()
    try:
        problem = probe_problem(WebGpuDevice(DRAFTING, software=False))
    except DeviceError as error:
        problem = str(error)
    return WebGpu(version, names, problem)


def try_openvino_gpu() -> OpenVinoGpu:
    """Return facts about OpenVINO's GPU."""
    try:
        problem = openvino_probe_problem(OpenVinoDevice(DRAFTING))
    except DeviceError as error:
        problem = str(error)
    return OpenVinoGpu(gpu_facts(chosen_gpu()), openvino_gpus(), problem)


def openvino_probe_problem(device: OpenVinoDevice) -> str | None:
    """Return why a device of OpenVINO does not run a graph of one node, or None if it does."""
    from openvino import Tensor

    try:
        request = device.request(device.read(PROBE_MODEL))
        device.call(request, {"x": Tensor(np.ones(1, np.float32))})
    except DeviceError as error:
        return str(error)
    got = float(request.get_tensor("y").data[0])
    return None if got == 1 else f"{device.name} gave {got} for 1.0: update the GPU's driver"


def probe_problem(device: WebGpuDevice) -> str | None:
    """Return why a device does not run a graph of one node, or None if it does."""
    import onnxruntime as ort

    options = session_options(ort)
    device.add_to(options, capture=False)
    try:
        session = open_session(ort, PROBE_MODEL, options, [], DRAFTING, "update the GPU's driver")
        x, y = (device.allocate(session, ((1,), np.float32)) for _ in range(2))
        binding, got = session.io_binding(), np.zeros(1, np.float32)
        binding.bind_ortvalue_input("x", x)
        binding.bind_ortvalue_output("y", y)
        device.upload(x, np.ones(1, np.float32))
        call(session, binding, DRAFTING)
        device.download({"y": got}, {"y": y})
    except DeviceError as error:
        return str(error)
    return None if got == 1 else f"{device.name} gave {got[0]} for 1.0: update the GPU's driver"


def capture_problem(device: Device) -> str | None:
    """Return why a captured graph does not replay with newly uploaded data, or None if it does."""
    import onnxruntime as ort

    expected: tuple[type[Exception], ...] = (DeviceError, *failures())
    session = binding = None
    try:
        provider = (device.provider, device.provider_options(None))
        session = open_session(ort, PROBE_MODEL, session_options(ort), [provider], DRAFTING)
        if device.provider not in session.get_providers():
            return f"ONNX Runtime could not load its {device.provider}: {INSTALL}"
        block = Block.allocate(device, {name: ((1,), np.float32) for name in ("x", "y")})
        binding, run_options = session.io_binding(), ort.RunOptions()
        block.bind(binding.bind_input, "x", device.kind)
        block.bind(binding.bind_output, "y", device.kind)
        run_options.add_run_config_entry("gpu_graph_id", "1")
        for value in (1.0, 1.0, 2.0):  # memory patterns, capture, replay
            block.array("x")[:] = value
            device.upload(block.address, block.host)
            session.run_with_iobinding(binding, run_options)
            device.download(block.host, block.address)
            device.wait()
    except expected as error:
        keep_on_failed(device, session, binding)
        return f"a CUDA graph cannot be captured ({one_line(error):.300}): update the NVIDIA driver"
    got = float(block.array("y")[0])
    return None if got == value else f"a replayed CUDA graph gave {got} for {value}: update the NVIDIA driver"


def notes(cpu: machine.Cpu, available_mb: int, no_gpu: str | None) -> list[str]:
    """Return the machine's shortcomings, each with its cost in one sentence."""
    said = []
    if cpu.instruction_sets and not machine.INT8_SETS & set(cpu.instruction_sets):
        said.append(
            "The CPU has no INT8 dot-product instructions. A node of a tree costs nearly as much as a plain step."
        )
    room = min(cpu.usable, cpu.quota or cpu.usable)
    if room < cpu.threads:
        said.append(f"This process may use {room:g} of {cpu.threads} hardware threads, so passes take longer.")
    if available_mb < 2048:
        said.append(f"Only {available_mb} MiB of memory are free. A target that does not fit is slow or is killed.")
    if no_gpu:
        said.append(
            "No GPU can be used. Drafter and target take turns on the CPU, with a smaller speedup. "
            f"The reason: {no_gpu}."
        )
    return said
