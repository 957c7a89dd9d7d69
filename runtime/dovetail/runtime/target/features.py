"""The target's features for a drafter: its last feature, or a mix with outputs of several blocks.

Axes: D feature size, H hidden size (the same), L further blocks that the drafter reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.errors import ExportError, IntegrityError
from dovetail.runtime.system.files import read_arrays
from dovetail.runtime.target.graph import FEATURES, find_head

if TYPE_CHECKING:
    import openvino as ov

    from dovetail.runtime.pair.manifest import DrafterFacts


@dataclass(frozen=True, eq=False)
class FeatureMix:
    """A drafter's addition to the last feature [.., H]: weighted outputs of blocks of the target.

    Each output is divided by its root mean square before.
    """

    layers: tuple[int, ...]  # L blocks of the target, 0 the first
    weight: NDArray[np.float32]  # [H, L * H]
    eps: float  # inside the root mean square

    def save(self, file: Path) -> None:
        """Write an .npz file with the weight in float16."""
        np.savez(file, layers=np.array(self.layers), weight=self.weight.astype(np.float16), eps=np.array(self.eps))

    @classmethod
    def load(cls, file: Path, facts: DrafterFacts) -> FeatureMix:
        """Read the mix of a drafter with these `facts`. Raises IntegrityError."""
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


# Operations between a constant and the node that uses it.
_AFTER_CONSTANT = {"Convert", "Reshape"}


def layer_outputs(model: ov.Model) -> list[ov.Output]:
    """Return the residual stream after each block of the target, first to last, each [.., H].

    The search walks back from the lm_head along the stream's additions, two for each block
    (attention, feed-forward). Raises ExportError if the graph has another structure.
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
    """Make "features" [.., (L + 1) * H] the outputs of `layers`, then the lm_head's input."""
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
        # OpenVINO fuses this form into one operation.
        square = ops.reduce_mean(ops.power(x, np.float32(2)), np.array([-1]), keep_dims=True)
        inverse = ops.divide(np.float32(1), ops.sqrt(ops.add(square, np.float32(mix.eps))))
        normed.append(ops.multiply(ops.constant(np.ones(mix.weight.shape[0], np.float32)), ops.multiply(x, inverse)))
    values, scales = quantize_rows(mix.weight)  # INT8 like the target's own: every pass reads it
    weight = ops.multiply(ops.convert(ops.constant(values), "f32"), ops.constant(scales))
    mixed = ops.matmul(ops.concat(normed, -1), weight, False, True)
    _replace_tap(model, ops.add(last, mixed).output(0))


def quantize_rows(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return values [N, C] int8 and scales [N, 1] float32, whose product is near weight [N, C]."""
    scales = np.maximum(np.abs(weight).max(axis=1, keepdims=True), np.finfo(np.float32).tiny) / 127
    return np.rint(weight / scales).astype(np.int8), scales.astype(np.float32)


def _layers(model: ov.Model, layers: Sequence[int]) -> list[ov.Output]:
    found = layer_outputs(model)
    if missing := [layer for layer in layers if not 0 <= layer < len(found)]:
        raise ExportError(f"layer {missing[0]} is none of the target's {len(found)}: train the drafter again")
    return [found[layer] for layer in layers]


def _replace_tap(model: ov.Model, value: ov.Output) -> None:
    """Make the output "features" carry `value`."""
    from openvino import opset13 as ops

    old = next(result for result in model.get_results() if FEATURES in result.input_value(0).get_names())
    tensor = old.input_value(0).get_tensor()
    tensor.set_names(tensor.get_names() - {FEATURES})
    model.remove_result(old)
    value.get_tensor().set_names({FEATURES})
    model.add_results([ops.result(value.get_node())])


def _addition_before(node: ov.Node) -> ov.Node | None:
    """Return the last addition of two computed branches before the final norm and the lm_head."""
    pending = [node]
    while pending:
        node = pending.pop(0)
        if _adds_two_branches(node):
            return node
        pending += [value.get_node() for value in node.input_values()]
    return None


def _adds_two_branches(node: ov.Node) -> bool:
    """Return whether `node` adds two inputs that depend on tokens: no bias, epsilon or scale."""
    if node.get_type_name() != "Add":
        return False
    return not any(_is_constant(value.get_node()) for value in node.input_values())


def _is_constant(node: ov.Node) -> bool:
    while node.get_type_name() in _AFTER_CONSTANT:
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")
