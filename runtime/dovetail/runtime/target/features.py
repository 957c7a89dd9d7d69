"""The target's features for a drafter: its last feature, or a mix with outputs of several blocks.

Axes: D feature size, H hidden size (the same), L further blocks that the drafter reads.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.errors import ExportError, InputError, IntegrityError
from dovetail.runtime.system.files import read_arrays
from dovetail.runtime.target.graph import FEATURES, MIXED, find_head

if TYPE_CHECKING:
    import openvino as ov

    from dovetail.runtime.pair.manifest import DrafterFacts, Manifest


@dataclass(frozen=True, eq=False)
class FeatureMix:
    """How a drafter's feature [.., D] is made of outputs of blocks of the target.

    layers: L blocks of the target, 0 the first. weight: [D, L * H] float32, over the outputs side by
    side. norm: "each" divides every output by its root mean square, "all" divides the row of all
    outputs by its own, "none" does neither; eps stands inside the root. adds_last: whether the last
    feature, the lm_head's input, is added; D is then H.
    """

    layers: tuple[int, ...]
    weight: NDArray[np.float32]
    eps: float
    norm: str = "each"
    adds_last: bool = True

    def quantized(self, begin: int, end: int) -> tuple[list[int], NDArray[np.int8], NDArray[np.float32]]:
        """Return the layers from `begin` up to `end`, and their part of the weight as in `quantize_rows`."""
        taken = [index for index, layer in enumerate(self.layers) if begin <= layer < end]
        values, scales = quantize_rows(self.weight)
        columns = values.reshape(len(values), len(self.layers), -1)[:, taken].reshape(len(values), -1)
        return [self.layers[index] for index in taken], columns, scales

    @classmethod
    def of_pair(cls, pair: Path, manifest: Manifest) -> FeatureMix | None:
        """Read the mix of a pair's drafter, None if it has none. Raises IntegrityError."""
        facts = manifest.drafter
        name = facts.files.get("features") if facts else None
        return cls.load(pair / name, facts) if facts and name else None

    def save(self, file: Path) -> None:
        """Write an .npz file with the weight in float16."""
        np.savez(
            file, layers=np.array(self.layers), weight=self.weight.astype(np.float16), eps=np.array(self.eps),
            norm=np.array(NORMS.index(self.norm)), adds_last=np.array(self.adds_last),
        )  # fmt: skip

    @classmethod
    def load(cls, file: Path, facts: DrafterFacts) -> FeatureMix:
        """Read the mix of a drafter with these `facts`. Raises IntegrityError."""
        remedy = "export the drafter again"
        names = ("layers", "weight", "eps", "norm", "adds_last")
        older = {"norm": np.array(NORMS.index("each")), "adds_last": np.array(True)}
        layers, weight, eps, norm, adds_last = read_arrays(file, names, IntegrityError, remedy, older)
        kinds = layers.dtype.kind, weight.dtype.kind, eps.dtype.kind, norm.dtype.kind, adds_last.dtype.kind
        if layers.ndim != 1 or eps.ndim or norm.ndim or adds_last.ndim or "".join(kinds) not in ("iffib", "uffib"):
            raise IntegrityError(f"{file} does not hold layers, a weight, eps, norm and adds_last: {remedy}")
        if weight.shape != (facts.feature_size, len(layers) * facts.reads_size):
            raise IntegrityError(f"{file} holds a weight {weight.shape} for {len(layers)} layers: {remedy}")
        if tuple(layers) != facts.feature_layers:
            raise IntegrityError(f"{file} is for layers {layers.tolist()}, not {[*facts.feature_layers]}: {remedy}")
        if not (np.isfinite(weight).all() and 0 < eps < 1 and 0 <= norm < len(NORMS)):
            raise IntegrityError(f"{file} holds numbers that are not finite, or eps {float(eps)}: {remedy}")
        if adds_last and facts.feature_size != facts.reads_size:
            raise IntegrityError(f"{file} adds features of {facts.feature_size} and {facts.reads_size}: {remedy}")
        blocks = tuple(int(layer) for layer in layers)
        return cls(blocks, weight.astype(np.float32), float(eps), NORMS[int(norm)], bool(adds_last))


NORMS = ("none", "each", "all")  # a file holds the index

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


def mix_tap(model: ov.Model, mix: FeatureMix, first: int = 0) -> None:
    """Make "features" [.., D] the `mix` of the target's layers.

    first: layers that run elsewhere; the input MIXED is their share of the features. Raises InputError if the mix has
    no such share.
    """
    from openvino import opset13 as ops

    if mix.norm == "all" and min(mix.layers) < first:
        raise InputError(
            f"the drafter reads layer {min(mix.layers)} normed with others: give --gpu-layers {min(mix.layers)} or less"
        )
    layers, values, scales = mix.quantized(first, sys.maxsize)  # INT8 like the target's own: every pass reads it
    mixed = None
    if layers:
        outputs = [ops.convert(output, "f32") for output in _layers(model, layers)]
        if mix.norm == "each":
            outputs = [_normed(output, mix.weight.shape[1] // len(mix.layers), mix.eps) for output in outputs]
        row = ops.concat(outputs, -1)
        if mix.norm == "all":
            row = _normed(row, mix.weight.shape[1], mix.eps)
        weight = ops.multiply(ops.convert(ops.constant(values), "f32"), ops.constant(scales))
        mixed = ops.matmul(row, weight, False, True)
    if len(layers) < len(mix.layers):
        share = ops.parameter([-1, -1, len(mix.weight)], np.float32, name=MIXED)
        share.output(0).get_tensor().set_names({MIXED})
        model.add_parameters([share])
        mixed = ops.add(mixed, share) if mixed else share
    assert mixed
    if mix.adds_last:
        mixed = ops.add(ops.convert(find_head(model).input_value(0), "f32"), mixed)
    _replace_tap(model, mixed.output(0))


def _normed(x: ov.Node, size: int, eps: float) -> ov.Node:
    """`x` [.., size] divided by its root mean square, in the form that OpenVINO fuses into one operation."""
    from openvino import opset13 as ops

    square = ops.reduce_mean(ops.power(x, np.float32(2)), np.array([-1]), keep_dims=True)
    inverse = ops.divide(np.float32(1), ops.sqrt(ops.add(square, np.float32(eps))))
    return ops.multiply(ops.constant(np.ones(size, np.float32)), ops.multiply(x, inverse))


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
