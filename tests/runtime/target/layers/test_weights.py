"""Weights of OpenVINO graphs keep their values: read, multiplied and looked up by ONNX Runtime, in any form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

ort = pytest.importorskip("onnxruntime")
ov = pytest.importorskip("openvino")
pytest.importorskip("onnx", reason="graphs are built")

from openvino import opset13 as ops

from dovetail.runtime.errors import InputError
from dovetail.runtime.target.layers.builder import Builder
from dovetail.runtime.target.layers.weights import Compressed, as_float32, look_up, multiply, read_matrix

ROWS, WIDTH, COUNT = 24, 128, 5  # outputs, inputs, rows of x

HELD: list[np.ndarray] = []  # memory of 4-bit constants, which OpenVINO does not copy


def compressed_output(kind: str, group: int, zero: str) -> Any:
    """A matrix as nncf compresses it. zero: points "each", one for "all" groups, or "none"."""
    rng = np.random.default_rng(3)
    bits, signed = int(kind[1]), kind[0] == "i"
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    grouped = group < WIDTH
    shape = [ROWS, WIDTH // group, group] if grouped else [ROWS, WIDTH]
    scale_shape = [ROWS, WIDTH // group, 1] if grouped else [ROWS, 1]
    zero_shape = {"each": scale_shape, "all": [1] * len(shape)}.get(zero)

    def packed(numbers: np.ndarray) -> Any:
        element = getattr(ov.Type, kind)
        if bits == 8:
            return ops.constant(numbers.astype(np.int8 if signed else np.uint8))
        flat = (numbers.reshape(-1) & 15).astype(np.uint8)
        flat = np.pad(flat, (0, len(flat) % 2))
        HELD.append(flat[::2] | (flat[1::2] << np.uint8(4)))
        return ov.op.Constant(ov.Tensor(HELD[-1], ov.Shape(numbers.shape), element))

    value = ops.convert(packed(rng.integers(low, high, shape)), "f16")
    if zero_shape:
        value = ops.subtract(value, ops.convert(packed(rng.integers(low, high, zero_shape)), "f16"))
    scales = rng.uniform(0.01, 0.05, scale_shape).astype(np.float16)
    value = ops.multiply(value, ops.constant(scales))
    if grouped:
        value = ops.reshape(value, ops.constant(np.array([ROWS, WIDTH])), False)
    return ops.convert(value, "f32").output(0)


def evaluated(value: Any) -> np.ndarray:
    """The matrix as OpenVINO computes it."""
    model = ov.Model([ops.result(value)], [])
    return np.array(ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({})[0])


def run(graph: Builder, value: str, shape: list[int], feeds: dict[str, np.ndarray]) -> np.ndarray:
    graph.output("y", value, np.float32, shape)
    options = ort.SessionOptions()
    held = [ort.OrtValue.ortvalue_from_numpy(array) for array in graph.weights.values()]
    options.add_external_initializers([*graph.weights], held)
    session = ort.InferenceSession(graph.model(), options, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, feeds)[0]
    return found


FORMS = [
    *((kind, WIDTH, zero) for kind in ("u8", "i8") for zero in ("each", "all", "none")),
    *((kind, group, zero) for kind in ("u4", "i4") for group in (16, 64, WIDTH) for zero in ("each", "all", "none")),
]


@pytest.mark.parametrize(("kind", "group", "zero"), FORMS)
def test_compressed_weights_keep_their_values(kind: str, group: int, zero: str) -> None:
    value = compressed_output(kind, group, zero)
    expected, matrix = evaluated(value), read_matrix(value)
    assert isinstance(matrix, Compressed) and matrix.shape == (ROWS, WIDTH) and matrix.bits == int(kind[1])
    np.testing.assert_allclose(as_float32(matrix), expected, atol=2e-3)  # OpenVINO may round to float16 between
    x = np.random.default_rng(0).standard_normal((COUNT, WIDTH)).astype(np.float32)
    for compressed in (True, False):
        graph = Builder()
        found = multiply(graph, graph.input("x", np.float32, [COUNT, WIDTH]), matrix, compressed=compressed)
        assert (graph.scratch > 0) == compressed
        product = run(graph, found, [COUNT, ROWS], {"x": x})
        np.testing.assert_allclose(product, x @ as_float32(matrix).T, atol=1e-3)
    ids = np.array([0, 3, 3, ROWS - 1, 7], np.int32)
    graph = Builder()
    rows = look_up(graph, matrix, graph.input("ids", np.int32, [COUNT]))
    np.testing.assert_allclose(
        run(graph, rows, [COUNT, WIDTH], {"ids": ids}), as_float32(matrix)[ids], rtol=1e-6, atol=1e-6
    )


def test_weights_without_compression_keep_their_values() -> None:
    numbers = np.random.default_rng(1).standard_normal((ROWS, WIDTH)).astype(np.float16)
    matrix = read_matrix(ops.convert(ops.constant(numbers), "f32").output(0))
    assert isinstance(matrix, np.ndarray)
    np.testing.assert_array_equal(matrix, numbers.astype(np.float32))


def test_a_width_that_no_block_divides_is_multiplied_as_float32() -> None:
    matrix = Compressed(8, np.ones((4, 40), np.uint8), np.ones((4, 1), np.float32), np.zeros((4, 1), np.uint8))
    graph = Builder()
    found = multiply(graph, graph.input("x", np.float32, [1, 40]), matrix, compressed=True)
    assert run(graph, found, [1, 4], {"x": np.ones((1, 40), np.float32)}).tolist() == [[40.0] * 4]


def test_what_is_not_constant_or_not_known_is_told() -> None:
    x = ops.parameter([ROWS, WIDTH], np.float32)
    assert read_matrix(ops.multiply(x, ops.constant(np.float32(2))).output(0)) is None
    odd = ops.multiply(ops.constant(np.ones((ROWS, WIDTH), np.float32)), ops.constant(np.ones((ROWS, 1), np.float32)))
    with pytest.raises(InputError, match=r"weights .* are f32 \[24, 128\]: leave out --gpu-layers"):
        read_matrix(odd.output(0))
