"""Take the first layers out of a target's OpenVINO graph, as an ONNX graph.

What is left in OpenVINO begins with an input, the hidden states behind these layers.

Axes: R rows of a call, n rows that a call returns, H hidden size, D feature size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.errors import ExportError, InputError
from dovetail.runtime.target.features import FeatureMix, layer_outputs
from dovetail.runtime.target.graph import HIDDEN, MIXED
from dovetail.runtime.target.layers.attention import ANSWERS, CALL, FIELDS, PREFIX, Heads, add_rows, slots_for
from dovetail.runtime.target.layers.builder import Builder, total_bytes
from dovetail.runtime.target.layers.translate import Translator
from dovetail.runtime.target.layers.weights import REMEDY, Compressed, multiply

if TYPE_CHECKING:
    import openvino as ov


@dataclass(frozen=True, eq=False)
class LayerGraph:
    """The first layers as an ONNX graph."""

    model: bytes  # without the weights
    weights: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, int]  # HIDDEN, and MIXED if features are mixed of these layers: their sizes
    heads: tuple[Heads, ...]  # of each layer
    layer_bytes: tuple[int, ...]  # of the weights of the first 1, 2, ... layers with the embedding
    embedding: int  # bytes of these
    layer_kernels: tuple[int, ...]  # nodes of the first 1, 2, ... layers that start a kernel
    scratch: int  # values of the largest matrix, which a provider may expand for a call; 0 if none is compressed
    capacity: int  # tokens of a text
    kv_type: type[np.floating]

    @property
    def weight_bytes(self) -> int:
        return total_bytes(self.weights)

    @property
    def kv_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each layer's keys and values, for one text."""
        slots = slots_for(self.capacity)
        return {f"kv.{i}": (slots, 2, heads.kv, heads.size) for i, heads in enumerate(self.heads)}


def stream(model: ov.Model) -> list[ov.Output]:
    """Return the residual stream after each layer of a graph that is not paged. Raises InputError."""
    attentions = sum(node.get_type_name() == "ScaledDotProductAttention" for node in model.get_ops())
    try:
        found = layer_outputs(model)
    except ExportError:  # its remedy is that of a drafter
        found = []
    if len(found) != attentions:
        raise InputError(f"this target's graph does not show where its {attentions} layers end: {REMEDY}")
    return found


def translate(
    outputs: list[ov.Output], count: int, mix: FeatureMix | None, *, capacity: int,
    kv_type: type[np.floating], compressed: bool,
) -> LayerGraph:  # fmt: skip
    """Return the first `count` layers of a paged graph. outputs: the residual stream after each layer.

    mix: of a drafter that reads features, which the graph returns in part. capacity: tokens of a text.
    kv_type: of keys and values. compressed: see `multiply`. Raises InputError for a target with operators that
    are not known.
    """
    graph = Builder()
    call = graph.input(CALL, np.int32, [sum(FIELDS.values())])
    parts = graph.split(call, [*FIELDS.values()], 0)
    rows = add_rows(graph, parts, graph.input(PREFIX, np.int64, [1]), capacity)
    translator = Translator(
        graph, {"input_ids": parts[0], "position_ids": parts[1]}, rows,
        capacity=capacity, kv_type=kv_type, compressed=compressed,
    )  # fmt: skip
    values, sizes_so_far, kernels = list[str](), list[int](), list[int]()
    for output in outputs[:count]:
        values.append(translator.value(output))
        sizes_so_far.append(total_bytes(graph.weights))
        kernels.append(graph.kernels)
    answers = graph.input(ANSWERS, np.int32, ["answers"])
    size = int(outputs[count - 1].get_partial_shape()[-1].get_length())
    sizes = {HIDDEN: size}
    returned = {HIDDEN: values[-1]}
    low, matrix = _mix_matrix(mix, count) if mix else ([], None)
    if mix and matrix:
        rows_of_layers = [values[layer] for layer in low]
        if mix.norm == "each":
            rows_of_layers = [_normed(graph, row, mix.eps) for row in rows_of_layers]
        row = graph.op("Concat", *rows_of_layers, axis=-1) if len(low) > 1 else rows_of_layers[0]
        returned[MIXED] = multiply(graph, row, matrix, compressed=compressed)
        sizes[MIXED] = matrix.shape[0]
    for name, value in returned.items():
        rows_of = graph.op("Gather", graph.reshape(value, -1, sizes[name]), answers, axis=0)
        graph.output(name, rows_of, np.float32, ["answers", sizes[name]])
    return LayerGraph(
        graph.model(), graph.weights, sizes, tuple(translator.heads), tuple(sizes_so_far), graph.embedding,
        tuple(kernels), graph.scratch, capacity, kv_type,
    )  # fmt: skip


def _mix_matrix(mix: FeatureMix, count: int) -> tuple[list[int], Compressed | None]:
    """Return which of the first `count` layers a mix reads, and their part of it, None if it reads none."""
    low, columns, scales = mix.quantized(0, count)
    if not low:
        return [], None
    return low, Compressed(8, columns.view(np.uint8) ^ np.uint8(0x80), scales, np.full(scales.shape, 128, np.uint8))


@dataclass(frozen=True)
class MixSize:
    """What a mix adds to a graph: bytes of weights, and `scratch` as in LayerGraph."""

    weights: int = 0
    scratch: int = 0

    @classmethod
    def of(cls, mix: FeatureMix, count: int, *, compressed: bool) -> MixSize:
        """Return the size of a mix's part of the first `count` layers."""
        graph = Builder()
        _, matrix = _mix_matrix(mix, count)
        if matrix:
            multiply(graph, "x", matrix, compressed=compressed)
        return cls(total_bytes(graph.weights), graph.scratch)


def _normed(graph: Builder, x: str, eps: float) -> str:
    """Divide rows by their root mean square."""
    square = graph.op("ReduceMean", graph.op("Mul", x, x), graph.ints(-1), keepdims=1)
    root = graph.op("Sqrt", graph.op("Add", square, graph.constant(np.array(eps, np.float32))))
    return graph.op("Div", x, root)


def cut(model: ov.Model, output: ov.Output) -> None:
    """Make the input HIDDEN take the place of `output` in a paged graph, which then has no layer before it.

    Raises InputError if anything else of these layers is read later.
    """
    from openvino import opset13 as ops

    hidden = ops.parameter(output.get_partial_shape(), np.float32, name=HIDDEN).output(0)
    hidden.get_tensor().set_names({HIDDEN})
    for reader in output.get_target_inputs():
        reader.replace_source_output(hidden)
    model.add_parameters([hidden.get_node()])
    reached = {node.get_friendly_name() for node in model.get_ordered_ops() if node.get_type_name() != "Parameter"}
    read = set[str]()
    for node in model.get_ordered_ops():
        if node.get_friendly_name() in reached:
            read |= {source.get_node().get_friendly_name() for source in node.input_values()}
    for parameter in model.get_parameters():
        if parameter.get_friendly_name() not in read:
            model.remove_parameter(parameter)
    if any("input_ids" in parameter.output(0).get_names() for parameter in model.get_parameters()):
        raise InputError(f"later layers of this target read the tokens again: {REMEDY}")
    model.validate_nodes_and_infer_types()
