"""Rewrite a drafter's INT8 graph in memory, so that every node runs on WebGPU.

ONNX Runtime's WebGPU plugin has no kernels for some nodes of the graph. A node on the CPU would
forbid the capture, and the CPU would wait for the node's input in the middle of a call.

- The Gather from the int8 embedding and the Cast behind it become an input, EMBEDDED. The host
  looks up the rows. The embedding then takes no GPU memory; it is most of a drafter's bytes.
- LogSoftmax becomes ReduceMax, Sub, ReduceLogSumExp and Sub. The plugin's ReduceLogSumExp alone
  overflows for logits above 88.
- A Squeeze of int64 to one axis becomes a Reshape.
- The last Squeeze is left out. Its result is an output of the graph and therefore a copy, which a
  captured call does not repeat. The Gather before it reads a list in place of a column.

The exported graph keeps these nodes: pairs of earlier versions work as they are, and the CPU's kernel
of LogSoftmax is many times quicker than the four nodes.

Axes: n rows of a call, V target vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.drafter.ort import check_endless
from dovetail.runtime.drafter.webgpu.protobuf import BYTES, Field, Message
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.system.page_release import LookupMapping

EMBEDDED = "embedded"  # input [n, H] float32: int8 rows of the embedding, which the graph scales

# Numbers of fields in onnx.proto, and values of its enumerations.
GRAPH = 7  # of a model
NODE, INITIALIZER, INPUT, OUTPUT, VALUE_INFO = 1, 5, 11, 12, 13  # of a graph
NODE_INPUT, NODE_OUTPUT, NODE_NAME, OP_TYPE, ATTRIBUTE = 1, 2, 3, 4, 5  # of a node
ATTRIBUTE_NAME, ATTRIBUTE_INT = 1, 3
DIMS, DATA_TYPE, TENSOR_NAME, RAW_DATA, EXTERNAL_DATA = 1, 2, 8, 9, 13  # of a tensor
KEY, VALUE = 1, 2  # of external data
VALUE_NAME, VALUE_TYPE = 1, 2  # of an input, or of a value between nodes
TENSOR_TYPE = 1  # of a type
ELEMENT, SHAPE = 1, 2  # of a tensor's type
DIM, DIM_SIZE = 1, 1
FLOAT, INT8, INT64 = 1, 3, 7


class Embedding:
    """The int8 rows of an embedding, in the file of a drafter's weights."""

    def __init__(self, file: Path, offset: int, shape: tuple[int, int]):
        """offset: bytes before the first row. shape: [V, H]. Raises OSError, ValueError."""
        self._pages = LookupMapping(file)
        with self._pages:
            self._rows = np.memmap(file, np.int8, "r", offset, shape)
        self.size, self.nbytes = shape[1], self._rows.nbytes

    def look_up(self, ids: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """Write the rows of `ids` [n] to out [n, H]."""
        out[:] = self._rows[ids]
        self._pages.add(len(ids))


@dataclass(frozen=True)
class WebGpuGraph:
    """A rewritten graph."""

    model: bytes  # ONNX; large weights stay in the file beside the original
    embedding: Embedding | None  # None if the graph has no int8 embedding


def rewrite(file: Path) -> WebGpuGraph:
    """Return the graph of an ONNX file for WebGPU. Raises DeviceError for another file."""
    check_endless(file)
    try:
        model = Message.read(file.read_bytes())
        [at] = [index for index, field in enumerate(model) if field.number == GRAPH]
        graph, embedding = _rewritten(model.at(GRAPH), file.parent)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise DeviceError(f"{file} cannot be read ({error}): export the drafter again") from None
    model[at] = Field(GRAPH, BYTES, graph.write())
    return WebGpuGraph(model.write(), embedding)


def _rewritten(graph: Message, folder: Path) -> tuple[Message, Embedding | None]:
    tensors = {each.text(TENSOR_NAME): each for each in graph.messages(INITIALIZER)}
    inputs = {each.text(VALUE_NAME): each for each in graph.messages(INPUT)}
    lists = {each.text(VALUE_NAME) for each in graph.messages(VALUE_INFO) if _is_list(each)}
    returned = {each.text(VALUE_NAME) for each in graph.messages(OUTPUT)}
    squeezed = {
        node.texts(NODE_INPUT)[0]: node.text(NODE_OUTPUT)
        for node in graph.messages(NODE) if node.text(OP_TYPE) == "Squeeze" and node.text(NODE_OUTPUT) in returned
    }  # fmt: skip
    out, dropped, table, index, looked_up = Message(), set[str](), "", "", ""
    for field in graph:
        node = Message.read(field.value) if field.number == NODE and isinstance(field.value, bytes) else Message()
        kind, read, made = node.text(OP_TYPE), node.texts(NODE_INPUT), node.text(NODE_OUTPUT)
        if kind == "LogSoftmax" and _axis(node) == -1:
            for part in _log_softmax(read[0], made):
                out.add(*part)
        elif kind == "Squeeze" and made in lists:
            shape = f"{made}.shape"
            out.add(INITIALIZER, _constant(shape)).add(NODE, _node("Reshape", [read[0], shape], made))
        elif kind == "Gather" and made in squeezed and _is_column(tensors.get(read[0])):
            column, returns = f"{made}.list", squeezed[made]
            out.add(INITIALIZER, _constant(f"{made}.shape")).add(
                NODE, _node("Reshape", [read[0], f"{made}.shape"], column)
            )
            out.add(NODE, _node("Gather", [column, read[1]], returns))
            dropped.add(returns)
        elif kind == "Squeeze" and made in dropped:
            continue
        elif kind == "Gather" and not table and read[1] in inputs and _is_int8(tensors.get(read[0])):
            table, index, looked_up = read[0], read[1], made
        elif kind == "Cast" and table and read[0] == looked_up:
            out.add(INPUT, _rows_input(inputs[index], tensors[table].numbers(DIMS)[-1]))
            out.add(NODE, _node("Identity", [EMBEDDED], made))
        else:
            out.append(field)
    if not table:
        return out, None
    embedding = tensors[table].write()
    return Message(field for field in out if field.value != embedding), _mapped(tensors[table], folder)


def _log_softmax(x: str, made: str) -> list[tuple[int, Message]]:
    axes, top, shifted, total = (f"{made}.{part}" for part in ("axes", "top", "shifted", "total"))
    nodes = [
        _node("ReduceMax", [x, axes], top),
        _node("Sub", [x, top], shifted),
        _node("ReduceLogSumExp", [shifted, axes], total),
        _node("Sub", [shifted, total], made),
    ]
    return [(INITIALIZER, _constant(axes)), *((NODE, node) for node in nodes)]


def _node(kind: str, inputs: Sequence[str], made: str) -> Message:
    node = Message().add(NODE_OUTPUT, made).add(NODE_NAME, f"node_{made}").add(OP_TYPE, kind)
    for name in inputs:
        node.add(NODE_INPUT, name)
    return node


def _constant(name: str) -> Message:
    """Return the tensor [-1] of int64: the last axis, or the shape of a list."""
    tensor = Message().add(DIMS, 1).add(DATA_TYPE, INT64).add(TENSOR_NAME, name)
    return tensor.add(RAW_DATA, np.array([-1], "<i8").tobytes())


def _rows_input(index: Message, size: int) -> Message:
    """Return the input EMBEDDED: `size` values for each element of the input `index`."""
    shape = index.at(VALUE_TYPE, TENSOR_TYPE, SHAPE).add(DIM, Message().add(DIM_SIZE, size))
    kind = Message().add(TENSOR_TYPE, Message().add(ELEMENT, FLOAT).add(SHAPE, shape))
    return Message().add(VALUE_NAME, EMBEDDED).add(VALUE_TYPE, kind)


def _axis(node: Message) -> int:
    """Return the axis of a LogSoftmax."""
    axes = [each.numbers(ATTRIBUTE_INT) for each in node.messages(ATTRIBUTE) if each.text(ATTRIBUTE_NAME) == "axis"]
    return axes[0][0] if axes else -1


def _is_list(value: Message) -> bool:
    kind = value.at(VALUE_TYPE, TENSOR_TYPE)
    return kind.numbers(ELEMENT) == [INT64] and len(kind.at(SHAPE).messages(DIM)) == 1


def _is_column(tensor: Message | None) -> bool:
    return tensor is not None and tensor.numbers(DIMS)[1:] == [1]


def _is_int8(tensor: Message | None) -> bool:
    return tensor is not None and tensor.numbers(DATA_TYPE) == [INT8]


def _mapped(tensor: Message, folder: Path) -> Embedding:
    """Map an int8 matrix of the file beside the graph. Raises OSError, ValueError, KeyError."""
    place = {each.text(KEY): each.text(VALUE) for each in tensor.messages(EXTERNAL_DATA)}
    rows, size = tensor.numbers(DIMS)
    return Embedding(folder / Path(place["location"]).name, int(place.get("offset", 0)), (rows, size))
