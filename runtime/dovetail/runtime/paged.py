"""A compiled paged-attention model and the KV blocks it works on.

Axes: T new tokens of all sequences, S sequences, R rows whose logits are wanted, V vocabulary,
D feature size; KV tensors are [blocks, kv_heads, BLOCK, head_size], one key and one value per layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import machine
from .errors import DeviceError
from .graph import FEATURES, LOGITS, SAMPLED, FeatureMix, mix_tap, read_model, to_paged, widen_tap
from .mapped import LookedUp, giving_back
from .telemetry import decline_telemetry

decline_telemetry()  # see runners.py

BLOCK = 32  # tokens per KV block: the CPU plugin's fixed size
_ROWS_PER_PAGE = 8  # rows of up to 256 16-bit words that one page of 4 KiB holds

# A cache of 16-bit floats: the plugin's default u8 is quantised over a whole block, so rows could not be
# moved, and a row's result would depend on its neighbours.
REQUIRED = {"KV_CACHE_PRECISION": "f16"}
PROPERTIES = {"PERFORMANCE_HINT": "LATENCY"}
# Between INT8 weights bfloat16 only adds conversions: with float32 passes are quicker, and more exact, which pays for
# activations quantised in groups of 64 in place of OpenVINO's 32 (docs/speed.md; other weights were not measured).
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "64"}

_EMPTY_MASK = np.zeros(0, np.uint8)
_EMPTY_BEGINS = np.zeros(0, np.int32)


def default_properties(instruction_sets: Collection[str] | None = None) -> dict[str, str]:
    """OpenVINO's properties for the target where nothing else is asked for.

    instruction_sets: of the CPU, by default this one's.  Precision and groups are OpenVINO's own choice where the CPU
    has units for another precision (AMX), or is no x86.
    """
    have = machine.cpu().instruction_sets if instruction_sets is None else instruction_sets
    return {**PROPERTIES, **(FLOAT32 if "avx2" in have and "amx_bf16" not in have else {})}


@dataclass(frozen=True)
class Batch:
    """The new tokens of one pass.

    tokens, positions: [T] int64.  past: [S] int32, tokens already cached per sequence.
    begins: [S+1] int32, where each sequence's new tokens begin.  blocks: block ids of all sequences, flat;
    block_begins: [S+1] int32.  wanted: [R] int64, rows of T whose logits are wanted.
    mask: None for causal attention, else u8 [n*n] row-major for a single sequence's n new tokens.
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    past: NDArray[np.int32]
    begins: NDArray[np.int32]
    blocks: NDArray[np.int32]
    block_begins: NDArray[np.int32]
    wanted: NDArray[np.int64]
    mask: NDArray[np.uint8] | None = None


@dataclass
class _KVGroup:
    """All KV tensors of one shape, in one array [tensors, blocks, heads, BLOCK, size] of 16-bit words."""

    names: list[str]
    element_type: Any
    heads: int
    size: int
    data: NDArray[np.uint16] = field(init=False)

    def __post_init__(self) -> None:
        self.data = np.zeros((len(self.names), 0, self.heads, BLOCK, self.size), np.uint16)


class PagedModel:
    """One compiled model, one inference request, and the KV blocks it owns.

    properties: of OpenVINO's CPU plugin, by name, in place of the defaults; those that are required here stay.
    mix: what a drafter adds to the last feature; layers: blocks whose outputs come before it, as training reads them.
    """

    def __init__(
        self,
        xml: Path,
        *,
        threads: int | None = None,
        properties: Mapping[str, Any] | None = None,
        mix: FeatureMix | None = None,
        layers: Sequence[int] = (),
    ):
        import openvino as ov

        weights = xml.with_suffix(".bin")
        self._embedding = LookedUp(weights)
        with self._embedding:
            model = read_model(xml)
        if mix:
            mix_tap(model, mix)
        if layers:
            widen_tap(model, layers)
        settings: dict[str, Any] = {**default_properties(), **(properties or {}), **REQUIRED}
        if quota := machine.quota_threads():  # OpenVINO sees no quota, and pins every container to the same cores
            settings = {"INFERENCE_NUM_THREADS": quota, "ENABLE_CPU_PINNING": False} | settings
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            to_paged(model)
            self.compiled = ov.Core().compile_model(model, "CPU", settings)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise DeviceError(f"OpenVINO cannot compile {xml} for the CPU: {reason}") from error
        self.request = self.compiled.create_infer_request()
        self._unpacked: Path | None = weights  # until the first pass has packed its weights
        self._inputs: dict[str, NDArray[Any]] = {}  # by name, what the request holds
        self._groups = self._kv_groups()
        self.feature_size = int(self.compiled.output(FEATURES).partial_shape[-1].get_length())

    @property
    def blocks(self) -> int:
        """KV blocks allocated."""
        return int(self._groups[0].data.shape[1])

    @property
    def block_bytes(self) -> int:
        """Memory of one KV block over all layers."""
        return sum(2 * len(group.names) * group.heads * BLOCK * group.size for group in self._groups)

    def _kv_groups(self) -> list[_KVGroup]:
        by_shape: dict[tuple[int, int], list[Any]] = defaultdict(list)
        for port in self.compiled.inputs:
            if "_cache." in port.any_name:
                _, heads, block, size = (dim.get_length() if dim.is_static else 0 for dim in port.partial_shape)
                if block != BLOCK or port.element_type.size != 2:
                    raise DeviceError(
                        f"KV tensor {port.any_name} is {port.element_type} {port.partial_shape}: expected 16-bit "
                        f"floats in blocks of {BLOCK}: use an OpenVINO release in the supported range"
                    )
                by_shape[heads, size].append(port)
        return [
            _KVGroup([port.any_name for port in ports], ports[0].element_type, heads, size)
            for (heads, size), ports in by_shape.items()
        ]

    def reserve(self, blocks: int) -> None:
        """Have at least `blocks` KV blocks, at least doubling, and keep what they hold."""
        import openvino as ov

        if blocks <= self.blocks:
            return
        blocks = max(blocks, 2 * self.blocks)
        for group in self._groups:
            grown = np.zeros((len(group.names), blocks, group.heads, BLOCK, group.size), np.uint16)
            grown[:, : self.blocks] = group.data
            # Hand the new tensors over before the old array goes: the request holds raw pointers.
            for name, array in zip(group.names, grown, strict=True):
                self.request.set_tensor(name, ov.Tensor(array, ov.Shape(array.shape), group.element_type))
            group.data = grown

    def touch(self, blocks: int) -> None:
        """Have memory of its own under the first `blocks` KV blocks, whatever they hold.

        Pages that were never written share one page of zeros, which a pass reads too quickly to be timed.
        """
        self.reserve(blocks)
        for group in self._groups:
            group.data[:, :blocks, :, ::_ROWS_PER_PAGE, 0] += 0

    def move_rows(self, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        """Copy KV rows of slots `source` to slots `target`, in all layers, for an identity block table."""
        for group in self._groups:
            rows = group.data[:, source // BLOCK, :, source % BLOCK]
            group.data[:, target // BLOCK, :, target % BLOCK] = rows

    def run(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """One pass: logits [R, V] and features [T, D], views of engine memory valid until the next pass."""
        longest = int((batch.past + np.diff(batch.begins)).max())
        mask = _EMPTY_MASK if batch.mask is None else batch.mask
        mask_begins = _EMPTY_BEGINS if batch.mask is None else np.array([0, mask.size], np.int32)
        inputs: dict[str, NDArray[Any]] = {
            "input_ids": batch.tokens,
            "position_ids": batch.positions,
            "past_lens": batch.past,
            "subsequence_begins": batch.begins,
            "block_indices": batch.blocks,
            "block_indices_begins": batch.block_begins,
            "max_context_len": np.array(longest, np.int32),
            "qq_bias": mask,
            "qq_bias_begins": mask_begins,
            SAMPLED: batch.wanted,
        }
        for name, array in inputs.items():
            self._give(name, array)
        try:
            self._infer()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise DeviceError(f"the target failed on the CPU: {reason}: open the engine again") from error
        self._embedding.add(len(batch.tokens))
        logits = self.request.get_tensor(LOGITS).data
        features = self.request.get_tensor(FEATURES).data
        return logits[:, 0], features[:, 0]

    def _give(self, name: str, array: NDArray[Any]) -> None:
        """Set an input; one of the same shape as in the last pass goes into the memory that the request has already."""
        import openvino as ov

        held = self._inputs.get(name)
        if held is not None and held.shape == array.shape:
            held[...] = array
            return
        # The request holds a raw pointer: an interrupt between these lines must not leave one to memory that is gone.
        given = np.array(array)
        self.request.set_tensor(name, ov.Tensor(given, shared_memory=True))
        self._inputs[name] = given

    def _infer(self) -> None:
        """A pass; its outputs are read where they lie, which without `share_outputs` would be copied for nobody."""
        if self._unpacked is None:
            self.request.infer(share_outputs=True)
            return
        with giving_back(self._unpacked):
            self.request.infer(share_outputs=True)
        self._unpacked = None
