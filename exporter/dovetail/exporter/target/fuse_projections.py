"""Fuses quantised layers that read the same input: query, key and value; gate and up.

Every layer quantises its input again and waits for all threads, which takes much of a pass in
narrow models. Each row of a weight has its own scales, so the sums stay the same
(docs/results/passes.md). Axes: N rows (outputs) of a layer, K columns (inputs).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import openvino as ov

_FOUR_BITS = {"u4", "i4"}
_INTEGERS = {"u8", "i8", *_FOUR_BITS}
# These operations make float weights from integers: values less zero points, times scales, and a
# reshape for groups.
_DEQUANTISING = {"Constant", "Convert", "Subtract", "Multiply", "Reshape"}
PARTS = "+"  # joins the names of fused layers


@dataclass(frozen=True)
class _Projection:
    """A quantised layer: x [.., K] -> x W^T + bias [.., N]. Equal forms can be stacked."""

    matmul: ov.Node
    bias: ov.Node | None  # the Add that follows the MatMul
    rows: int
    form: Hashable

    @property
    def output(self) -> ov.Output:
        return (self.bias or self.matmul).output(0)


def fuse_projections(model: ov.Model, apart: ov.Node | None = None) -> int:
    """Fuse the quantised layers that share an input into one layer and a split; count the groups.

    apart: the MatMul of a layer that stays alone, such as the lm_head. A layer also stays alone if
    its weight is floating point, is transposed, has one row, or has no equal format in the group. So
    does a layer whose product is an output of the model, or whose weight comes from operations that
    OpenVINO's quantisation does not use.
    """
    groups: dict[Hashable, list[_Projection]] = defaultdict(list)
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul" and node != apart and (found := _projection(node)):
            source = node.input_value(0)
            groups[source.get_node().get_name(), source.get_index(), found.form].append(found)
    fused = [group for group in groups.values() if len(group) > 1]
    for group in fused:
        _fuse(group)
    if fused:
        model.validate_nodes_and_infer_types()
    return len(fused)


def _fuse(group: Sequence[_Projection]) -> None:
    from openvino import opset13 as ops

    first = group[0]
    weight = _stacked([each.matmul.input_value(1) for each in group], 0)
    total: ov.Node = ops.matmul(first.matmul.input_value(0), weight, False, True)
    total.set_friendly_name(PARTS.join(each.matmul.get_friendly_name() for each in group))
    if first.bias:
        total = ops.add(total, _stacked([each.bias.input_value(1) for each in group if each.bias], -1))
    sizes = np.array([each.rows for each in group], np.int64)
    parts = ops.variadic_split(total, ops.constant(np.int64(-1)), ops.constant(sizes))
    for index, each in enumerate(group):
        for reader in list(each.output.get_target_inputs()):
            reader.replace_source_output(parts.output(index))


def _projection(matmul: ov.Node) -> _Projection | None:
    """The layer of `matmul`; None if the layer cannot be fused."""
    attributes, weight = matmul.get_attributes(), matmul.input_value(1)
    shape = weight.get_partial_shape()
    if attributes["transpose_a"] or not attributes["transpose_b"] or shape.is_dynamic or len(shape) != 2:
        return None
    rows = shape[0].get_length()
    if rows < 2 or not _stackable(weight, rows):
        return None
    bias = _bias(matmul, rows)
    found = _Projection(matmul, bias, rows, (_form(weight, 0), _form(bias.input_value(1), -1) if bias else None))
    read = {reader.get_node().get_type_name() for reader in found.output.get_target_inputs()}
    return None if "Result" in read else found


def _stackable(weight: ov.Output, rows: int) -> bool:
    """Whether `weight` is quantised, and each constant has values per row or one value for all."""
    nodes = _nodes_before(weight)
    constants = [node for node in nodes if node.get_type_name() == "Constant"]
    for node in nodes:
        if node.get_type_name() not in _DEQUANTISING:
            return False
        if node.get_type_name() == "Reshape":
            before, target = node.input_values()
            constants = [each for each in constants if each != target.get_node()]
            if _by_rows(before, 0) and before.get_shape()[0] != rows:
                return False
    stored = {node.get_element_type().get_type_name() for node in constants}
    for node in constants:
        shape = [*node.get_output_shape(0)]
        count, half_bytes = int(np.prod(shape)), node.get_element_type().get_type_name() in _FOUR_BITS
        if count > 1 and (len(shape) < 2 or shape[0] != rows or (half_bytes and count % 2)):
            return False
    return bool(stored & _INTEGERS)


def _bias(matmul: ov.Node, rows: int) -> ov.Node | None:
    """The Add of a constant [.., 1, N] that is the only reader of the product; or None."""
    readers = list(matmul.output(0).get_target_inputs())
    node = readers[0].get_node() if len(readers) == 1 and readers[0].get_index() == 0 else None
    if node is None or node.get_type_name() != "Add":
        return None
    bias = node.input_value(1)
    if any(before.get_type_name() not in {"Constant", "Convert"} for before in _nodes_before(bias)):
        return None
    shape = [*bias.get_shape()]
    return node if shape[-1:] == [rows] == [size for size in shape if size != 1] else None


def _nodes_before(value: ov.Output) -> list[ov.Node]:
    """The node of `value` and its sources, down to nodes that are no part of a dequantisation."""
    found: dict[str, ov.Node] = {}
    pending = [value.get_node()]
    while pending:
        node = pending.pop()
        if node.get_name() not in found and node.get_type_name() in _DEQUANTISING:
            pending += [before.get_node() for before in node.input_values()]
        found[node.get_name()] = node
    return list(found.values())


def _form(value: ov.Output, axis: int) -> Hashable:
    """The form of a weight [N, ..] (axis 0) or bias [.., N] (axis -1), independent of N.

    Values of equal form come from equal operations and constants, and can be stacked.
    """
    node, kind = value.get_node(), (value.get_node().get_type_name(), value.get_element_type().get_type_name())
    if kind[0] == "Constant":
        shape = [*value.get_shape()]
        if not _by_rows(value, axis):
            return kind, tuple(shape), node.data.tobytes()
        shape[axis] = 0
        return kind, tuple(shape)
    before = node.input_values()[:1] if kind[0] == "Reshape" else node.input_values()  # the second input is the shape
    return kind, tuple(_form(each, axis) for each in before)


def _by_rows(value: ov.Output, axis: int) -> bool:
    """Whether `value` has an entry per row of its layer, instead of one entry for all rows."""
    shape = [*value.get_shape()]
    return bool(shape) and shape[axis] > 1


def _stacked(values: Sequence[ov.Output], axis: int) -> ov.Output:
    """Stack weights or biases of one form; an entry for all rows stays the same."""
    import openvino as ov
    from openvino import opset13 as ops

    if not _by_rows(values[0], axis):
        return values[0]
    nodes, shape = [value.get_node() for value in values], [*values[0].get_shape()]
    shape[axis] = sum([*value.get_shape()][axis] for value in values)
    kind, element = nodes[0].get_type_name(), values[0].get_element_type()
    if kind == "Constant":
        stored = np.concatenate([node.data.reshape(-1).view(np.uint8) for node in nodes])  # 4-bit values are packed
        tensor = ov.Tensor(stored, ov.Shape(shape), element)
        return ov.op.Constant(tensor, shared_memory=False).output(0)  # a copy, because `stored` is local
    if kind == "Reshape":
        first = _stacked([node.input_value(0) for node in nodes], axis)
        return ops.reshape(first, ops.constant(np.array(shape, np.int64)), special_zero=False).output(0)
    first, *others = (_stacked(column, axis) for column in zip(*(n.input_values() for n in nodes), strict=True))
    if kind == "Convert":
        return ops.convert(first, element).output(0)
    return {"Subtract": ops.subtract, "Multiply": ops.multiply}[kind](first, *others).output(0)
