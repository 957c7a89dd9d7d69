"""Ways to a GPU. This module imports no engine before one is asked for."""

from __future__ import annotations

# In the order that "auto" tries them, with their names.
GPUS = {"cuda": "CUDA", "webgpu": "WebGPU", "openvino-gpu": "OpenVINO's GPU"}


def gpu_expected(gpu: str) -> bool:
    """Return whether one of GPUS should work here, as far as its driver or its plugin tells."""
    from dovetail.runtime.devices.cuda import driver_cuda
    from dovetail.runtime.devices.openvino import openvino_gpu_expected
    from dovetail.runtime.devices.webgpu import webgpu_expected

    if gpu == "cuda":
        return driver_cuda() is not None
    return webgpu_expected() if gpu == "webgpu" else openvino_gpu_expected()
