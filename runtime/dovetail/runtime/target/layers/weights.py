"""Weights of an OpenVINO graph: compressed to 8 or 4 bits with scales, or plain numbers, for ONNX Runtime.

Axes: N outputs, C inputs, G groups of inputs with a scale of their own, g inputs of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.errors import InputError
from dovetail.runtime.target.layers.builder import CONTRIB, Builder
from dovetail.runtime.target.layers.device import WORK

if TYPE_CHECKING:
    import openvino as ov

BLOCKS = (128, 64, 32, 16)  # inputs with one scale, as ONNX Runtime's kernels take them; the largest that divides
REMEDY = WORK.off
_BITS = {"u8": 8, "i8": 8, "u4": 4, "i4": 4}
_SIGNED = {"i8": 128, "i4": 8}  # what makes the values unsigned


@dataclass(frozen=True)
class Compressed:
    """A matrix [N, C] as (values - zero points) * scales."""

    bits: int
    values: NDArray[np.uint8]  # [N, C], or [N, C / 2] with two values a byte, the lower half first
    scales: NDArray[np.float32]  # [N, G]
    zeros: NDArray[np.uint8]  # [N, G], not packed

    @property
    def shape(self) -> tuple[int, int]:
        rows, width = self.values.shape
        return rows, width * 8 // self.bits


def read_matrix(value: ov.Output) -> Compressed | NDArray[np.float32] | None:
    """Return a constant matrix [N, C], None if the value is not constant.

    Raises InputError for a compressed matrix in a form that is not known.
    """
    node = _stripped(value)
    if node.get_type_name() == "Multiply":
        parts = [_stripped(source) for source in node.input_values()]
        if any(part.get_type_name() not in ("Constant", "Subtract") for part in parts):
            return None
        packed, scale = parts if parts[1].get_type_name() == "Constant" else parts[::-1]
        zero = None
        if packed.get_type_name() == "Subtract":
            packed, zero = (_stripped(source) for source in packed.input_values())
        if packed.get_type_name() != "Constant" or (zero is not None and zero.get_type_name() != "Constant"):
            return None
        return _compressed(packed, scale, zero, [*value.get_partial_shape().to_shape()])
    if node.get_type_name() != "Constant":
        return None
    return np.asarray(node.data, np.float32).reshape([*value.get_partial_shape().to_shape()])


def _compressed(packed: ov.Node, scale: ov.Node, zero: ov.Node | None, shape: list[int]) -> Compressed:
    kind = packed.get_output_element_type(0).get_type_name()
    if kind not in _BITS or len(shape) != 2:
        raise InputError(f"weights {packed.get_friendly_name()!r} are {kind} {shape}: {REMEDY}")
    (rows, width), bits = shape, _BITS[kind]
    scales = np.asarray(scale.data, np.float32).reshape(rows, -1)
    values = packed.data.view(np.uint8).reshape(rows, -1)
    zeros = np.full(scales.shape, _SIGNED.get(kind, 0), np.uint8)
    if zero is not None:
        zeros = _unpacked(zero, scales.shape)
    if kind in _SIGNED:  # a copy; unsigned values stay where they are
        values = values ^ np.uint8(0x80 if bits == 8 else 0x88)
    if zero is not None and kind in _SIGNED:
        zeros = zeros ^ np.uint8(_SIGNED[kind])
    if values.shape[1] * 8 != width * bits or width % scales.shape[1]:
        raise InputError(f"weights {packed.get_friendly_name()!r} have {scales.shape[1]} groups: {REMEDY}")
    return Compressed(bits, values, scales, zeros)


def _unpacked(zero: ov.Node, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return zero points [N, G], a byte each. One zero point may be that of all groups."""
    data = np.asarray(zero.data).view(np.uint8).reshape(-1)
    if _BITS.get(zero.get_output_element_type(0).get_type_name()) == 4:
        data = np.stack([data & 15, data >> 4], 1).reshape(-1)[: int(np.prod(zero.get_output_shape(0)))]
    return np.broadcast_to(data.reshape(-1, shape[1]) if data.size > 1 else data, shape).astype(np.uint8)


def _stripped(value: ov.Output) -> ov.Node:
    """Return the node before conversions and changes of shape."""
    node = value.get_node()
    while node.get_type_name() in ("Convert", "Reshape", "Unsqueeze", "Squeeze"):
        node = node.input_value(0).get_node()
    return node


def as_float32(matrix: Compressed) -> NDArray[np.float32]:
    """Return [N, C]."""
    rows, width = matrix.shape
    values = matrix.values
    if matrix.bits == 4:
        values = np.stack([values & 15, values >> 4], 2).reshape(rows, width)
    grouped = values.reshape(rows, matrix.scales.shape[1], -1).astype(np.float32)
    whole = (grouped - matrix.zeros[..., None]) * matrix.scales[..., None]
    return whole.reshape(rows, width).astype(np.float32)


@dataclass(frozen=True)
class _Blocks:
    """A compressed matrix in blocks with one scale each, padded to whole blocks."""

    size: int
    values: NDArray[np.uint8]  # [N, blocks * size * bits / 8]
    scales: NDArray[np.float32]  # [N, blocks]
    zeros: NDArray[np.uint8]  # [N, blocks], packed if 4 bits

    @property
    def parts(self) -> list[NDArray[Any]]:
        return [self.values, self.scales, self.zeros]

    @classmethod
    def of(cls, matrix: Compressed) -> _Blocks | None:
        """None if no block fits the matrix's groups."""
        width, groups = matrix.shape[1], matrix.scales.shape[1]
        size = next((size for size in BLOCKS if (width // groups) % size == 0), 0)
        if not size:
            return None
        times = width // groups // size
        zeros = np.repeat(matrix.zeros, times, 1)
        if matrix.bits == 4:
            zeros = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))
            zeros = zeros[:, ::2] | (zeros[:, 1::2] << np.uint8(4))
        return cls(size, matrix.values, np.repeat(matrix.scales, times, 1), zeros)


def multiply(graph: Builder, x: str, matrix: Compressed | NDArray[np.float32], *, compressed: bool) -> str:
    """Add x [.., C] @ matrix.T. compressed: whether the provider multiplies compressed matrices quickly."""
    if isinstance(matrix, Compressed):
        blocks = _Blocks.of(matrix) if compressed else None
        if blocks:
            rows, width = matrix.shape
            graph.scratch = max(graph.scratch, rows * width)
            count = blocks.scales.shape[1]
            values = blocks.values.reshape(rows, count, blocks.size * matrix.bits // 8)
            inputs = (graph.constant(values), graph.constant(blocks.scales), graph.constant(blocks.zeros))
            return graph.op(
                "MatMulNBits", x, *inputs, domain=CONTRIB,
                N=rows, K=width, bits=matrix.bits, block_size=blocks.size, accuracy_level=1,
            )  # fmt: skip
        matrix = as_float32(matrix)
    return graph.op("MatMul", x, graph.constant(np.ascontiguousarray(matrix.T)))


def look_up(graph: Builder, matrix: Compressed | NDArray[np.float32], ids: str) -> str:
    """Add rows of a matrix [N, C] for ids [R]."""
    if isinstance(matrix, Compressed):
        if blocks := _Blocks.of(matrix):
            values, scales, zeros = map(graph.constant, blocks.parts)
            graph.embedding = sum(part.nbytes for part in blocks.parts)
            return graph.op(
                "GatherBlockQuantized", values, ids, scales, zeros, domain=CONTRIB,
                bits=matrix.bits, block_size=blocks.size, gather_axis=0, quantize_axis=1,
            )  # fmt: skip
        matrix = as_float32(matrix)
    graph.embedding = matrix.nbytes
    return graph.op("Gather", graph.constant(matrix), ids, axis=0)
