"""The graph for WebGPU, rewritten from the CPU's: the same function, and nothing else touched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the rewritten graph is checked")
pytest.importorskip("torch", reason="a pair is exported")
import onnxruntime as ort

from dovetail.runtime.drafter.runners.webgpu_graph import EMBEDDED, LAST, rewrite
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.pair.manifest import read_manifest

NO_GRAPH = onnx.ModelProto(ir_version=10).SerializeToString()


@pytest.mark.parametrize("name", ["tiny_full_pair", "dflash_pair", "language_pair"])
def test_the_rewritten_graph_computes_the_same(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = request.getfixturevalue(name)
    facts = read_manifest(pair).needed_drafter
    file = pair / facts.files["cpu"]
    made = rewrite(file)
    assert made.embedding is not None
    old, new = onnx.load(file, load_external_data=False), onnx.load_from_string(made.model)
    monkeypatch.chdir(file.parent)  # where the checker looks for the weights
    onnx.checker.check_model(new)
    assert "LogSoftmax" not in {node.op_type for node in new.graph.node}
    ranks = {each.name: len(each.type.tensor_type.shape.dim) for each in new.graph.value_info}
    assert {ranks.get(node.output[0]) for node in new.graph.node if node.op_type == "Squeeze"} <= {0}  # no output
    [table] = [each for each in old.graph.initializer if each.data_type == onnx.TensorProto.INT8]
    kept = [each for each in old.graph.initializer if each is not table]
    assert [each for each in new.graph.initializer if each.name != LAST] == kept  # with their places in the file
    assert [port.name for port in new.graph.input if port.name != EMBEDDED] == [port.name for port in old.graph.input]
    assert [prop.value for prop in new.metadata_props] == [prop.value for prop in old.metadata_props]
    feeds = _feeds(old, facts.target_vocab_size)
    ids = feeds["token" if facts.positions else "input_ids"]
    rows = np.zeros((len(ids), made.embedding.size), np.float32)
    made.embedding.look_up(ids, rows)
    options = ort.SessionOptions()
    folder = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(folder, str(file.parent))
    before = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, feeds)
    after = ort.InferenceSession(made.model, options, providers=["CPUExecutionProvider"]).run(
        None, {**feeds, EMBEDDED: rows}
    )
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def _feeds(model: Any, vocabulary: int) -> dict[str, np.ndarray]:
    rng, n, slots = np.random.default_rng(2), 4, 90
    feeds = {}
    for port in model.graph.input:
        kind = port.type.tensor_type
        shape = [dim.dim_value or {"slots": slots}.get(dim.dim_param, n) for dim in kind.shape.dim]
        values: np.ndarray = rng.standard_normal(shape) / 2
        if kind.elem_type == onnx.TensorProto.INT64:
            values = np.arange(shape[0])
        if port.name in ("token", "input_ids"):
            values = rng.integers(0, vocabulary, shape)
        feeds[port.name] = values.astype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    feeds["context_end"] = feeds["context_end"] * 0 + 20
    feeds["context_begin"] = feeds["context_begin"] * 0
    return feeds


def graph_of(*nodes: Any, tensors: Sequence[Any] = ()) -> bytes:
    """An encoded graph from x [2, 3] float32 and ids [n] int64 to y."""
    port, kinds = onnx.helper.make_tensor_value_info, onnx.TensorProto
    inputs = [port("x", kinds.FLOAT, [2, 3]), port("ids", kinds.INT64, ["n"])]
    graph = onnx.helper.make_graph(nodes, "g", inputs, [port("y", kinds.FLOAT, None)], tensors)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]).SerializeToString()


def test_other_nodes_stay(tmp_path: Path) -> None:
    """A LogSoftmax over another axis, and a look-up of float rows."""
    nodes = [
        onnx.helper.make_node("LogSoftmax", ["x"], ["likely"], axis=0),
        onnx.helper.make_node("Gather", ["likely", "ids"], ["rows"]),
        onnx.helper.make_node("Squeeze", ["rows"], ["y"]),
    ]
    (file := tmp_path / "drafter.onnx").write_bytes(graph_of(*nodes))
    made = rewrite(file)
    assert made.embedding is None
    assert list(onnx.load_from_string(made.model).graph.node) == nodes


def test_a_graph_that_may_never_end_is_refused(tmp_path: Path) -> None:
    loop = onnx.helper.make_node("Loop", ["", ""], ["y"], body=onnx.helper.make_graph([], "body", [], []))
    (file := tmp_path / "drafter.onnx").write_bytes(graph_of(loop))
    with pytest.raises(DeviceError, match="holds a Loop, which may never end"):
        rewrite(file)


def test_an_embedding_without_its_file_is_told_in_one_line(tmp_path: Path) -> None:
    place = onnx.StringStringEntryProto(key="location", value="weights.bin")
    external = onnx.TensorProto(name="table", data_type=onnx.TensorProto.INT8, dims=[4, 2], external_data=[place])
    external.data_location = onnx.TensorProto.EXTERNAL
    inline = onnx.helper.make_tensor("table", onnx.TensorProto.INT8, [4, 2], range(8))
    look_up = onnx.helper.make_node("Gather", ["table", "ids"], ["rows"])
    cast = onnx.helper.make_node("Cast", ["rows"], ["y"], to=onnx.TensorProto.FLOAT)
    file = tmp_path / "drafter.onnx"
    for table, said in (external, "weights.bin"), (inline, "location"):
        file.write_bytes(graph_of(look_up, cast, tensors=[table]))
        with pytest.raises(DeviceError, match=rf"cannot be read \(.*{said}.*export the drafter again") as told:
            rewrite(file)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"not a graph", NO_GRAPH])
def test_a_file_that_is_no_graph_is_told_in_one_line(tmp_path: Path, content: bytes) -> None:
    (file := tmp_path / "drafter.onnx").write_bytes(content)
    with pytest.raises(DeviceError, match="export the drafter again") as told:
        rewrite(file)
    assert "\n" not in str(told.value)
    with pytest.raises(DeviceError, match="cannot be read"):
        rewrite(tmp_path / "none.onnx")
