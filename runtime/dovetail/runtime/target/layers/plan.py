"""Plan the GPU memory of the target's first layers before they are opened.

Axes: R rows of a call, S slots of a text, W tokens of a tail, H heads, k heads of keys and values, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dovetail.runtime.errors import DeviceError
from dovetail.runtime.system.machine import mib
from dovetail.runtime.target.features import FeatureMix
from dovetail.runtime.target.graph import read_model, to_paged
from dovetail.runtime.target.layers.attention import ROWS, TAIL, prefixes
from dovetail.runtime.target.layers.graph import LayerGraph, MixSize, stream, translate

# Arrays of scores, and of tails, that ONNX Runtime's arena holds at once, in float32. Measured on the CPU provider
# with an arena that takes what is asked for, 2026-11-30: within 6% of 45 to 570 MiB for SmolLM2 with contexts of
# 2,048 and 8,192, Qwen2.5-Coder-0.5B with 4,096 and 32,768, and -1.5B with 4,096.
# tests/e2e/test_first_layers.py measures one of them again.
SCORES, TAILS = 10, 7


@dataclass(frozen=True)
class LayerPlan:
    """Bytes on the device for the embedding and the first layers."""

    count: int  # layers
    weights: int
    state: int  # keys and values of all texts
    workspace: int  # activations of the largest call
    embedding: int  # of the weights
    kernels: int  # that a call starts

    @property
    def total(self) -> int:
        return self.weights + self.state + self.workspace

    def __str__(self) -> str:
        sizes = f"{mib(self.weights)} weights + {mib(self.state)} state + {mib(self.workspace)} workspace"
        return f"{self.count} layer{'s' * (self.count != 1)}: {sizes} = {mib(self.total)} MiB"

    def as_dict(self) -> dict[str, float | int]:
        """Return the JSON form, sizes in MiB."""
        return {
            "layers": self.count, "weights_mb": mib(self.weights), "state_mb": mib(self.state),
            "workspace_mb": mib(self.workspace), "total_mb": mib(self.total),
        }  # fmt: skip


class Kind(Protocol):
    """What a plan needs of a LayerDevice, or of its class."""

    compressed: bool
    expands: bool
    kv_type: type[np.floating[Any]]


def plans(xml: Path, kind: Kind, capacity: int, texts: int, mix: FeatureMix | None = None) -> list[LayerPlan]:
    """Return the plan for 1, 2, ... layers of a target, all but the last.

    capacity: tokens of a text. texts: that the device holds at once. mix: of a drafter that reads features.
    Raises InputError for a target whose layers cannot be translated.
    """
    model = read_model(xml)
    outputs = stream(model)
    to_paged(model)
    count = len(outputs) - 1
    graph = translate(outputs, count, None, capacity=capacity, kv_type=kind.kv_type, compressed=kind.compressed)
    parts = {0: MixSize()}  # by the number of layers that the mix reads
    found = []
    for layers in range(1, count + 1):
        read = sum(layer < layers for layer in mix.layers) if mix else 0
        if mix and read not in parts:
            parts[read] = MixSize.of(mix, layers, compressed=kind.compressed)
        scratch = max(graph.scratch, parts[read].scratch) if kind.expands else 0
        found.append(_plan(graph, layers, texts, scratch, parts[read].weights))
    return found


def _plan(graph: LayerGraph, count: int, texts: int, scratch: int, features: int) -> LayerPlan:
    """Return the plan for the first `count` layers of a graph. features: bytes of their mix."""
    shapes = [*graph.kv_shapes.values()][:count]
    state = texts * sum(map(prod, shapes)) * np.dtype(graph.kv_type).itemsize
    last = prefixes(graph.capacity)[-1]
    kv = [2 * heads.kv * heads.size for heads in graph.heads[:count]]
    scores = [ROWS * heads.query * (last + TAIL) for heads in graph.heads[:count]]
    values = SCORES * max(scores) + TAILS * ROWS * TAIL * max(kv) + scratch
    return LayerPlan(
        count,
        graph.layer_bytes[count - 1] + features,
        state,
        values * np.dtype(np.float32).itemsize,
        graph.embedding,
        graph.layer_kernels[count - 1],
    )


def within(found: Sequence[LayerPlan], room: int) -> LayerPlan | None:
    """Return the plan of the most layers within `room` bytes, None if there is no room for one."""
    return max((each for each in found if each.total <= room), key=lambda each: each.count, default=None)


def fitting(found: Sequence[LayerPlan], count: int | None, room: int, taken: str) -> int:
    """Return `count`, or the most layers that fit `room` bytes. taken: what else takes memory.

    Raises DeviceError if not so many fit, or none. More layers than the target has are left to others.
    """
    if not found:
        if count is None:
            raise DeviceError("this target has one layer, which the CPU runs: give --gpu-layers 0")
        return count
    best = within(found, room)
    wanted = best if count is None else found[min(count, len(found)) - 1]
    if wanted and wanted.total <= room:
        return count or wanted.count
    raise DeviceError(
        f"{wanted or found[0]} exceed {mib(max(room, 0))} MiB of VRAM{taken}: give --gpu-layers "
        f"{best.count if best else 0} or a larger --vram"
    )
