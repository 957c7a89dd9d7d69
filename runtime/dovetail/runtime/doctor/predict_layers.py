"""Predict what the first layers of a target would gain on a GPU that is not in this machine.

Nobody has measured these times. A call of the layers launches one kernel after the other and reads the
weights. What the CPU saves is the layers' share of the bytes that a plain pass reads. docs/guide/gpu.md
shows the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dovetail.runtime.devices.cuda import runs_on
from dovetail.runtime.doctor.estimate import CONTEXT
from dovetail.runtime.doctor.gpus import GpuModel
from dovetail.runtime.doctor.ranges import Range
from dovetail.runtime.drafter.open import drafter_bytes
from dovetail.runtime.errors import DovetailError
from dovetail.runtime.pair.layout import TARGET_GRAPH
from dovetail.runtime.pair.manifest import Manifest
from dovetail.runtime.policy.costs import Costs
from dovetail.runtime.target.features import FeatureMix
from dovetail.runtime.target.layers.device import KINDS
from dovetail.runtime.target.layers.plan import LayerPlan, plans, within

# A kernel that is launched by itself, in microseconds: NVIDIA's measurement of short kernels on a V100, without
# and with a wait after each (https://developer.nvidia.com/blog/cuda-graphs/).
LAUNCH_US = Range(3.8, 9.6)
# Bytes that a call moves for a byte of weights: the kernels read them as they are, or CUDA's kernel writes and
# reads a float32 copy of each matrix: 8 bytes for a weight of 8 or 4 bits.
COPIED = {"int8": 9, "int4": 17}


@dataclass(frozen=True)
class LayersPrediction:
    """The first layers on one GPU."""

    way: str  # "cuda" or "webgpu"
    problem: str | None  # why no layer would run there
    plan: LayerPlan | None = None
    call_ms: Range | None = None
    pass_ms: Range | None = None  # a plain pass with these layers on the GPU; None without measured costs
    plain_ms: float | None = None  # a plain pass on this machine's CPU


def predict_layers(
    folder: Path, manifest: Manifest, gpu: GpuModel, limit: int, costs: Costs | None, *, fit: bool = False
) -> LayersPrediction:
    """Return the prediction for as many layers as `limit` bytes hold beside the drafter. costs: of the target here."""
    way = "cuda" if gpu.capability and runs_on(gpu.capability) else "webgpu"
    try:
        room = limit - drafter_bytes(way, folder, manifest, limit, fit=fit)
        found = plans(
            folder / TARGET_GRAPH, KINDS[way], manifest.target.max_context, 1, FeatureMix.of_pair(folder, manifest)
        )
    except DovetailError as error:
        return LayersPrediction(way, str(error))
    best = within(found, room)
    if best is None:
        return LayersPrediction(way, "no layer fits beside the drafter")
    read = best.weights - best.embedding  # rows of the embedding hardly count
    moved = Range(1, COPIED.get(manifest.target.weight_format, 1) if way == "cuda" else 1)
    times = [
        best.kernels * launch / 1e3 + read * bytes_moved / (gpu.bandwidth * 1e6)
        for launch, bytes_moved in zip(LAUNCH_US, moved, strict=True)
    ]
    call = Range(*(round(ms, 2) for ms in times))
    if costs is None:
        return LayersPrediction(way, None, best, call)
    plain = costs.target.at(CONTEXT, 1)
    # The head reads as many bytes as the embedding has.
    whole = read / best.count * manifest.target.num_layers + best.embedding
    rest = plain * (1 - read / whole)
    passes = Range(*(round(rest + ms, 2) for ms in times))
    return LayersPrediction(way, None, best, call, passes, round(plain, 2))


def rows(found: LayersPrediction) -> list[tuple[str, str]]:
    """Return facts for display, each marked as a prediction."""
    if found.problem or not (found.plan and found.call_ms):
        return [("prediction", f"no first layer of the target runs there by {found.way}: {found.problem}")]
    said = [f"by {found.way} beside the drafter, first layers: {found.plan}"]
    time = f"a call of these layers takes {found.call_ms} ms"
    if found.pass_ms and found.plain_ms:
        time += f", a plain pass then {found.pass_ms} ms; {found.plain_ms:g} ms without a GPU, as measured"
    return [("prediction", line) for line in (*said, time)]
