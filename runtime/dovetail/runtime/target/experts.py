"""Find the experts of a mixture of experts in an OpenVINO IR.

Axes: T rows of a pass, E experts, K experts of a row, H hidden size.

optimum-intel exports a mixture as matrix products over all experts, [E, T, H]. OpenVINO's CPU plugin
turns them into products over the K experts of each row, and computes row after row. A copy of a row
therefore takes as long as another row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import openvino as ov

# From the sum over the experts up to the weights of the router, and to the rows that the experts read.
_TO_ROUTER = (("Multiply", 0), ("Unsqueeze", 1), ("Reshape", 0), ("Transpose", 0), ("ScatterElementsUpdate", 0))
_TO_ROWS = (
    ("Multiply", 0), ("Reshape", 0), ("MatMul", 0), ("Multiply", 0), ("MatMul", 1), ("Reshape", 0), ("Tile", 0),
)  # fmt: skip


@dataclass(frozen=True)
class Mixture:
    """The experts of a layer."""

    inputs: tuple[ov.Input, ...]  # rows [T, ..]: hidden states, a table of zeros, the experts of a row, their weights
    output: ov.Output  # [T, H] the sum over a row's experts


def find_mixtures(model: ov.Model) -> Iterator[Mixture]:
    """Yield the mixtures whose rows can be chosen; others are left out, such as those of gpt-oss and AFMoE."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "ReduceSum":
            continue
        router, tile = _above(node, _TO_ROUTER), _above(node, _TO_ROWS)
        if router and tile and node.get_output_partial_shape(0).rank.get_length() == 2:
            yield Mixture((tile.input(0), *(router.input(index) for index in range(3))), node.output(0))


def _above(node: ov.Node, path: tuple[tuple[str, int], ...]) -> ov.Node | None:
    """Return the node at the end of `path`, given as types and numbers of inputs; None for another graph."""
    for kind, index in path:
        node = node.input_value(index).get_node()
        if node.get_type_name() != kind:
            return None
    return node
