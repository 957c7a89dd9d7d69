"""Layers that read one input become one layer, to the bit; what cannot lie in one weight stays apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from dovetail.exporter.target.convert import WeightOptions
from dovetail.exporter.target.export import TargetOptions, export_target, save_ir
from dovetail.exporter.target.fuse_projections import PARTS, fuse_projections
from dovetail.runtime.target.graph import add_tap, read_model
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.target.paged import PagedModel
from dovetail.runtime.tree.draft_tree import DraftTree

Shape = tuple[int, ...]
RNG = np.random.default_rng(0)
COLUMNS = 32
TREE = DraftTree(np.array([7, 8, 9, 10]), np.array([-1, 0, 0, 1]), np.zeros(4, np.float32))


def kinds(model: ov.Model) -> Counter[str]:
    return Counter(node.get_type_name() for node in model.get_ops())


def weight(
    rows: int, kind: str = "u8", *, groups: int = 1, zeros: Shape | None = None, scales: Shape | None = None
) -> ov.Output:
    """[rows, COLUMNS] as nncf stores it: integers, zero points (128 or 8 where they are not by rows) and scales."""
    shape = (rows, COLUMNS) if groups == 1 else (rows, groups, COLUMNS // groups)
    by_rows = (*shape[:-1], 1)
    value = ops.convert(integers(kind, shape), "f16")
    if kind.startswith("u"):
        value = ops.subtract(value, ops.convert(integers(kind, zeros or by_rows, same=zeros is not None), "f16"))
    value = ops.multiply(value, ops.constant((1 + RNG.random(scales or by_rows)).astype(np.float16) / 100))
    if groups > 1:
        value = ops.reshape(value, ops.constant(np.array([rows, COLUMNS])), False)
    return ops.convert(value, "f32").output(0)


def integers(kind: str, shape: Shape, same: bool = False) -> ov.Node:
    """Random ones of a type, or the middle of the type everywhere."""
    bits, low = int(kind[1:]), 0 if kind.startswith("u") else -(2 ** (int(kind[1:]) - 1))
    values = np.full(shape, 2 ** (bits - 1)) if same else RNG.integers(low, low + 2**bits, shape)
    return ov.op.Constant(getattr(ov.Type, kind), ov.Shape(shape), values.ravel().tolist())


def layers(*weights: ov.Output, bias: tuple[int, ...] = (), inputs: int = 1, transposed: bool = False) -> ov.Model:
    """A model of one layer for each weight; those in `bias` have one, and they read `inputs` inputs in turn."""
    given = [ops.parameter([-1, 1, COLUMNS], np.float32, name=f"x{i}") for i in range(inputs)]
    results = []
    for index, each in enumerate(weights):
        if transposed:
            value = ops.matmul(given[index % inputs], ops.transpose(each, ops.constant([1, 0])), False, False)
        else:
            value = ops.matmul(given[index % inputs], each, False, True)
        if index in bias:
            rows = each.get_shape()[0]
            value = ops.add(value, ops.constant(RNG.standard_normal((1, 1, rows)).astype(np.float32)))
        results.append(ops.result(ops.relu(value)))
    return ov.Model(results, given, "layers")


def reshaped(shape: Shape) -> ov.Output:
    """A weight of 16 rows whose zero points are stored as `shape`, all the same, and reshaped to a column."""
    zeros = ops.reshape(integers("u8", shape, same=True), ops.constant(np.array([*shape[:1], 1])), False)
    value = ops.subtract(ops.convert(integers("u8", (16, COLUMNS)), "f32"), ops.convert(zeros, "f32"))
    return ops.multiply(value, ops.constant(np.ones((16, 1), np.float32))).output(0)


def outputs(model: ov.Model) -> list[np.ndarray]:
    """In float32, without activations quantised."""
    config = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = ov.Core().compile_model(model, "CPU", config)
    rng = np.random.default_rng(1)
    given = [rng.standard_normal((5, 1, COLUMNS)).astype(np.float32) for _ in model.inputs]
    return [np.array(value) for value in compiled(given).values()]


@pytest.mark.parametrize(
    ("build", "groups"),
    [
        (lambda: layers(weight(16), weight(8), weight(8)), 1),
        (lambda: layers(weight(16), weight(8), bias=(0, 1)), 1),
        (lambda: layers(weight(16), weight(8), weight(4), weight(6), bias=(1, 2)), 2),  # with and without a bias
        (lambda: layers(weight(16, "i8"), weight(8, "i8")), 1),
        (lambda: layers(weight(16, groups=4), weight(8, groups=4)), 1),
        (lambda: layers(weight(16, "u4", groups=4), weight(6, "u4", groups=4)), 1),
        (lambda: layers(weight(16, "i4", groups=4), weight(5, "i4", groups=4)), 1),
        (lambda: layers(weight(4, "u4"), weight(2, "u4")), 1),
        (lambda: layers(weight(3, "u4"), weight(5, "u4")), 0),  # zero points of 3 rows end in the middle of a byte
        (lambda: layers(weight(COLUMNS), weight(COLUMNS)), 1),  # as many rows as columns
        (lambda: layers(weight(16, zeros=()), weight(8, zeros=())), 1),
        (lambda: layers(weight(16, zeros=(1, 1)), weight(8, zeros=(1, 1))), 1),
        (lambda: layers(weight(16, zeros=()), weight(8, zeros=(1, 1))), 0),
        (lambda: layers(weight(16, scales=(1, COLUMNS)), weight(8, scales=(1, COLUMNS))), 0),
        (lambda: layers(weight(COLUMNS, zeros=(COLUMNS,)), weight(COLUMNS, zeros=(COLUMNS,))), 0),
        (lambda: layers(reshaped((1,)), reshaped((1,))), 1),
        (lambda: layers(reshaped((16,)), reshaped((16,))), 0),
        (lambda: layers(weight(16), weight(8, "i8")), 0),
        (lambda: layers(weight(16, groups=4), weight(8, groups=2)), 0),
        (lambda: layers(weight(16), weight(8), inputs=2), 0),
        (lambda: layers(weight(16), weight(8), transposed=True), 0),
        (lambda: layers(weight(1), weight(1)), 0),
        (lambda: layers(weight(16)), 0),
    ],
)
def test_layers_of_one_input_and_form_become_one(build: Callable[[], ov.Model], groups: int) -> None:
    model = build()
    before, nodes = outputs(model) if groups else [], kinds(model)
    assert fuse_projections(model) == groups
    if not groups:
        assert kinds(model) == nodes
        return
    assert kinds(model)["VariadicSplit"] == groups and kinds(model)["MatMul"] < nodes["MatMul"]
    for ours, theirs in zip(outputs(model), before, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_outputs_of_the_model_and_the_head_stay() -> None:
    given = ops.parameter([-1, 1, COLUMNS], np.float32, name="x")
    heads = [ops.matmul(given, weight(rows), False, True) for rows in (16, 8, 4, 4)]
    for head, name in zip(heads, ("logits", "value"), strict=False):
        head.output(0).get_tensor().set_names({name})
    results = [*map(ops.result, heads[:2]), *(ops.result(ops.relu(head)) for head in heads[2:])]
    model = ov.Model(results, [given], "heads")
    assert fuse_projections(model, apart=heads[3]) == 0
    assert fuse_projections(model) == 1
    assert {name for output in model.outputs[:2] for name in output.get_names()} == {"logits", "value"}


def test_a_sum_that_is_not_alone_is_no_bias() -> None:
    given, results = ops.parameter([-1, 1, COLUMNS], np.float32, name="x"), []
    for rows in (16, 8):
        product = ops.matmul(given, weight(rows), False, True)
        row = ops.constant(RNG.standard_normal((1, 1, rows)).astype(np.float32))
        results += [ops.result(ops.relu(ops.add(product, row))), ops.result(ops.relu(product))]
    model = ov.Model(results, [given], "sums")
    before = outputs(model)
    assert fuse_projections(model) == 1
    for ours, theirs in zip(outputs(model), before, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_product_of_activations_is_no_layer() -> None:
    """However deep the graph above it."""
    given = [ops.parameter([4, COLUMNS], np.float32, name=name) for name in ("left", "right")]
    right: ov.Node = given[1]
    for _ in range(30):
        right = ops.multiply(right, right)  # two ways to each node above
    results = [ops.result(ops.relu(ops.matmul(given[0], right, False, True))) for _ in range(2)]
    assert fuse_projections(ov.Model(results, given, "products")) == 0


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
        seq = target.open()
        passes.append(target.prefill(seq, np.arange(40)).logits.copy())
        passes += map(np.copy, vars(target.verify({seq: TREE})[seq]).values())
    half = len(passes) // 2
    for ours, theirs in zip(passes[half:], passes[:half], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_four_bit_weights_are_fused(tiny_llama: Path, tmp_path: Path) -> None:
    options = TargetOptions(WeightOptions("int4", group_size=16, ratio=1.0, sym=False))
    export_target(str(tiny_llama), tmp_path / "pair", options=options)
    model = read_model(tmp_path / "pair/target/openvino_model.xml")
    fused = [node for node in model.get_ops() if PARTS in node.get_friendly_name()]
    assert len(fused) == 4
    stored = {constant_of(node.input_value(1)) for node in fused}
    assert stored == {"u4"}


def constant_of(value: ov.Output) -> str:
    """Type of the first constant that a weight is made of."""
    node = value.get_node()
    while node.get_type_name() != "Constant":
        node = node.input_value(0).get_node()
    return str(node.get_element_type().get_type_name())
