"""Reads the rows of embedding and lm_head from a target's OpenVINO IR, for its drafter.

OpenVINO decompresses every weight format itself. Axes: V target vocabulary, H hidden size.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.errors import ExportError
from dovetail.runtime.target.graph import find_head, read_model

if TYPE_CHECKING:
    import openvino as ov

FloatArray = NDArray[np.float32]

# The axis of a table that positions index.
_TABLE_AXES = {"Gather": 0, "GatherElements": 1}
_POSITIONS = {"position_ids", "attention_mask"}
# Operations that may lie between `input_ids` and the embedding's Gather.
_BEFORE_GATHER = {"Convert", "Reshape", "Unsqueeze", "Squeeze"}


def read_embedding_and_head(ir_xml: Path) -> tuple[FloatArray, FloatArray]:
    """The target's embedding table and lm_head, both [V, H] float32, decompressed.

    Tied weights give two equal arrays, or the same array twice if the IR shares the constant.
    Raises ExportError if the IR cannot be read, has no lm_head MatMul or no embedding Gather.
    """
    model = read_model(Path(ir_xml))
    gather = _find_embedding(model)
    head = find_head(model)
    embed = evaluate_constant(gather.input_value(0), ir_xml)
    shared = gather.input_value(0) == head.input_value(1)
    rows = embed if shared else evaluate_constant(head.input_value(1), ir_xml)
    if not head.get_attributes()["transpose_b"]:
        rows = np.ascontiguousarray(rows.T)
    if embed.ndim != 2 or embed.shape != rows.shape:
        raise ExportError(
            f"embedding {embed.shape} and lm_head {rows.shape} of {ir_xml} do not match, "
            "and a drafter needs rows of both: choose another model"
        )
    return embed, rows


def position_rows(model: ov.Model) -> int | None:
    """Rows of the smallest table (learned embeddings, sines) that positions index; None without.

    A position beyond the table reads foreign memory.
    """
    rows = [
        int(node.get_input_partial_shape(0)[axis].get_length())
        for node in model.get_ops()
        if (axis := _TABLE_AXES.get(node.get_type_name())) is not None
        and _is_table(node.input_value(0).get_node())
        and any(_POSITIONS & port.output(0).get_names() for port in _parameters(node.input_value(1).get_node()))
    ]
    return min(rows, default=None)


def _is_table(node: ov.Node) -> bool:
    """Whether a table consists of constants; a Tile may repeat the table any number of times."""
    if node.get_type_name() == "Tile":
        return _is_table(node.input_value(0).get_node())
    return node.get_type_name() == "Constant" or (
        bool(node.input_values()) and all(_is_table(value.get_node()) for value in node.input_values())
    )


def _parameters(node: ov.Node) -> list[ov.Node]:
    """The graph inputs that `node` depends on."""
    found: dict[str, ov.Node] = {}
    pending = [node]
    while pending:
        node = pending.pop()
        if node.get_friendly_name() not in found:
            found[node.get_friendly_name()] = node
            pending += [value.get_node() for value in reversed(node.input_values())]
    return [node for node in found.values() if node.get_type_name() == "Parameter"]


def _find_embedding(model: ov.Model) -> ov.Node:
    """The Gather that `input_ids` indexes."""
    pending = [port for port in model.inputs if "input_ids" in port.get_names()]
    while pending:
        for consumer in pending.pop().get_target_inputs():
            node = consumer.get_node()
            if node.get_type_name() == "Gather" and consumer.get_index() == 1:
                return node
            if node.get_type_name() in _BEFORE_GATHER:
                pending.append(node.output(0))
    raise ExportError("the target's graph has no embedding that 'input_ids' indexes: export it from its checkpoint")


def evaluate_constant(output: ov.Output, ir_xml: Path) -> FloatArray:
    """Value of a subgraph of constants, float32. Raises ExportError if an input decides it."""
    import openvino as ov
    from openvino import opset13 as ops

    for parameter in _parameters(output.get_node()):
        raise ExportError(
            f"weights of {ir_xml} depend on input {parameter.get_friendly_name()!r}: "
            "export the target from its checkpoint"
        )
    model = ov.Model([ops.result(ops.convert(output, "f32"))], [], "weights")
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled([])[0], dtype=np.float32)
