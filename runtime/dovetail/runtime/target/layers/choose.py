"""How many of the target's first layers run on which device."""

from __future__ import annotations

from dovetail.runtime.devices.cuda import cuda_problem
from dovetail.runtime.devices.gpus import GPUS
from dovetail.runtime.devices.webgpu import webgpu_problem
from dovetail.runtime.errors import DeviceError, InputError
from dovetail.runtime.target.layers.device import WORK, LayerDevice, OrtDevice, WebGpuLayers

AUTO, FLAG = "auto", "--gpu-layers"
MOST = 10_000  # layers


def read_count(given: int | str) -> int | None:
    """Return a number of layers, None for "auto". Raises InputError."""
    if given == AUTO:
        return None
    text = str(given)
    if isinstance(given, bool) or not (text.isascii() and text.isdigit()):
        raise InputError(f"gpu layers {given!r:.40} is no number of layers: give 0, 1, 2 ..., or auto")
    if len(text.lstrip("0")) > len(str(MOST)) or int(text) > MOST:
        raise InputError(f"gpu layers {text:.40} are more than any target has: give {MOST} or less, or auto")
    return int(text)


def check_count(count: int, layers: int) -> None:
    """Raise InputError if `count` first layers leave none of a target's `layers` to the CPU."""
    if count >= layers:
        raise InputError(
            f"--gpu-layers {count} leaves no layer to the CPU: this target has {layers}, give {layers - 1} or fewer"
        )


def takes_layers(given: int | str | None) -> bool:
    """Return whether a user asks for layers on a GPU. Raises InputError."""
    return given is not None and read_count(given) != 0


def check_layers(given: int | str | None, drafter_device: str, vram: int | None, name: str = FLAG) -> None:
    """Raise InputError for layers beside flags that allow none. given: None for the pair's own number. name: its."""
    count = read_count(given) if given is not None else 0
    if count == 0:
        return
    if drafter_device in ("cpu", "openvino-gpu"):
        raise InputError(
            f"{name} {given} runs on CUDA or WebGPU, not beside --drafter-device {drafter_device}: give "
            "--drafter-device cuda or webgpu, or leave out --gpu-layers"
        )
    if count is None and vram is None:
        raise InputError(f"{name} auto takes what is left of a limit: give --vram SIZE too, or --gpu-layers K")


def own_layers(own: str) -> tuple[int, str] | None:
    """Return how many first layers default flags put on which device by a pair's own number; None for none."""
    if not (count := read_count(own)):  # "auto" needs a limit
        return None
    try:
        return count, layer_device(AUTO).key
    except DeviceError:
        return None


def layer_device(drafter_device: str) -> LayerDevice:
    """Return the device for layers: the drafter's, or the first that works. Raises DeviceError."""
    if drafter_device == "cuda":
        return OrtDevice.cuda()
    if drafter_device == "webgpu":
        return WebGpuLayers(software=True)
    problems = {"cuda": cuda_problem(WORK.off)}
    if problems["cuda"] is None:
        return OrtDevice.cuda()
    problems["webgpu"] = webgpu_problem(software=False, off=WORK.off)
    if problems["webgpu"] is None:
        return WebGpuLayers(software=False)
    reasons = "; ".join(f"no {GPUS[gpu]}: {problem}" for gpu, problem in problems.items())
    raise DeviceError(f"no GPU for the target's first layers ({reasons}): give --gpu-layers 0")
