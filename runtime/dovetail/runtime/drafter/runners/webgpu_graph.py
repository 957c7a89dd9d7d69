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
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.devices.ort import check_endless
from dovetail.runtime.drafter.session import DRAFTING
from dovetail.runtime.errors import DeviceError, one_line
from dovetail.runtime.system.page_release import LookupMapping

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

EMBEDDED = "embedded"  # input [n, H] float32: int8 rows of the embedding, which the graph scales
LAST = "webgpu.last"  # constant [-1] int64: the last axis, or the shape of a list


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

    @property
    def on_host(self) -> int:
        """Bytes of weights that stay on the host."""
        return self.embedding.nbytes if self.embedding else 0


def rewrite(file: Path) -> WebGpuGraph:
    """Return the graph of an ONNX file for WebGPU. Raises DeviceError for another file."""
    import onnx
    from google.protobuf.message import Error

    check_endless(file, DRAFTING)
    try:
        model = onnx.load(file, "protobuf", load_external_data=False)
        if not model.graph.node:
            raise ValueError("it holds no graph")
        embedding = _take_embedding(model.graph, file.parent)
        _replace_nodes(model.graph)
        return WebGpuGraph(model.SerializeToString(), embedding)
    except (OSError, ValueError, KeyError, IndexError, Error) as error:
        raise DeviceError(f"{file} cannot be read ({one_line(error)}): export the drafter again") from None


def _take_embedding(graph: GraphProto, folder: Path) -> Embedding | None:
    """Make the look-up of int8 rows an input, and return their matrix. None if there is no such look-up."""
    from onnx import TensorProto, helper

    tables = {each.name: each for each in graph.initializer if each.data_type == TensorProto.INT8}
    ports = {each.name: each.type.tensor_type.shape for each in graph.input}
    gathers = (node for node in graph.node if node.op_type == "Gather")
    gather = next((node for node in gathers if node.input[0] in tables and node.input[1] in ports), None)
    if gather is None:
        return None
    table, ids = tables[gather.input[0]], ports[gather.input[1]]
    embedding = _mapped(table, folder)
    shape = [dim.dim_param or dim.dim_value for dim in ids.dim]
    graph.input.append(helper.make_tensor_value_info(EMBEDDED, TensorProto.FLOAT, [*shape, embedding.size]))
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] == gather.output[0]:
            node.CopyFrom(_node("Identity", [EMBEDDED], node.output[0]))
    graph.node.remove(gather)
    graph.initializer.remove(table)
    return embedding


def _replace_nodes(graph: GraphProto) -> None:
    """Replace the nodes without a kernel, and the Squeeze at the end."""
    from onnx import TensorProto, helper

    values = {each.name: each.type.tensor_type for each in graph.value_info}
    lists = {name for name, kind in values.items() if kind.elem_type == TensorProto.INT64 and len(kind.shape.dim) == 1}
    columns = {each.name for each in graph.initializer if each.dims[1:] == [1]}
    returned = {each.name for each in graph.output}
    squeezes = [node for node in graph.node if node.op_type == "Squeeze"]
    last = {node.input[0]: node.output[0] for node in squeezes if node.output[0] in returned}
    nodes: list[NodeProto] = []
    left_out = set[str]()
    for node in graph.node:
        kind, made = node.op_type, node.output[0]
        if kind == "LogSoftmax" and all(each.i == -1 for each in node.attribute):  # its only attribute is the axis
            nodes += _log_softmax(node.input[0], made)
        elif kind == "Squeeze" and made in lists:
            nodes.append(_node("Reshape", [node.input[0], LAST], made))
        elif kind == "Gather" and made in last and node.input[0] in columns:
            nodes.append(_node("Reshape", [node.input[0], LAST], f"{made}.list"))
            nodes.append(_node("Gather", [f"{made}.list", node.input[1]], last[made]))
            left_out.add(last[made])
        elif made not in left_out:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.append(helper.make_tensor(LAST, TensorProto.INT64, [1], [-1]))


def _log_softmax(x: str, made: str) -> list[NodeProto]:
    top, shifted, total = (f"{made}.{part}" for part in ("top", "shifted", "total"))
    return [
        _node("ReduceMax", [x, LAST], top),
        _node("Sub", [x, top], shifted),
        _node("ReduceLogSumExp", [shifted, LAST], total),
        _node("Sub", [shifted, total], made),
    ]


def _node(kind: str, inputs: Sequence[str], made: str) -> NodeProto:
    from onnx import helper

    return helper.make_node(kind, inputs, [made], name=f"node_{made}")


def _mapped(tensor: TensorProto, folder: Path) -> Embedding:
    """Map an int8 matrix of the file beside the graph. Raises OSError, ValueError, KeyError."""
    place = {each.key: each.value for each in tensor.external_data}
    rows, size = tensor.dims
    return Embedding(folder / Path(place["location"]).name, int(place.get("offset", 0)), (rows, size))
