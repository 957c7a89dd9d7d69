"""Graph surgery on OpenVINO IRs: add the feature tap, turn a stateful IR into a tree verifier.

Axes: T new tokens of all sequences, R rows whose logits are wanted, V vocabulary, D feature size.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dovetail.runtime.errors import ExportError
from dovetail.runtime.target.experts import find_mixtures

if TYPE_CHECKING:
    import openvino as ov


FEATURES = "features"
LOGITS = "logits"
SAMPLED = "sampled_tokens_indices"
PATH_ROWS = "path_rows"
NODE_ROWS = "node_rows"
EXPERT_ROWS, ROW_EXPERTS = "expert_rows", "row_experts"
# Inputs of a graph whose first layers run elsewhere: the hidden states behind them, and their share of the features.
HIDDEN, MIXED = "hidden", "mixed"
# Operations between the lm_head's MatMul and the logits: casts, a bias, scaling, soft-capping.
_AFTER_HEAD = {"Convert", "Add", "Multiply", "Divide", "Tanh"}


def find_head(model: ov.Model) -> ov.Node:
    """Return the MatMul of the lm_head. Its first input is the feature that drafters read.

    Raises ExportError if the graph has no "logits" output fed by a MatMul.
    """
    for result in model.outputs:
        if LOGITS not in result.get_names():
            continue
        node = result.node.input_value(0).get_node()
        while node.get_type_name() in _AFTER_HEAD:
            node = node.input_value(0).get_node()
        if node.get_type_name() == "MatMul":
            return node
        raise ExportError(
            f"no tap point: the logits come from {node.get_type_name()} {node.get_friendly_name()!r}, not from an "
            "lm_head MatMul: export the model with task text-generation-with-past"
        )
    names = ", ".join(sorted(name for o in model.outputs for name in o.get_names())) or "none"
    raise ExportError(
        f"no tap point: the graph has no 'logits' output (it has: {names}): export a causal language model"
    )


def add_tap(model: ov.Model) -> str:
    """Add the output "features" [.., D], the lm_head's input. Return the tapped node's name."""
    from openvino import opset13 as ops

    feature = find_head(model).input_value(0)
    name: str = feature.get_node().get_friendly_name()
    if not has_tap(model):
        # A Result on the feature itself would take over names that its tensor may already have.
        tap = ops.convert(feature, "f32")
        tap.output(0).get_tensor().set_names({FEATURES})
        model.add_results([ops.result(tap)])
    return name


def has_tap(model: ov.Model) -> bool:
    """Return whether the graph already has the "features" output."""
    return any(FEATURES in output.get_names() for output in model.outputs)


def read_model(xml: Path) -> ov.Model:
    """Read an IR. Raises ExportError in one line if OpenVINO cannot read the file."""
    import openvino as ov

    try:
        return ov.Core().read_model(xml)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ExportError(f"cannot read the OpenVINO IR {xml}: {reason}: export it again") from error


def to_paged(model: ov.Model) -> None:
    """Turn a stateful IR with a tap into a paged tree verifier, in place.

    The new inputs are flat `input_ids` and `position_ids` [T], block tables, and tables of rows.
    `sampled_tokens_indices` [R] selects the rows that reach the lm_head: logits are [R, 1,
    V], while features stay [T, 1, D]. `path_rows` [A] names the row of T that each attention row
    copies. `node_rows` [T] names the attention row whose output each row of T takes. A node that
    several paths share is thus one row everywhere except in the attention, where every path has a
    copy. A mixture of experts has two more: `expert_rows` [U] names the rows of T whose experts are
    computed, and `row_experts` [T] says which of the results each row of T takes. Dovetail converts
    at every load. A saved paged IR loses runtime information that the CPU plugin needs, and the
    operator's inputs change between releases. Raises ExportError for a graph without attention that
    can be paged.
    """
    from openvino._offline_transformations import paged_attention_transformation

    paged_attention_transformation(model, False, False, False, False, False, False, False)
    head = find_head(model)
    rows = _index_input(SAMPLED, np.int64)
    head.input(0).replace_source_output(_rows_of(head.input_value(0), rows))
    path_rows, node_rows = _index_input(PATH_ROWS, np.int32), _index_input(NODE_ROWS, np.int32)
    attentions = [node for node in model.get_ops() if node.get_type_name() == "PagedAttentionExtension"]
    if not attentions:
        raise ExportError("the graph has no attention with a KV cache: export a causal language model with its cache")
    for attention in attentions:
        readers = attention.output(0).get_target_inputs()
        for tokens in range(3):  # query, key, value: [T, heads * size]
            attention.input(tokens).replace_source_output(_rows_of(attention.input_value(tokens), path_rows))
        gathered = _rows_of(attention.output(0), node_rows)
        for reader in readers:
            reader.replace_source_output(gathered)
    added = [rows, path_rows, node_rows]
    if mixtures := [*find_mixtures(model)]:
        expert_rows, row_experts = _index_input(EXPERT_ROWS, np.int32), _index_input(ROW_EXPERTS, np.int32)
        added += [expert_rows, row_experts]
    for mixture in mixtures:
        readers = mixture.output.get_target_inputs()
        for each in mixture.inputs:
            each.replace_source_output(_rows_of(each.get_source_output(), expert_rows))
        for reader in readers:
            reader.replace_source_output(_rows_of(mixture.output, row_experts))
    model.add_parameters([node.get_node() for node in added])
    model.validate_nodes_and_infer_types()


def _index_input(name: str, kind: type[np.integer[Any]]) -> ov.Output:
    """Return a new input for any number of row numbers."""
    from openvino import opset13 as ops

    output = ops.parameter([-1], kind, name=name).output(0)
    output.get_tensor().set_names({name})
    return output


def _rows_of(value: ov.Output, rows: ov.Output) -> ov.Output:
    from openvino import opset13 as ops

    return ops.gather(value, rows, ops.constant(np.int64(0))).output(0)
