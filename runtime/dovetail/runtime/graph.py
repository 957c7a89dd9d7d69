"""Graph surgery on OpenVINO IRs: find and add the feature tap, turn a stateful IR into a tree verifier.

Axes: T new tokens of all sequences, R rows whose logits are wanted, V vocabulary, D feature size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import ExportError, IntegrityError
from .files import read_arrays

if TYPE_CHECKING:
    import openvino as ov

    from .manifest import DrafterFacts

FEATURES = "features"
LOGITS = "logits"
SAMPLED = "sampled_tokens_indices"
PATH_ROWS = "path_rows"
NODE_ROWS = "node_rows"
RT_INFO_TAP = ["dovetail", "tap"]


@dataclass(frozen=True, eq=False)
class FeatureMix:
    """What a drafter reads of the target besides its last feature.

    layers: L blocks of the target, 0 the first.  weight: [H, L * H] float32, applied to their outputs, each
    divided by its root mean square (eps inside), and added to the last feature [.., H].
    """

    layers: tuple[int, ...]
    weight: NDArray[np.float32]
    eps: float

    def save(self, file: Path) -> None:
        """Write an .npz, the weight in float16."""
        np.savez(file, layers=np.array(self.layers), weight=self.weight.astype(np.float16), eps=np.array(self.eps))

    @classmethod
    def load(cls, file: Path, facts: DrafterFacts) -> FeatureMix:
        """Read back what belongs to a drafter of these `facts`. Raises IntegrityError."""
        remedy = "export the drafter again"
        layers, weight, eps = read_arrays(file, ("layers", "weight", "eps"), IntegrityError, remedy)
        if layers.ndim != 1 or layers.dtype.kind not in "iu" or eps.ndim or weight.dtype.kind + eps.dtype.kind != "ff":
            raise IntegrityError(f"{file} does not hold layers, a weight and eps: {remedy}")
        if weight.shape != (facts.feature_size, len(layers) * facts.feature_size):
            raise IntegrityError(f"{file} holds a weight {weight.shape} for {len(layers)} layers: {remedy}")
        if tuple(layers) != facts.feature_layers:
            raise IntegrityError(f"{file} is for layers {layers.tolist()}, not {[*facts.feature_layers]}: {remedy}")
        if not (np.isfinite(weight).all() and 0 < eps < 1):
            raise IntegrityError(f"{file} holds numbers that are not finite, or eps {float(eps)}: {remedy}")
        return cls(tuple(int(layer) for layer in layers), weight.astype(np.float32), float(eps))


# What may stand between a constant and the node that uses it.
_AFTER_CONSTANT = {"Convert", "Reshape"}
# What may stand between the lm_head's MatMul and the logits: casts, a bias, scaling, soft-capping.
_AFTER_HEAD = {"Convert", "Add", "Multiply", "Divide", "Tanh"}


def find_head(model: ov.Model) -> ov.Node:
    """The MatMul of the lm_head; its first input is the feature that drafters read.

    Raises ExportError when the graph has no "logits" output fed by a MatMul.
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
    """Add the output "features" [.., D], the lm_head's input, once; returns the tapped node's name."""
    from openvino import opset13 as ops

    feature = find_head(model).input_value(0)
    name: str = feature.get_node().get_friendly_name()
    if not has_tap(model):
        # A node of its own: the tensor may carry other names already, and a Result's name is its tensor's.
        tap = ops.convert(feature, "f32")
        tap.output(0).get_tensor().set_names({FEATURES})
        model.add_results([ops.result(tap)])
        model.set_rt_info(name, RT_INFO_TAP)
    return name


def layer_outputs(model: ov.Model) -> list[ov.Output]:
    """The residual stream after each block of the target, first to last, each [.., H].

    Walks back from the lm_head along the additions that make the stream, two a block (attention, feed-forward).
    Raises ExportError when the graph is built in another way.
    """
    stream: list[ov.Output] = []
    node = _addition_before(find_head(model).input_value(0).get_node())
    while node is not None:
        stream.append(node.output(0))
        sources = [value.get_node() for value in node.input_values()]
        node = next((source for source in sources if _adds_two_branches(source)), None)
    if len(stream) < 2 or len(stream) % 2:
        raise ExportError(
            f"the graph's residual stream has {len(stream)} additions, not two a block: train a drafter with "
            "--last-feature for this target"
        )
    return stream[-2::-2]


def widen_tap(model: ov.Model, layers: Sequence[int]) -> None:
    """Make "features" [.., (L + 1) * H]: the outputs of `layers` (0 is the first block), then the lm_head's input."""
    from openvino import opset13 as ops

    last = find_head(model).input_value(0)
    parts = [ops.convert(output, "f32") for output in [*_layers(model, layers), last]]
    _replace_tap(model, ops.concat(parts, -1).output(0))


def mix_tap(model: ov.Model, mix: FeatureMix) -> None:
    """Make "features" [.., H] the lm_head's input plus `mix` of the target's layers."""
    from openvino import opset13 as ops

    last = ops.convert(find_head(model).input_value(0), "f32")
    normed = []
    for output in _layers(model, mix.layers):
        x = ops.convert(output, "f32")
        # In the form that OpenVINO fuses into one operation.
        square = ops.reduce_mean(ops.power(x, np.float32(2)), np.array([-1]), keep_dims=True)
        inverse = ops.divide(np.float32(1), ops.sqrt(ops.add(square, np.float32(mix.eps))))
        normed.append(ops.multiply(ops.constant(np.ones(mix.weight.shape[0], np.float32)), ops.multiply(x, inverse)))
    values, scales = quantize_rows(mix.weight)  # as the target's own weights: every pass reads them
    weight = ops.multiply(ops.convert(ops.constant(values), "f32"), ops.constant(scales))
    mixed = ops.matmul(ops.concat(normed, -1), weight, False, True)
    _replace_tap(model, ops.add(last, mixed).output(0))


def quantize_rows(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """weight [N, C] -> values [N, C] int8, scales [N, 1] float32, whose product is near it."""
    scales = np.maximum(np.abs(weight).max(axis=1, keepdims=True), np.finfo(np.float32).tiny) / 127
    return np.rint(weight / scales).astype(np.int8), scales.astype(np.float32)


def _layers(model: ov.Model, layers: Sequence[int]) -> list[ov.Output]:
    found = layer_outputs(model)
    if missing := [layer for layer in layers if not 0 <= layer < len(found)]:
        raise ExportError(f"layer {missing[0]} is none of the target's {len(found)}: train the drafter again")
    return [found[layer] for layer in layers]


def _replace_tap(model: ov.Model, value: ov.Output) -> None:
    """Let the output "features" carry `value` instead."""
    from openvino import opset13 as ops

    old = next(result for result in model.get_results() if FEATURES in result.input_value(0).get_names())
    tensor = old.input_value(0).get_tensor()
    tensor.set_names(tensor.get_names() - {FEATURES})
    model.remove_result(old)
    value.get_tensor().set_names({FEATURES})
    model.add_results([ops.result(value.get_node())])


def _addition_before(node: ov.Node) -> ov.Node | None:
    """The nearest addition of two computed branches on the way from the lm_head to the inputs: under the final norm."""
    pending = [node]
    while pending:
        node = pending.pop(0)
        if _adds_two_branches(node):
            return node
        pending += [value.get_node() for value in node.input_values()]
    return None


def _adds_two_branches(node: ov.Node) -> bool:
    """Whether `node` is an Add that is no bias, epsilon or scale: both of its inputs depend on the tokens."""
    if node.get_type_name() != "Add":
        return False
    return not any(_is_constant(value.get_node()) for value in node.input_values())


def _is_constant(node: ov.Node) -> bool:
    while node.get_type_name() in _AFTER_CONSTANT:
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")


def has_tap(model: ov.Model) -> bool:
    """Whether the graph already has the "features" output."""
    return any(FEATURES in output.get_names() for output in model.outputs)


def read_model(xml: Path) -> ov.Model:
    """Read an IR; an unreadable one raises ExportError in one line."""
    import openvino as ov

    try:
        return ov.Core().read_model(xml)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ExportError(f"cannot read the OpenVINO IR {xml}: {reason}: export it again") from error


def to_paged(model: ov.Model) -> None:
    """Turn a stateful IR with a tap into a paged tree verifier, in place.

    Afterwards the inputs are flat `input_ids` and `position_ids` [T], block tables, `sampled_tokens_indices` [R] that
    selects which rows reach the lm_head (logits [R, 1, V], while features stay [T, 1, D]), and two row tables around
    the attention.  `path_rows` [A] names the row of T that each attention row copies, `node_rows` [T] the attention
    row whose output each row of T takes.  A node that several paths share is thus one row everywhere but in the
    attention, where every path is a causal sequence of its own.
    Dovetail converts at every load: a saved paged IR loses runtime information that the CPU plugin needs, and the
    operator's inputs change between releases.  Raises ExportError for a graph without attention that can be paged.
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
    model.add_parameters([node.get_node() for node in (rows, path_rows, node_rows)])
    model.validate_nodes_and_infer_types()


def _index_input(name: str, kind: type[np.integer[Any]]) -> ov.Output:
    """A new input of row numbers, any number of them."""
    from openvino import opset13 as ops

    output = ops.parameter([-1], kind, name=name).output(0)
    output.get_tensor().set_names({name})
    return output


def _rows_of(value: ov.Output, rows: ov.Output) -> ov.Output:
    """The rows of `value` that `rows` names."""
    from openvino import opset13 as ops

    return ops.gather(value, rows, ops.constant(np.int64(0))).output(0)
