"""Plan a drafter's GPU memory before it is loaded: the arithmetic of --vram.

Axes: n rows of a call, T tree slots, S context pairs, K draft vocabulary, D feature size.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from math import prod

import numpy as np

from dovetail.runtime.devices.gpus import GPUS
from dovetail.runtime.drafter.graph_io import CHUNK, noise_spec, row_specs, state_shapes
from dovetail.runtime.errors import DeviceError, InputError
from dovetail.runtime.pair.manifest import DrafterFacts, Manifest
from dovetail.runtime.system.arrays import nbytes
from dovetail.runtime.system.machine import mib

BUCKETS = (8, 16, CHUNK)  # rows of a captured graph: tree levels and accepted tokens, wider levels, prompts
CONTEXT = 4096  # pairs that the device holds; a longer text keeps its last pairs
LEAST_CONTEXT = 1024  # 256 pairs to read again, 256 of a prompt, 512 to continue with
CONTEXT_STEP = 256
HALF, SINGLE = 2, 4  # bytes of a value on the device: with CUDA, and with the INT8 graph
# ONNX Runtime allocates activations one by one in the first run of a shape, and in one block from the
# second run on. Its arena holds both. No GPU has confirmed the sum yet.
ARENA_COPIES = 2
# CUDA itself: context, kernels, cuBLAS workspaces. The value is an allowance, not a measurement,
# because it differs from GPU to GPU.
CUDA_ITSELF = 512 << 20
# The plugin keeps the activations of each bucket's captured call, and those of the plain call that a
# replay is checked against, in buffers of rounded sizes. SmolLM2 takes 3.7 times the float32 activations
# of its largest call with 1,024 pairs and 4.7 times with 4,096: Vulkan's memory under SwiftShader, 2026-11-30.
WEBGPU_COPIES = 5
# WebGPU itself: a tiny drafter takes 20 MiB of Vulkan's memory. The rest is an allowance for what the
# driver of a GPU needs for kernels, which differs from GPU to GPU.
WEBGPU_ITSELF = 64 << 20
# OpenVINO keeps a variable, and beside it the value that a call writes: its GPU plugin's Assign copies
# the value to the variable.
OPENVINO_STATES = 2
# Beside weights and state, OpenVINO's CPU device takes 0.9 to 1.7 times the float32 activations of the
# largest call: SmolLM2 and Qwen2.5-Coder-0.5B with 1,024 and 4,096 pairs, 2026-11-30.
OPENVINO_COPIES = 2
OPENCL_ITSELF = WEBGPU_ITSELF  # OpenCL itself: the driver builds kernels for the same graph

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True)
class VramPlan:
    """Bytes on the device."""

    context: int  # pairs
    weights: int  # of the graph
    state: int  # KV and feature bank
    rows: int  # inputs and outputs of all buckets, and noise for the draft vocabulary
    workspace: int  # activations of the largest call, as often as they are held at once
    cuda: int = CUDA_ITSELF  # the allowance for CUDA itself
    webgpu: int = 0  # the allowance for WebGPU itself
    opencl: int = 0  # the allowance for OpenCL itself

    @property
    def total(self) -> int:
        return sum(self._parts().values())

    def arena(self, limit: int) -> int:
        """Return `limit`'s bytes for ONNX Runtime's arena: weights, activations and the rest."""
        return limit - self.state - self.rows - self.cuda

    def _parts(self) -> dict[str, int]:
        allowances = (part for part in ("cuda", "webgpu", "opencl") if getattr(self, part))
        return {part: getattr(self, part) for part in ("weights", "state", "rows", "workspace", *allowances)}

    def __str__(self) -> str:
        sizes = " + ".join(f"{mib(size)} {part}" for part, size in self._parts().items())
        return f"{sizes} = {mib(self.total)} MiB with a context of {self.context}"

    def as_dict(self) -> dict[str, float | int]:
        """Return the JSON form, sizes in MiB."""
        sizes = {**self._parts(), "total": self.total}
        return {"context": self.context, **{f"{part}_mb": mib(size) for part, size in sizes.items()}}


def plan(facts: DrafterFacts, weights: int, context: int) -> VramPlan:
    """Return the plan of a drafter with `weights` bytes of float16 graph and `context` pairs."""
    state = sum(map(prod, state_shapes(facts, context).values())) * HALF
    rows = sum(nbytes(spec) for bucket in BUCKETS for spec in row_specs(facts, bucket, np.float16).values())
    rows += facts.noise * nbytes(noise_spec(facts))
    fixed, per_pair = facts.workspace
    return VramPlan(context, weights, state, rows, ARENA_COPIES * (fixed + per_pair * context))


def plan_on_webgpu(facts: DrafterFacts, weights: int, context: int) -> VramPlan:
    """Return the plan of a drafter on WebGPU, with `weights` bytes of INT8 graph and float32 values."""
    embedded = sum(1 if facts.positions else bucket for bucket in BUCKETS) * facts.hidden_size * SINGLE
    state, rows, activations = _single(facts, context)
    return VramPlan(context, weights, state, rows + embedded, WEBGPU_COPIES * activations, cuda=0, webgpu=WEBGPU_ITSELF)


def plan_on_openvino(facts: DrafterFacts, weights: int, context: int) -> VramPlan:
    """Return the plan of a drafter on OpenVINO's GPU; see plan_on_webgpu."""
    state, rows, activations = _single(facts, context)
    return VramPlan(
        context, weights, OPENVINO_STATES * state, rows, OPENVINO_COPIES * activations, cuda=0, opencl=OPENCL_ITSELF
    )


def _single(facts: DrafterFacts, context: int) -> tuple[int, int, int]:
    """Return the bytes of state, rows and activations in float32, each once."""
    state = sum(map(prod, state_shapes(facts, context).values())) * SINGLE
    rows = sum(nbytes(spec) for bucket in BUCKETS for spec in row_specs(facts, bucket, np.float32).values())
    fixed, per_pair = facts.workspace
    return state, rows + facts.noise * nbytes(noise_spec(facts)), (fixed + per_pair * context) * SINGLE // HALF


def plan_pair(manifest: Manifest, vram: int | None = None, *, fit: bool = False) -> VramPlan:
    """Return the plan of a pair's drafter within `vram` bytes.

    vram: None for the limit of the pair, which the plan then fits to. Raises DeviceError: see
    plan_within; or for a pair without a float16 drafter or without these facts.
    """
    facts = manifest.drafter
    if facts is None or "cuda" not in facts.files:
        raise DeviceError("the pair holds no float16 drafter: export the drafter again")
    weights = sum(entry.size for entry in manifest.drafter_files("cuda"))
    limit = facts.vram if vram is None else vram
    return plan_within(facts, weights, limit, fit=fit or vram is None)


def plan_webgpu(manifest: Manifest, on_host: int, vram: int | None = None, *, fit: bool = False) -> VramPlan:
    """Return the plan of a pair's drafter on WebGPU within `vram` bytes; see plan_pair.

    on_host: bytes of the INT8 graph's weights that the host keeps.
    """
    return _plan_int8(manifest, on_host, vram, fit, plan_on_webgpu)


def plan_openvino(manifest: Manifest, vram: int | None = None, *, fit: bool = False) -> VramPlan:
    """Return the plan of a pair's drafter on OpenVINO's GPU within `vram` bytes; see plan_pair."""
    return _plan_int8(manifest, 0, vram, fit, plan_on_openvino)


def _plan_int8(
    manifest: Manifest, on_host: int, vram: int | None, fit: bool, planned: Callable[[DrafterFacts, int, int], VramPlan]
) -> VramPlan:
    facts = manifest.needed_drafter
    weights = sum(entry.size for entry in manifest.drafter_files("cpu")) - on_host
    limit = facts.vram if vram is None else vram
    return plan_within(facts, weights, limit, fit=fit or vram is None, planned=planned)


def plan_within(
    facts: DrafterFacts,
    weights: int,
    limit: int,
    *,
    fit: bool,
    planned: Callable[[DrafterFacts, int, int], VramPlan] = plan,
) -> VramPlan:
    """Return the plan within `limit` bytes, 0 for no limit, with CONTEXT pairs.

    With `fit` the context may shrink to LEAST_CONTEXT pairs. Raises DeviceError with the arithmetic
    if no plan fits, or for facts without a workspace.
    """
    if not facts.workspace:
        raise DeviceError("the pair does not say how much GPU memory its drafter takes: export the drafter again")
    wanted = planned(facts, weights, min(facts.max_context, CONTEXT))
    least = planned(facts, weights, min(facts.max_context, LEAST_CONTEXT))
    if not limit or wanted.total <= limit:
        return wanted
    if not fit:
        raise DeviceError(
            f"the drafter does not fit {mib(limit)} MiB of VRAM: {wanted}: give a larger --vram, or --fit"
        )
    for context in range(wanted.context // CONTEXT_STEP * CONTEXT_STEP, least.context, -CONTEXT_STEP):
        if (fitting := planned(facts, weights, context)).total <= limit:
            return fitting
    if least.total <= limit:
        return least
    raise DeviceError(
        f"the drafter does not fit {mib(limit)} MiB of VRAM with the shortest context either: {least}: give a larger "
        "--vram, or export the drafter with fewer draft tokens: dovetail-export drafter --vram SIZE --fit"
    )


def bucket_of(n: int) -> int:
    """Return the rows of the bucket for a call of n rows."""
    return next(size for size in BUCKETS if size >= n)


def parse_size(text: str) -> int:
    """Return the bytes of "3GB", "3000MB", "512MiB", "2g" or "4096". Raises InputError.

    Units are powers of 1000, or of 1024 with an i.
    """
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([kmg]?i?)b?", text.strip().lower())
    size = int(Decimal(found[1]) * _UNITS.get(found[2], 0)) if found else 0
    if size < 1:
        raise InputError(f"size {text!r} is unknown: give e.g. 3GB or 512MiB")
    return size


def check_limit(vram: int | None, fit: bool, device: str) -> None:
    """Raise InputError unless a limit in bytes, if given, makes sense for the drafter's device."""
    if vram is not None and (not isinstance(vram, int) or isinstance(vram, bool) or vram < 1):
        raise InputError(f"vram {vram!r} is out of range: give bytes, 1 or more, or a text such as 3GB")
    if fit and vram is None:
        raise InputError("--fit has nothing to fit to: give --vram SIZE")
    if vram is not None and device == "cpu":
        raise InputError("--vram is for a drafter on a GPU: leave out --drafter-device cpu, or --vram")


def check_draft_model(draft_model: object, drafter_device: str, vram: int | None) -> None:
    """Raise InputError for flags of a GPU beside a draft model, which runs on the CPU."""
    if draft_model is not None and (drafter_device in GPUS or vram is not None):
        given = drafter_device if drafter_device in GPUS else "cuda"
        raise InputError(
            f"a draft model runs on the CPU: leave out --drafter-device {given} and --vram, or --draft-model"
        )
