"""Build an ONNX graph node by node, with weights that stay where they are.

Axes: R rows of a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.errors import DeviceError, install_extra

if TYPE_CHECKING:
    from onnx import GraphProto, ValueInfoProto

OPSET = 20  # the first with Gelu
CONTRIB = "com.microsoft"  # ONNX Runtime's own operators
IR_VERSION = 10
VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Identity")  # operators that only name another shape
SMALL = 1024  # bytes; a larger constant stays outside the graph


class Builder:
    """A graph that grows. Values are known by their names."""

    def __init__(self) -> None:
        try:
            import onnx
        except ImportError:
            raise DeviceError(
                f"--gpu-layers needs the package onnx, which is not installed: {install_extra('cuda')}, or "
                "'.[webgpu]' for WebGPU"
            ) from None
        self._onnx = onnx
        self._graph: GraphProto = onnx.GraphProto(name="layers")
        self.weights: dict[str, NDArray[Any]] = {}  # constants outside the graph
        self.scratch = 0  # values of the largest compressed matrix
        self.embedding = 0  # bytes of the table in which tokens are looked up
        self.kernels = 0  # nodes that start one
        self._small: dict[tuple[Any, ...], str] = {}
        self._count = 0

    def input(self, name: str, dtype: type[np.generic], shape: Sequence[int | str]) -> str:
        self._graph.input.append(self._port(name, dtype, shape))
        return name

    def output(self, name: str, value: str, dtype: type[np.generic], shape: Sequence[int | str]) -> None:
        """Return `value` under a name of its own."""
        self._graph.output.append(self._port(name, dtype, shape))
        self._graph.node.append(self._onnx.helper.make_node("Identity", [value], [name]))

    def returns(self, value: str, dtype: type[np.generic], shape: Sequence[int | str]) -> None:
        """Return a value under the name that it has."""
        self._graph.output.append(self._port(value, dtype, shape))

    def op(self, kind: str, *inputs: str, name: str = "", outputs: int = 1, domain: str = "", **attributes: Any) -> str:
        """Add a node and return its first output. name: of the output. outputs: how many, NAME, NAME:1, ..."""
        self._count += 1
        self.kernels += kind not in VIEWS
        name = name or f"{kind}.{self._count}"
        names = [name, *(f"{name}:{index}" for index in range(1, outputs))]
        self._graph.node.append(self._onnx.helper.make_node(kind, inputs, names, name, domain=domain, **attributes))
        return name

    def constant(self, array: NDArray[Any]) -> str:
        """Return the name of a constant. A large array must live as long as the graph's session opens."""
        if array.nbytes > SMALL:
            self._count += 1
            name = f"weight.{self._count}"
            self.weights[name] = array = np.ascontiguousarray(array)
            tensor = self._onnx.TensorProto(name=name, dims=array.shape, data_location="EXTERNAL")
            tensor.data_type = self._onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            tensor.external_data.add(key="location", value="memory")
            self._graph.initializer.append(tensor)
            return name
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._small:
            self._small[key] = name = f"constant.{len(self._small)}"
            self._graph.initializer.append(self._onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return self._small[key]

    def ints(self, *values: int) -> str:
        """Return a constant list of int64, such as axes or a shape."""
        return self.constant(np.array(values, np.int64))

    def reshape(self, value: str, *shape: int) -> str:
        return self.op("Reshape", value, self.ints(*shape))

    def cast(self, value: str, dtype: type[np.generic]) -> str:
        kind = self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.op("Cast", value, to=kind)

    def transpose(self, value: str, *order: int) -> str:
        return self.op("Transpose", value, perm=order)

    def slice(self, value: str, begin: int, end: int, axis: int = 0) -> str:
        return self.op("Slice", value, self.ints(begin), self.ints(end), self.ints(axis))

    def split(self, value: str, sizes: Sequence[int], axis: int) -> list[str]:
        """Return parts of these sizes."""
        name = self.op("Split", value, self.ints(*sizes), outputs=len(sizes), axis=axis)
        return [name, *(f"{name}:{index}" for index in range(1, len(sizes)))]

    def model(self) -> bytes:
        """Return the graph as ONNX Runtime reads it, without the weights."""
        helper = self._onnx.helper
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        made = helper.make_model(self._graph, opset_imports=opsets, ir_version=IR_VERSION)
        content: bytes = made.SerializeToString()
        return content

    def _port(self, name: str, dtype: type[np.generic], shape: Sequence[int | str]) -> ValueInfoProto:
        kind = self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self._onnx.helper.make_tensor_value_info(name, kind, shape)


def total_bytes(weights: Mapping[str, NDArray[Any]]) -> int:
    """Return the bytes of all weights."""
    return sum(array.nbytes for array in weights.values())
