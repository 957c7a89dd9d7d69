"""Translate the first layers of an OpenVINO graph, operator by operator, into an ONNX graph.

The OpenVINO graph is the target's, with paged attention. Every size but one is known; the unknown
one is the number of rows, which is ROWS here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.errors import InputError
from dovetail.runtime.target.graph import EXPERT_ROWS, NODE_ROWS, PATH_ROWS, ROW_EXPERTS
from dovetail.runtime.target.layers.attention import ROWS, Heads, Rows, attend
from dovetail.runtime.target.layers.builder import Builder
from dovetail.runtime.target.layers.weights import REMEDY, look_up, multiply, read_matrix

if TYPE_CHECKING:
    import openvino as ov

# Operators of equal meaning, and their names in ONNX.
_SAME = {
    "Add": "Add", "Subtract": "Sub", "Multiply": "Mul", "Divide": "Div", "Sqrt": "Sqrt",
    "Tanh": "Tanh", "Sigmoid": "Sigmoid", "Exp": "Exp", "Negative": "Neg",
    "Relu": "Relu", "Abs": "Abs",
}  # fmt: skip
_SHAPES = ("Reshape", "Unsqueeze", "Squeeze")
_TYPES: Mapping[str, type[np.generic]] = {"f32": np.float32, "i32": np.int32, "i64": np.int64}
_FEW = 16  # positions of a short text
_OPTIONS = 9  # inputs of paged attention before its scale
_SCALE, _LONGEST = 9, 12  # the scale, and the input that tells the longest context


class Translator:
    """Translates values on demand. inputs: ONNX values for the graph's parameters, by name."""

    def __init__(
        self, graph: Builder, inputs: Mapping[str, str], rows: Rows, *, capacity: int,
        kv_type: type[np.floating], compressed: bool,
    ) -> None:  # fmt: skip
        self._graph, self._inputs, self._rows = graph, inputs, rows
        self._capacity, self._kv_type, self._compressed = capacity, kv_type, compressed
        self._known: dict[tuple[str, int], str] = {}
        self.heads: list[Heads] = []  # of each layer
        self._special: Mapping[str, Callable[[ov.Node], str]] = {
            "Constant": self._constant, "Convert": self._convert, "MatMul": self._matmul, "Gather": self._gather,
            "ReduceMean": self._reduce_mean, "Power": self._power, "Sin": self._table, "Cos": self._table,
            "MVN": self._norm,
            "Swish": self._swish, "Gelu": self._gelu, "Concat": self._concat,
            "Transpose": self._transpose, "Slice": self._slice, "PagedAttentionExtension": self._attention,
        }  # fmt: skip

    def value(self, wanted: ov.Output) -> str:
        """Return the ONNX value of an OpenVINO value. Raises InputError for an operator that is not known."""
        pending = [wanted.get_node()]
        while pending:  # no recursion: layers are deep
            node = pending[-1]
            if _key(node.output(0)) in self._known:
                pending.pop()
                continue
            needed = [source.get_node() for source in self._needed(node)]
            missing = [each for each in needed if _key(each.output(0)) not in self._known]
            if missing:
                pending += missing[::-1]
                continue
            self._add(pending.pop())
        return self._known[_key(wanted)]

    def _needed(self, node: ov.Node) -> list[ov.Output]:
        """Return the inputs that must be translated before a node."""
        kind, values = node.get_type_name(), node.input_values()
        if kind == "PagedAttentionExtension":
            return [_before_copies(value) for value in values[:3]]
        if _copies_rows(node):
            return [values[0]]
        if kind in ("MatMul", "Gather") and node.get_output_element_type(0).get_type_name() == "f32":
            return [value for value in values[:2] if read_shape(value) is None]
        if kind in ("Sin", "Cos"):
            return []
        if kind in ("Add", "Subtract", "Multiply", "Divide", "Power", "Concat"):
            return list(values)
        return list(values[:1])

    def _add(self, node: ov.Node) -> None:
        kind = node.get_type_name()
        if kind == "VariadicSplit":
            self._split(node)
        elif kind == "Parameter":
            name = node.get_friendly_name()
            if name in (EXPERT_ROWS, ROW_EXPERTS):
                raise InputError(f"layers on the GPU cannot compute a mixture of experts: {REMEDY}")
            if name not in self._inputs:
                raise InputError(f"layers on the GPU cannot read the graph's input {name!r}: {REMEDY}")
            self._known[_key(node.output(0))] = self._inputs[name]
        else:
            special = self._special.get(kind)
            if special is None and kind not in (*_SAME, *_SHAPES):
                raise InputError(
                    f"layers on the GPU cannot compute {kind} {node.get_friendly_name()!r} of this target: {REMEDY}"
                )
            self._known[_key(node.output(0))] = special(node) if special else self._plain(node)

    def _plain(self, node: ov.Node) -> str:
        kind = node.get_type_name()
        if kind in _SHAPES:
            return self._graph.reshape(self._input(node, 0), *_shape(node.output(0)))
        return self._graph.op(_SAME[kind], *(self._input(node, index) for index in range(node.get_input_size())))

    def _input(self, node: ov.Node, index: int) -> str:
        return self._known[_key(node.input_value(index))]

    def _constant(self, node: ov.Node) -> str:
        kind = node.get_output_element_type(0).get_type_name()
        dtype = np.float32 if kind in ("f16", "bf16") else _TYPES.get(kind)
        if dtype is None:
            raise InputError(f"constant {node.get_friendly_name()!r} is {kind}: {REMEDY}")
        return self._graph.constant(np.asarray(node.data, dtype).reshape([*node.get_output_shape(0)]))

    def _convert(self, node: ov.Node) -> str:
        source = node.input_value(0).get_element_type().get_type_name()
        kind = node.get_output_element_type(0).get_type_name()
        kinds = {"f16": "f32", "bf16": "f32"}
        if kinds.get(source, source) == kinds.get(kind, kind):
            return self._input(node, 0)
        if kinds.get(kind, kind) not in _TYPES:
            raise InputError(f"layers on the GPU cannot convert {node.get_friendly_name()!r} to {kind}: {REMEDY}")
        return self._graph.cast(self._input(node, 0), _TYPES[kinds.get(kind, kind)])

    def _matmul(self, node: ov.Node) -> str:
        attributes = node.get_attributes()
        turned, weight_turned = attributes["transpose_a"], attributes["transpose_b"]
        left, right = node.input_values()
        if weight_turned and not turned and read_shape(right) and _rank(right) == 2:
            matrix = read_matrix(right)
            if matrix is None:
                raise InputError(f"weights of {node.get_friendly_name()!r} have an unknown form: {REMEDY}")
            return multiply(self._graph, self._input(node, 0), matrix, compressed=self._compressed)
        names = []
        for value, turn in ((left, turned), (right, weight_turned)):
            if read_shape(value):
                self._known.setdefault(_key(value), self._whole(value))
            name = self._known[_key(value)]
            order = [*range(_rank(value) - 2), _rank(value) - 1, _rank(value) - 2]
            names.append(self._graph.transpose(name, *order) if turn else name)
        return self._graph.op("MatMul", *names)

    def _whole(self, value: ov.Output) -> str:
        matrix = read_matrix(value)
        if not isinstance(matrix, np.ndarray):
            raise InputError(f"constant {value.get_node().get_friendly_name()!r} has an unknown form: {REMEDY}")
        return self._graph.constant(matrix)

    def _gather(self, node: ov.Node) -> str:
        if _copies_rows(node):
            return self._input(node, 0)
        matrix, (axis,) = read_matrix(node.input_value(0)), [*_numbers(node.input_value(2))]
        if matrix is None or axis:
            raise InputError(f"layers on the GPU cannot compute Gather {node.get_friendly_name()!r}: {REMEDY}")
        ids = self._graph.cast(self._graph.reshape(self._input(node, 1), ROWS), np.int32)
        return self._graph.reshape(look_up(self._graph, matrix, ids), *_shape(node.output(0)))

    def _table(self, node: ov.Node) -> str:
        """Look an angle's sine or cosine up, as OpenVINO computes it: those of GPUs err by up to 1e-3."""
        import openvino as ov

        parameters = [each for each in _sources(node.output(0)) if each.get_type_name() == "Parameter"]
        named = [each.get_friendly_name() for each in parameters]
        if named != ["position_ids"] or _shape(node.output(0))[0] != ROWS:
            raise InputError(f"angles {node.get_friendly_name()!r} depend on more than positions: {REMEDY}")
        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = ov.Core().compile_model(ov.Model([node.output(0)], parameters), "CPU", settings)
        table, few = (np.array(compiled(np.arange(count))[0]) for count in (self._capacity, _FEW))
        if not np.array_equal(table[:_FEW], few):
            raise InputError(f"angles {node.get_friendly_name()!r} change with the length of the text: {REMEDY}")
        return self._graph.op("Gather", self._graph.constant(table), self._inputs["position_ids"], axis=0)

    def _power(self, node: ov.Node) -> str:
        base, exponent = self._input(node, 0), node.input_value(1).get_node()
        if exponent.get_type_name() == "Constant" and np.all(np.asarray(exponent.data) == 2):
            return self._graph.op("Mul", base, base)  # quicker, and WebGPU's Pow fails
        return self._graph.op("Pow", base, self._input(node, 1))

    def _reduce_mean(self, node: ov.Node) -> str:
        axes = self._graph.ints(*_numbers(node.input_value(1)))
        return self._graph.op(
            "ReduceMean", self._input(node, 0), axes, keepdims=int(node.get_attributes()["keep_dims"])
        )

    def _norm(self, node: ov.Node) -> str:
        """Add a layer norm; its scale and shift follow as operators of their own."""
        attributes, size = node.get_attributes(), _shape(node.output(0))[-1]
        axes = [axis % _rank(node.output(0)) for axis in _numbers(node.input_value(1))]
        inside = str(attributes["eps_mode"]).upper() == "INSIDE_SQRT"
        if axes != [_rank(node.output(0)) - 1] or not attributes["normalize_variance"] or not inside:
            raise InputError(f"layers on the GPU cannot compute the norm {node.get_friendly_name()!r}: {REMEDY}")
        ones = self._graph.constant(np.ones(size, np.float32))
        return self._graph.op("LayerNormalization", self._input(node, 0), ones, epsilon=float(attributes["eps"]))

    def _swish(self, node: ov.Node) -> str:
        if node.get_input_size() > 1 and [*_numbers(node.input_value(1))] != [1]:
            raise InputError(f"Swish {node.get_friendly_name()!r} has a factor: {REMEDY}")
        x = self._input(node, 0)
        return self._graph.op("Mul", x, self._graph.op("Sigmoid", x))

    def _gelu(self, node: ov.Node) -> str:
        mode = node.get_attributes()["approximation_mode"].lower()
        return self._graph.op("Gelu", self._input(node, 0), approximate="tanh" if mode == "tanh" else "none")

    def _concat(self, node: ov.Node) -> str:
        inputs = [self._input(node, index) for index in range(node.get_input_size())]
        return self._graph.op("Concat", *inputs, axis=node.get_attributes()["axis"])

    def _transpose(self, node: ov.Node) -> str:
        return self._graph.transpose(self._input(node, 0), *_numbers(node.input_value(1)))

    def _slice(self, node: ov.Node) -> str:
        begins, ends, steps, axes = (_numbers(node.input_value(index)) for index in range(1, 5))
        limits = [self._graph.ints(*part) for part in (begins, ends, axes, steps)]
        return self._graph.op("Slice", self._input(node, 0), *limits)

    def _split(self, node: ov.Node) -> None:
        (axis,) = _numbers(node.input_value(1))
        sizes = [_shape(node.output(index))[axis] for index in range(node.get_output_size())]
        for index, part in enumerate(self._graph.split(self._input(node, 0), sizes, axis)):
            self._known[_key(node.output(index))] = part

    def _attention(self, node: ov.Node) -> str:
        heads = _heads(node)
        query, key, value = (self._known[_key(_before_copies(value))] for value in node.input_values()[:3])
        layer = len(self.heads)
        self.heads.append(heads)
        return attend(
            self._graph, layer, query, key, value, heads, self._rows, self._kv_type, self._capacity
        )  # fmt: skip


def read_shape(value: ov.Output) -> list[int] | None:
    """Return the shape of a value that depends on constants alone, None of any other."""
    if any(node.get_type_name() == "Parameter" for node in _sources(value)):
        return None
    return [*value.get_partial_shape().to_shape()]


def _sources(value: ov.Output) -> Iterator[ov.Node]:
    """Yield the node of a value and all nodes before it."""
    pending, seen = [value.get_node()], set[str]()
    while pending:
        node = pending.pop()
        if node.get_friendly_name() not in seen:
            seen.add(node.get_friendly_name())
            pending += [source.get_node() for source in node.input_values()]
            yield node


def _copies_rows(node: ov.Node) -> bool:
    """Return whether the node copies rows for the paths of trees (see to_paged), which the layers here do without."""
    if node.get_type_name() != "Gather":
        return False
    return node.input_value(1).get_node().get_friendly_name() in (PATH_ROWS, NODE_ROWS)


def _before_copies(value: ov.Output) -> ov.Output:
    return value.get_node().input_value(0) if _copies_rows(value.get_node()) else value


def _heads(node: ov.Node) -> Heads:
    """Return the sizes of an attention. Raises InputError for attention that is more than causal."""
    values = node.input_values()
    for index, value in enumerate(values[_OPTIONS:], _OPTIONS):
        source = value.get_node()
        if index in (_SCALE, _LONGEST):
            continue
        if source.get_type_name() != "Constant" or np.any(source.data):
            raise InputError(
                "layers on the GPU cannot compute this target's attention, which has a sliding window, sinks or "
                f"ALiBi: {REMEDY}"
            )
    query, key, value = (_head_sizes(_before_copies(source)) for source in values[:3])
    if key != value or query[1] != key[1] or query[0] % key[0]:
        raise InputError(f"layers on the GPU cannot compute attention with heads {query}, {key} and {value}: {REMEDY}")
    scale = np.asarray(values[_SCALE].get_node().data, np.float32).reshape(-1)
    return Heads(query[0], key[0], query[1], float(scale[0]) if len(scale) else query[1] ** -0.5)


def _head_sizes(value: ov.Output) -> tuple[int, int]:
    """Return heads and head size of a query, key or value [R, heads * size], which was [.., heads, size] before."""
    node = value.get_node()
    shape = _shape(node.input_value(0)) if node.get_type_name() == "Reshape" else []
    if len(shape) != 4 or shape[2] * shape[3] != _shape(value)[1]:
        raise InputError(f"layers on the GPU cannot tell the heads of {node.get_friendly_name()!r}: {REMEDY}")
    return shape[2], shape[3]


def _shape(value: ov.Output) -> list[int]:
    """Return a shape with ROWS in place of the unknown size."""
    sizes = [ROWS if dim.is_dynamic else dim.get_length() for dim in value.get_partial_shape()]
    if sum(dim.is_dynamic for dim in value.get_partial_shape()) > 1:
        raise InputError(
            f"layers on the GPU do not know the shape of {value.get_node().get_friendly_name()!r}: {REMEDY}"
        )
    return sizes


def _rank(value: ov.Output) -> int:
    return int(value.get_partial_shape().rank.get_length())


def _numbers(value: ov.Output) -> list[int]:
    """Return the whole numbers of a constant."""
    node = value.get_node()
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant":
        raise InputError(f"layers on the GPU need a constant in place of {node.get_friendly_name()!r}: {REMEDY}")
    found: NDArray[Any] = np.asarray(node.data).reshape(-1)
    return [int(number) for number in found]


def _key(value: ov.Output) -> tuple[str, int]:
    return value.get_node().get_friendly_name(), value.get_index()
