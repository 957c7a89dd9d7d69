"""GPUs by name, for predictions about a GPU that is not in this machine.

Figures are those of the page that each row names. They were read from a copy of these pages in the
repository reox007/RightNow-GPU-Database on 2026-11-30. Compute capabilities are also on
https://developer.nvidia.com/cuda-gpus, for the GTX 10 series on its page of legacy GPUs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from dovetail.runtime.errors import InputError

PAGES = "https://www.techpowerup.com/gpu-specs/"
_IDLE = {"nvidia", "geforce", "tesla", "amd", "radeon", "intel", "gpu"}  # words that tell no GPUs apart
_KINDS = {
    "laptop": "laptop",
    "mobile": "laptop",
    "pcie": "pcie",
    "sxm": "sxm",
    "sxm4": "sxm",
    "sxm5": "sxm",
    "hbm3": "sxm",
}
_MEMORY = re.compile(r"(?:^|(?<=[\s(])|(?<=\w-))(\d{1,4}) *gi?b?\b")
_INTEL = "Arc "  # how the names of Intel's GPUs begin
_NEAR = 5  # names that an error lists


@dataclass(frozen=True)
class GpuModel:
    """What a maker sells under one name with one size of memory."""

    name: str
    memory_gb: int
    bandwidth: float  # GB/s, of the memory
    pcie: tuple[int, int]  # generation, lanes
    capability: tuple[int, int] | None  # of CUDA, None without CUDA
    source: str  # URL of the figures

    @property
    def without_cuda(self) -> tuple[str, ...]:
        """Values of --drafter-device that may work there without CUDA."""
        return ("webgpu", "openvino-gpu") if self.name.startswith(_INTEL) else ("webgpu",)

    @property
    def label(self) -> str:
        return f"{self.name} {self.memory_gb} GB"


def _gpu(
    name: str, memory_gb: int, bandwidth: float, pcie: tuple[int, int], capability: tuple[int, int] | None, page: str
) -> GpuModel:
    return GpuModel(name, memory_gb, bandwidth, pcie, capability, PAGES + page)


GPUS = (
    _gpu("GeForce GTX 1050 Ti", 4, 112.1, (3, 16), (6, 1), "geforce-gtx-1050-ti.c2885"),
    _gpu("GeForce GTX 1060", 6, 192.2, (3, 16), (6, 1), "geforce-gtx-1060-6-gb.c2862"),
    _gpu("GeForce GTX 1650", 4, 128.1, (3, 16), (7, 5), "geforce-gtx-1650.c3366"),
    _gpu("GeForce GTX 1650 Laptop", 4, 192.0, (3, 16), (7, 5), "geforce-gtx-1650-mobile.c3633"),
    _gpu("GeForce RTX 2060", 6, 336.0, (3, 16), (7, 5), "geforce-rtx-2060.c3310"),
    _gpu("GeForce RTX 2080 Ti", 11, 616.0, (3, 16), (7, 5), "geforce-rtx-2080-ti.c3305"),
    _gpu("GeForce RTX 3050 Laptop", 4, 192.0, (4, 8), (8, 6), "geforce-rtx-3050-mobile.c3788"),
    _gpu("GeForce RTX 3050", 6, 168.0, (4, 8), (8, 6), "geforce-rtx-3050-6-gb.c4188"),
    _gpu("GeForce RTX 3050", 8, 224.0, (4, 8), (8, 6), "geforce-rtx-3050-8-gb.c3858"),
    _gpu("GeForce RTX 3060 Laptop", 6, 336.0, (4, 16), (8, 6), "geforce-rtx-3060-mobile.c3757"),
    _gpu("GeForce RTX 3060", 12, 360.0, (4, 16), (8, 6), "geforce-rtx-3060-12-gb.c3682"),
    _gpu("GeForce RTX 3070", 8, 448.0, (4, 16), (8, 6), "geforce-rtx-3070.c3674"),
    _gpu("GeForce RTX 3080", 10, 760.3, (4, 16), (8, 6), "geforce-rtx-3080.c3621"),
    _gpu("GeForce RTX 3090", 24, 936.2, (4, 16), (8, 6), "geforce-rtx-3090.c3622"),
    _gpu("GeForce RTX 4050 Laptop", 6, 192.0, (4, 8), (8, 9), "geforce-rtx-4050-mobile.c3953"),
    _gpu("GeForce RTX 4060 Laptop", 8, 256.0, (4, 8), (8, 9), "geforce-rtx-4060-mobile.c3946"),
    _gpu("GeForce RTX 4060", 8, 272.0, (4, 8), (8, 9), "geforce-rtx-4060.c4107"),
    _gpu("GeForce RTX 4060 Ti", 16, 288.0, (4, 8), (8, 9), "geforce-rtx-4060-ti-16-gb.c4155"),
    _gpu("GeForce RTX 4070", 12, 504.2, (4, 16), (8, 9), "geforce-rtx-4070.c3924"),
    _gpu("GeForce RTX 4090", 24, 1010.0, (4, 16), (8, 9), "geforce-rtx-4090.c3889"),
    _gpu("GeForce RTX 5060", 8, 448.0, (5, 8), (12, 0), "geforce-rtx-5060.c4219"),
    _gpu("GeForce RTX 5070", 12, 672.0, (5, 16), (12, 0), "geforce-rtx-5070.c4218"),
    _gpu("Tesla T4", 16, 320.0, (3, 16), (7, 5), "tesla-t4.c3316"),
    _gpu("L4", 24, 300.1, (4, 16), (8, 9), "l4.c4091"),
    _gpu("A100 PCIe", 40, 1560.0, (4, 16), (8, 0), "a100-pcie-40-gb.c3623"),
    _gpu("A100 PCIe", 80, 1940.0, (4, 16), (8, 0), "a100-pcie-80-gb.c3821"),
    _gpu("A100 SXM", 80, 2040.0, (4, 16), (8, 0), "a100-sxm4-80-gb.c3746"),
    _gpu("H100 PCIe", 80, 2040.0, (5, 16), (9, 0), "h100-pcie-80-gb.c3899"),
    _gpu("H100 SXM", 80, 3360.0, (5, 16), (9, 0), "h100-sxm5-80-gb.c3900"),
    _gpu("H200 SXM", 141, 4890.0, (5, 16), (9, 0), "h200-sxm-141-gb.c4255"),
    _gpu("Radeon RX 6600", 8, 224.0, (4, 8), None, "radeon-rx-6600.c3696"),
    _gpu("Radeon RX 7600", 8, 288.0, (4, 8), None, "radeon-rx-7600.c4153"),
    _gpu("Radeon RX 7900 XTX", 24, 960.0, (4, 16), None, "radeon-rx-7900-xtx.c3941"),
    _gpu("Arc A380", 6, 186.0, (4, 8), None, "arc-a380.c3913"),
    _gpu("Arc B580", 12, 456.0, (4, 8), None, "arc-b580.c4244"),
)


def find_gpu(named: str) -> GpuModel:
    """Return the GPU of this name. Case, spaces and the maker may differ, the memory is optional.

    Without "Laptop", PCIe or SXM in the name, a GPU without such a word goes first. Raises
    InputError for an unknown or ambiguous name, with near names.
    """
    model, kinds, memory_gb = _read(named)
    known = {gpu: _read(gpu.label) for gpu in GPUS}
    alike = [gpu for gpu, (of, _, _) in known.items() if of == model]
    fitting = [gpu for gpu in alike if kinds <= known[gpu][1] and memory_gb in (None, gpu.memory_gb)]
    found = [gpu for gpu in fitting if known[gpu][1] == kinds] or fitting
    if len(found) == 1:
        return found[0]
    labels = [gpu.label for gpu in GPUS]
    near = [gpu.label for gpu in fitting or alike] or get_close_matches(named.lower(), labels, n=_NEAR, cutoff=0.0)
    what = "may be several GPUs" if found else "is not among the known GPUs"
    raise InputError(f"GPU {named!r:.60} {what}: give e.g. {', '.join(near)}")


def _read(text: str) -> tuple[str, set[str], int | None]:
    """Return the model without its maker, words such as laptop or sxm, and the memory in GB."""
    text = text.lower()
    memory = _MEMORY.search(text)
    words = [word for word in re.findall(r"[a-z0-9]+", _MEMORY.sub(" ", text, count=1)) if word not in _IDLE]
    kinds = {_KINDS[word] for word in words if word in _KINDS}
    return "".join(word for word in words if word not in _KINDS), kinds, int(memory[1]) if memory else None
