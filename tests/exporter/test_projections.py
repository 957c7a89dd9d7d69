"""Layers that read one input become one layer, to the bit; what cannot lie in one weight stays apart."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from dovetail.exporter.projections import fuse_projections
from dovetail.exporter.target import TargetOptions, export_target, save_ir
from dovetail.exporter.weights import WeightOptions
from dovetail.runtime.graph import add_tap, read_model
from dovetail.runtime.openvino_target import OpenVINOTarget
from dovetail.runtime.paged import PagedModel
from dovetail.runtime.tree import DraftTree

RNG = np.random.default_rng(0)
COLUMNS = 32
TREE = DraftTree(np.array([7, 8, 9, 10]), np.array([-1, 0, 0, 1]), np.zeros(4, np.float32))


def kinds(model: ov.Model) -> Counter[str]:
    return Counter(node.get_type_name() for node in model.get_ops())


def weight(rows: int, *, signed: bool = False, groups: int = 1, zero: int | None = None) -> ov.Output:
    """[rows, COLUMNS] as nncf stores it: integers, zero points of rows (or one for all, or none) and scales."""
    shape = (rows, COLUMNS) if groups == 1 else (rows, groups, COLUMNS // groups)
    scales = (*shape[:-1], 1)
    stored = RNG.integers(-8, 8, shape, np.int8) if signed else RNG.integers(0, 256, shape, np.uint8)
    value = ops.convert(ops.constant(stored), "f16")
    if not signed:
        zeros = RNG.integers(100, 150, scales, np.uint8) if zero is None else np.uint8(zero)
        value = ops.subtract(value, ops.convert(ops.constant(zeros), "f16"))
    value = ops.multiply(value, ops.constant(RNG.random(scales).astype(np.float16) / 100))
    if groups > 1:
        value = ops.reshape(value, ops.constant(np.array([rows, COLUMNS])), False)
    return ops.convert(value, "f32").output(0)


def layers(*weights: ov.Output, bias: tuple[int, ...] = (), inputs: int = 1) -> ov.Model:
    """A model of one layer for each weight; those in `bias` have one, and they read `inputs` inputs in turn."""
    given = [ops.parameter([-1, 1, COLUMNS], np.float32, name=f"x{i}") for i in range(inputs)]
    results = []
    for index, each in enumerate(weights):
        value = ops.matmul(given[index % inputs], each, False, True)
        if index in bias:
            rows = each.get_shape()[0]
            value = ops.add(value, ops.constant(RNG.standard_normal((1, 1, rows)).astype(np.float32)))
        results.append(ops.result(value))
    return ov.Model(results, given, "layers")


def outputs(model: ov.Model) -> list[np.ndarray]:
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    rng = np.random.default_rng(1)
    given = [rng.standard_normal((5, 1, COLUMNS)).astype(np.float32) for _ in model.inputs]
    return [np.array(value) for value in compiled(given).values()]


@pytest.mark.parametrize(
    ("model", "groups"),
    [
        (lambda: layers(weight(16), weight(8), weight(8)), 1),
        (lambda: layers(weight(16), weight(8), bias=(0, 1)), 1),
        (lambda: layers(weight(16), weight(8), weight(4), weight(6), bias=(1, 2)), 2),  # with and without a bias
        (lambda: layers(weight(16, signed=True), weight(8, signed=True)), 1),
        (lambda: layers(weight(16, groups=4), weight(8, groups=4)), 1),
        (lambda: layers(weight(COLUMNS), weight(COLUMNS)), 1),  # as many rows as columns
        (lambda: layers(weight(16, zero=128), weight(8, zero=128)), 1),
        (lambda: layers(weight(16, zero=128), weight(8, zero=127)), 0),  # one zero point cannot be two
        (lambda: layers(weight(16), weight(8, signed=True)), 0),
        (lambda: layers(weight(16, groups=4), weight(8, groups=2)), 0),
        (lambda: layers(weight(16), weight(8), inputs=2), 0),
        (lambda: layers(weight(1), weight(1)), 0),
        (lambda: layers(weight(16)), 0),
    ],
)
def test_layers_of_one_input_and_form_become_one(model: object, groups: int) -> None:
    built: ov.Model = model()  # type: ignore[operator]
    before, products = outputs(built), kinds(built)["MatMul"]
    assert fuse_projections(built) == groups
    assert kinds(built)["VariadicSplit"] == groups
    assert kinds(built)["MatMul"] == products if not groups else kinds(built)["MatMul"] < products
    for ours, theirs in zip(outputs(built), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_float_weights_stay_apart(stored: type[np.floating]) -> None:
    def floats(rows: int) -> ov.Output:
        value = ops.constant(RNG.standard_normal((rows, COLUMNS)).astype(stored))
        return (value if stored is np.float32 else ops.convert(value, "f32")).output(0)

    assert fuse_projections(layers(floats(4), floats(4))) == 0


def test_target_is_fused_and_decides_as_before_to_the_bit(plain_ir: Path, tiny_target: Path, tmp_path: Path) -> None:
    apart = read_model(plain_ir / "openvino_model.xml")
    add_tap(apart)
    save_ir(apart, tmp_path / "apart.xml")
    fused = read_model(tiny_target / "openvino_model.xml")
    assert kinds(apart)["MatMul"] - kinds(fused)["MatMul"] == 2 * (2 + 1)  # two blocks: q, k, v and gate, up
    assert fuse_projections(fused) == 0

    passes = []
    for xml in (tmp_path / "apart.xml", tiny_target / "openvino_model.xml"):
        target = OpenVINOTarget(PagedModel(xml), 256)
        passes += [target.prefill(np.arange(40)).logits.copy(), *map(np.copy, vars(target.verify(TREE)).values())]
    half = len(passes) // 2
    for ours, theirs in zip(passes[half:], passes[:half], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_four_bit_weights_are_fused(tiny_llama: Path, tmp_path: Path) -> None:
    options = TargetOptions(WeightOptions("int4", group_size=16, ratio=1.0, sym=False))
    export_target(str(tiny_llama), tmp_path / "pair", options=options)
    model = read_model(tmp_path / "pair/target/openvino_model.xml")
    fused = [node for node in model.get_ops() if node.get_friendly_name().endswith("/fused")]
    assert len(fused) == 4
    stored = {constant_of(node.input_value(1)) for node in fused}
    assert stored == {"u4"}


def constant_of(value: ov.Output) -> str:
    """Type of the first constant that a weight is made of."""
    node = value.get_node()
    while node.get_type_name() != "Constant":
        node = node.input_value(0).get_node()
    return str(node.get_element_type().get_type_name())
