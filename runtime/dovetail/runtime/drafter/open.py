"""Open the drafter of a pair on a device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from dovetail.runtime.devices.cuda import CudaDevice, cuda_problem
from dovetail.runtime.devices.gpus import GPUS, gpu_expected
from dovetail.runtime.devices.memory import Device
from dovetail.runtime.devices.openvino import OpenVinoDevice
from dovetail.runtime.devices.webgpu import WebGpuDevice, packages_problem
from dovetail.runtime.drafter.block import BlockDrafter
from dovetail.runtime.drafter.onnx import OnnxDrafter, TokenDrafter
from dovetail.runtime.drafter.runners.cpu import CpuRunner
from dovetail.runtime.drafter.runners.cuda import CudaRunner
from dovetail.runtime.drafter.runners.openvino import OpenVinoRunner
from dovetail.runtime.drafter.runners.webgpu import WebGpuRunner
from dovetail.runtime.drafter.runners.webgpu_graph import rewrite
from dovetail.runtime.drafter.session import DRAFTING, KEPT, check_device
from dovetail.runtime.drafter.vram import (
    CUDA_ITSELF,
    WEBGPU_ITSELF,
    VramPlan,
    check_limit,
    plan_openvino,
    plan_pair,
    plan_webgpu,
)
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.pair.manifest import DrafterFacts, Manifest
from dovetail.runtime.system.machine import usable_cores

log = logging.getLogger(__name__)


def open_drafter(
    pair: Path,
    manifest: Manifest,
    *,
    device: str = "auto",
    threads: int | None = None,
    vram: int | None = None,
    fit: bool = False,
    texts: int = 1,
) -> OnnxDrafter:
    """Load a pair's drafter; see Engine.from_pretrained. threads: default one per usable core.

    "auto" takes the first of GPUS that works. A log warning says why none does, if there is a GPU,
    or if `vram` is given.
    Raises PairError (no drafter), InputError, DeviceError.
    """
    facts = manifest.needed_drafter
    check_device(device)
    check_limit(vram, fit, device)
    if device == "cpu":
        return open_cpu(pair, facts, "asked for", threads=threads, texts=texts)
    problems, counted = list[str](), vram is not None  # whether somebody counts on a GPU
    for gpu in GPUS if device == "auto" else (device,):
        try:
            return _open_gpu(gpu, pair, manifest, vram=vram, fit=fit, texts=texts, asked=device == gpu)
        except DeviceError as error:
            if device == gpu:
                raise DeviceError(f"the drafter cannot run on {GPUS[gpu]}: {error}") from error
            problems.append(f"no {GPUS[gpu]}: {error}")
            counted = counted or gpu_expected(gpu)
    note = "; ".join(problems)
    if counted:
        log.warning("the drafter runs on the CPU: %s", note)
    return open_cpu(pair, facts, note, threads=threads, texts=texts)


def _open_gpu(
    gpu: str, pair: Path, manifest: Manifest, *, vram: int | None, fit: bool, texts: int, asked: bool
) -> OnnxDrafter:
    """Return the drafter on one of GPUS. asked: whether the user named this GPU. Raises DeviceError."""
    if gpu == "cuda":
        return open_cuda(pair, manifest, vram=vram, fit=fit, texts=texts)
    if gpu == "webgpu":
        return open_webgpu(pair, manifest, vram=vram, fit=fit, texts=texts, software=asked)
    return open_openvino(pair, manifest, vram=vram, fit=fit, texts=texts)


def open_cpu(pair: Path, facts: DrafterFacts, note: str, *, threads: int | None, texts: int = 1) -> OnnxDrafter:
    """Return the INT8 drafter. note: why the drafter runs on the CPU. Raises DeviceError.

    Every call attends to the pairs of all texts. Several texts therefore get few pairs each.
    """
    pairs = None if texts == 1 else texts * min(2 * KEPT, facts.max_context)
    runner = CpuRunner(Path(pair) / facts.files["cpu"], facts, threads or usable_cores(), pairs)
    return _session(facts)(facts, runner, device="CPU (int8)", note=note, texts=texts)


def open_cuda(
    pair: Path,
    manifest: Manifest,
    *,
    vram: int | None = None,
    fit: bool = False,
    texts: int = 1,
    new_device: Callable[[], Device] | None = None,
) -> OnnxDrafter:
    """Return the float16 drafter. new_device: in place of CUDA's. Raises DeviceError."""
    facts = manifest.needed_drafter
    if new_device is None and (problem := cuda_problem()):
        raise DeviceError(problem)
    plan, limit = plan_pair(manifest, vram, fit=fit), facts.vram if vram is None else vram
    device = new_device() if new_device else CudaDevice(DRAFTING)
    runner = CudaRunner(Path(pair) / facts.files["cuda"], facts, plan, device, limit=limit)
    drafter = _session(facts)(facts, runner, device="CUDA (fp16)", note="a CUDA device was found", texts=texts)
    if runner.refused:
        drafter.caveat = f"kernels are launched one by one, because no call is captured: {runner.refused}"
        log.warning("the drafter on CUDA is slower than it should be: %s", drafter.caveat)
    return drafter


def open_webgpu(
    pair: Path,
    manifest: Manifest,
    *,
    vram: int | None = None,
    fit: bool = False,
    texts: int = 1,
    software: bool = False,
    new_device: Callable[[], WebGpuDevice] | None = None,
) -> OnnxDrafter:
    """Return the INT8 drafter on WebGPU. new_device: in place of the plugin's. Raises DeviceError.

    software: see webgpu_problem.
    """
    facts = manifest.needed_drafter
    device = new_device() if new_device else WebGpuDevice(DRAFTING, software=software)
    file = Path(pair) / facts.files["cpu"]
    graph = rewrite(file)
    plan = plan_webgpu(manifest, graph.on_host, vram, fit=fit)
    runner = WebGpuRunner(file, graph, facts, plan, device)
    return _session(facts)(facts, runner, device="WebGPU (int8)", note=f"{device.name} was found", texts=texts)


def open_openvino(
    pair: Path,
    manifest: Manifest,
    *,
    vram: int | None = None,
    fit: bool = False,
    texts: int = 1,
    new_device: Callable[[], OpenVinoDevice] | None = None,
) -> OnnxDrafter:
    """Return the INT8 drafter on OpenVINO's GPU. new_device: in place of the GPU. Raises DeviceError."""
    facts = manifest.needed_drafter
    device = new_device() if new_device else OpenVinoDevice(DRAFTING)
    plan = plan_openvino(manifest, vram, fit=fit)
    runner = OpenVinoRunner(Path(pair) / facts.files["cpu"], facts, plan, device)
    return _session(facts)(facts, runner, device="OpenVINO GPU (int8)", note=f"{device.name} was found", texts=texts)


def plan_gpu(gpu: str, pair: Path, manifest: Manifest, vram: int | None = None, *, fit: bool = False) -> VramPlan:
    """Return the plan of a drafter on one of GPUS, without a GPU; see plan_pair. Raises PairError, DeviceError."""
    facts = manifest.needed_drafter
    if gpu == "cuda":
        return plan_pair(manifest, vram, fit=fit)
    if gpu == "openvino-gpu":
        return plan_openvino(manifest, vram, fit=fit)
    if problem := packages_problem():
        raise DeviceError(problem)
    return plan_webgpu(manifest, rewrite(pair / facts.files["cpu"]).on_host, vram, fit=fit)


def drafter_bytes(gpu: str, pair: Path, manifest: Manifest, vram: int, *, fit: bool) -> int:
    """Return what a drafter takes of `vram` bytes on one of GPUS, or the GPU itself if the pair has no drafter.

    Raises DeviceError: see plan_gpu.
    """
    if manifest.drafter is None:
        return CUDA_ITSELF if gpu == "cuda" else WEBGPU_ITSELF
    return plan_gpu(gpu, pair, manifest, vram, fit=fit).total


def _session(facts: DrafterFacts) -> type[OnnxDrafter]:
    """Return the class of the session for a drafter's graphs."""
    if facts.reads_tokens:
        return TokenDrafter
    return BlockDrafter if facts.positions else OnnxDrafter
