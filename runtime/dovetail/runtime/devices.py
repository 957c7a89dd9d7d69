"""What the machine offers, asked without waking an engine: cores, and whether CUDA can be used."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")


def physical_cores() -> int:
    """Physical cores this process may run on; hyper-threads of one core count once."""
    allowed = _allowed_cpus()
    cores = set()
    for cpu in allowed:
        try:
            cores.add((_TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip())
        except OSError:  # no sysfs: containers, macOS
            return len(allowed)
    return max(1, len(cores))


def cuda_problem() -> str | None:
    """Why CUDA cannot be used, and what to do about it; None when a device answers.

    Asks the driver itself, because ONNX Runtime tries its CUDA libraries first and complains on stderr.
    """
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return "this onnxruntime is built without CUDA: install onnxruntime-gpu in its place"
    library = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return f"no NVIDIA driver ({library} not found): install it, or let the drafter run on the CPU"
    count = ctypes.c_int(0)
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code or not count.value:
        return f"the NVIDIA driver shows no device (code {code}): check nvidia-smi and CUDA_VISIBLE_DEVICES"
    return None


def _allowed_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
