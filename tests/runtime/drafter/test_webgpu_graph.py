"""The graph for WebGPU, rewritten from the CPU's: the same function, and nothing else touched."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the rewritten graph is checked")
pytest.importorskip("torch", reason="a pair is exported")
import onnxruntime as ort
from hypothesis import given
from hypothesis import strategies as st

from dovetail.runtime.drafter.webgpu.graph import EMBEDDED, rewrite
from dovetail.runtime.drafter.webgpu.protobuf import Message
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.pair.manifest import read_manifest

WITHOUT_KERNEL = {"LogSoftmax"}
fields = st.lists(st.tuples(st.integers(1, 500), st.integers(0, 2**64 - 1) | st.binary(max_size=300)), max_size=6)


@given(fields)
def test_a_message_is_written_as_it_was_read(each: list[tuple[int, Any]]) -> None:
    message = Message()
    for number, value in each:
        message.add(number, value)
    assert Message.read(message.write()) == message


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9))
def test_integers_are_read_one_by_one_and_packed(values: list[int]) -> None:
    """protobuf's own encoder writes both."""
    tensor = onnx.TensorProto(dims=values)
    packed = onnx.TensorProto(int64_data=values)
    assert Message.read(tensor.SerializeToString()).numbers(1) == values
    assert Message.read(packed.SerializeToString()).numbers(7) == values


@given(st.binary(max_size=60))
def test_other_bytes_are_read_or_refused(data: bytes) -> None:
    with suppress(ValueError):
        Message.read(data)


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
    assert not {node.op_type for node in new.graph.node} & WITHOUT_KERNEL
    assert not [node.name for node in new.graph.node if node.op_type == "Squeeze" and node.output[0] == "top_ids"]
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


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"not a graph"])
def test_a_file_that_is_no_graph_is_told_in_one_line(tmp_path: Path, content: bytes) -> None:
    (file := tmp_path / "drafter.onnx").write_bytes(content)
    with pytest.raises(DeviceError, match="export the drafter again") as told:
        rewrite(file)
    assert "\n" not in str(told.value)
    with pytest.raises(DeviceError, match="cannot be read"):
        rewrite(tmp_path / "none.onnx")
