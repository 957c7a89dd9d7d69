"""Attention whose sums have one order, whatever the tree: a row's bits depend on the tokens before it alone.

The keys and values of a text lie in slots. A committed token's slot is its position. Nodes of a
tree take the slots after the text. A row at position p attends to two parts, side by side in one
softmax:

- the slots before `begin(p)`, in one multiplication for all rows
- its tail: the tokens from `begin(p)` to p along the row's own path, gathered row by row

`begin(p)` depends on p alone, and lies so far back that no node of a tree comes before it. Each
token therefore has the same place in every sum. Slots that a row may not see add exactly 0. The
number of slots in the first part is one of few sizes, which depends on p alone too.

Axes: R rows of a call, S slots, E slots of the first part, W tokens of a tail, N nodes of a tree,
H heads, k heads of keys and values, g = H / k, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.target.layers.builder import Builder
from dovetail.runtime.tree.limits import LargestTree

ROWS = 32  # of each call: as many as the scheduler's trees have nodes
NODES = 128  # of a tree, root included
STEP = 32  # positions by which `begin` moves
TAIL = 2 * STEP  # tokens
DEPTH = STEP - 1  # levels of a tree below its root
LARGEST_TREE = LargestTree(NODES, DEPTH)
MOVES = 32  # rows of KV that a call moves
LEAST_PREFIX = 256  # slots of the first part
AWAY = -1e30  # added to scores of slots that a row may not see

# The inputs of a call in one array of int32, in this order.
FIELDS = {
    "ids": ROWS,
    "positions": ROWS,
    "slots": ROWS,
    "parents": NODES,
    "sources": MOVES,
    "targets": MOVES,
    "length": 1,
}
CALL, PREFIX, ANSWERS = "call", "prefix", "answers"  # names of the inputs


def begin(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where the tails of rows at these positions begin."""
    return STEP * np.maximum(positions // STEP - 1, 0)


def slots_for(capacity: int) -> int:
    """Return the slots of a text of `capacity` tokens: also for nodes, and one that nobody reads."""
    return capacity + NODES + 1


def prefixes(capacity: int) -> list[int]:
    """Return the sizes of the first part, ascending. The last one holds every text."""
    sizes = [LEAST_PREFIX]
    while sizes[-1] < capacity:
        sizes.append(2 * sizes[-1])
    return [min(size, slots_for(capacity)) for size in sizes]


@dataclass(frozen=True)
class Rows:
    """What the rows of a call share in all layers: names of values."""

    slots: str  # [M + R, 1] written to, moved rows first
    sources: str  # [M] slots of the rows that move
    tail: str  # [R, W] slots
    tail_mask: str  # [R, 1, 1, W]
    prefix: str  # [1] int64, E
    prefix_mask: str  # [1, R, 1, E]


def add_rows(graph: Builder, call: Sequence[str], prefix: str, capacity: int) -> Rows:
    """Add what layers share. call: the parts of the input CALL, as in FIELDS. prefix: the input PREFIX."""
    _, positions, slots, parents, sources, targets, length = call
    i32 = np.int32
    one, step, none = (graph.constant(np.array(number, i32)) for number in (1, STEP, 0))
    at = graph.reshape(positions, ROWS, 1)
    back = graph.op("Sub", graph.op("Div", at, step), one)  # integers: rounded down
    begins = graph.op("Mul", graph.op("Max", back, none), step)
    places = graph.op("Add", begins, graph.constant(np.arange(TAIL, dtype=i32)[None]))  # [R, W] positions
    distance = graph.op("Sub", at, places)
    # The k-th ancestor of every node, by doubling: rows of the table at the m-th ancestor are the ancestors from m on.
    table, jump, known = graph.constant(np.arange(NODES, dtype=i32)[:, None]), parents, 1
    while known < STEP:
        table = graph.op("Concat", table, graph.op("Gather", table, jump, axis=0), axis=1)
        jump, known = graph.op("Gather", jump, jump, axis=0), 2 * known
    nodes = _clipped(graph, graph.op("Sub", slots, length), NODES - 1)
    own = graph.op("Gather", table, nodes, axis=0)  # [R, STEP]
    # WebGPU has no GatherElements: the table as a list, and each row's first place in it.
    firsts = graph.constant(STEP * np.arange(ROWS, dtype=i32)[:, None])
    index = graph.op("Add", _clipped(graph, distance, STEP - 1), firsts)
    ancestors = graph.op("Gather", graph.reshape(own, ROWS * STEP), index, axis=0)
    committed = graph.op("Less", places, length)
    tail = graph.op("Where", committed, places, graph.op("Add", ancestors, length))
    # A place after the row itself has any slot, masked.
    tail = _clipped(graph, tail, slots_for(capacity) - 1)
    zero, away = graph.constant(np.array(0, np.float32)), graph.constant(np.array(AWAY, np.float32))
    later = graph.op("Greater", places, at)
    tail_mask = graph.reshape(graph.op("Where", later, away, zero), ROWS, 1, 1, TAIL)
    every = graph.constant(np.arange(slots_for(capacity), dtype=np.float32))  # WebGPU slices no integers
    seen = graph.op("Less", _cut(graph, every, prefix), graph.cast(begins, np.float32))  # [R, E]
    prefix_mask = graph.op("Unsqueeze", graph.op("Where", seen, zero, away), graph.ints(0, 2))
    written = graph.reshape(graph.op("Concat", targets, slots, axis=0), MOVES + ROWS, 1)
    return Rows(written, sources, tail, tail_mask, prefix, prefix_mask)


@dataclass(frozen=True)
class Heads:
    """The sizes of one layer's attention."""

    query: int  # H
    kv: int  # k
    size: int  # d
    scale: float


def attend(
    graph: Builder, layer: int, query: str, key: str, value: str, heads: Heads, rows: Rows,
    kv_type: type[np.floating], capacity: int,
) -> str:  # fmt: skip
    """Add the attention of one layer. query: [R, H * d], key, value: [R, k * d]. Return [R, H * d]."""
    k, g, d = heads.kv, heads.query // heads.kv, heads.size
    shape = (slots_for(capacity), 2, k, d)
    held = graph.input(f"kv.{layer}", kv_type, shape)
    new = graph.op("Concat", *(graph.reshape(each, ROWS, 1, k, d) for each in (key, value)), axis=1)
    moved = graph.op("Gather", held, rows.sources, axis=0)
    new = _rounded(graph, new) if kv_type == np.float32 else graph.cast(new, kv_type)
    new = graph.op("Concat", moved, new, axis=0)
    written = graph.op("ScatterND", held, _int64(graph, rows.slots), new, name=f"kv.{layer}.out")
    graph.returns(written, kv_type, shape)
    query = graph.op("Mul", graph.reshape(query, ROWS, k, g, d), graph.constant(np.array(heads.scale, np.float32)))
    by_head = graph.reshape(graph.transpose(query, 1, 0, 2, 3), k, ROWS * g, d)

    first_k, first_v = _pair(graph, _cut(graph, written, rows.prefix), kv_type, 1)  # [E, 1, k, d]
    first_k = graph.transpose(graph.op("Squeeze", first_k, graph.ints(1)), 1, 2, 0)  # [k, d, E]
    first_v = graph.transpose(graph.op("Squeeze", first_v, graph.ints(1)), 1, 0, 2)  # [k, E, d]
    first = graph.reshape(graph.op("MatMul", by_head, first_k), k, ROWS, g, -1)
    first = graph.op("Add", first, rows.prefix_mask)

    tail_k, tail_v = _pair(graph, graph.op("Gather", written, rows.tail, axis=0), kv_type, 2)  # [R, W, 1, k, d]
    tail_k = graph.transpose(graph.reshape(tail_k, ROWS, TAIL, k, d), 0, 2, 3, 1)
    tail_v = graph.transpose(graph.reshape(tail_v, ROWS, TAIL, k, d), 0, 2, 1, 3)
    tail = graph.op("Add", graph.op("MatMul", query, tail_k), rows.tail_mask)  # [R, k, g, W]

    scores = graph.op("Concat", first, graph.transpose(tail, 1, 0, 2, 3), axis=3)  # [k, R, g, E + W]
    shares = graph.op("Softmax", scores, axis=3)
    first = graph.op("Slice", shares, graph.ints(0), graph.ints(-TAIL), graph.ints(3))
    tail = graph.op("Slice", shares, graph.ints(-TAIL), graph.ints(np.iinfo(np.int64).max), graph.ints(3))
    first = graph.op("MatMul", graph.reshape(first, k, ROWS * g, -1), first_v)
    first = graph.transpose(graph.reshape(first, k, ROWS, g, d), 1, 0, 2, 3)
    tail = graph.op("MatMul", graph.transpose(tail, 1, 0, 2, 3), tail_v)
    return graph.reshape(graph.op("Add", first, tail), ROWS, heads.query * d)


def _rounded(graph: Builder, value: str) -> str:
    """Round float32 to the 11 bits of float16, in which OpenVINO keeps keys and values by default.

    Source: Dekker's splitting (Numerische Mathematik 18, 1971).
    """
    whole = graph.op("Mul", value, graph.constant(np.array(2**13 + 1, np.float32)))
    return graph.op("Add", graph.op("Sub", value, whole), whole)


def _pair(graph: Builder, kv: str, kv_type: type[np.floating], axis: int) -> tuple[str, str]:
    """Return keys and values in float32."""
    if kv_type != np.float32:
        kv = graph.cast(kv, np.float32)
    key, value = graph.split(kv, (1, 1), axis)
    return key, value


def _cut(graph: Builder, value: str, count: str) -> str:
    """Return the first `count` rows."""
    return graph.op("Slice", value, graph.ints(0), count, graph.ints(0))


def _clipped(graph: Builder, value: str, most: int) -> str:
    """Return integers within 0 and `most`."""
    low = graph.op("Max", value, graph.constant(np.array(0, np.int32)))
    return graph.op("Min", low, graph.constant(np.array(most, np.int32)))


def _int64(graph: Builder, value: str) -> str:
    """ONNX's ScatterND takes int64 alone."""
    return graph.cast(value, np.int64)
