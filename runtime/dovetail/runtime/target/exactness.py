"""Test whether a target's rows are the same bits in every pass, which exact text depends on.

A row's logits and features must depend on the tokens before it alone, and on which of them were
prompt. The number of rows in the pass, other paths of the tree, and how the prompt was cut into
passes must not matter.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dovetail.runtime.system.arrays import SequenceId, TokenArray, strange_tokens
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.target.session import TargetPass, opened
from dovetail.runtime.tree.draft_tree import DraftTree

CONTEXT = 40  # tokens before the tree: more than a KV block, not a multiple of one
_PARENTS = (-1, 0, 1, 2, 3, 4, 1, 6, 0, 8, 3, 0)  # five paths that branch at the root and below it


def largest_difference(target: OpenVINOTarget, context: int = CONTEXT) -> float:
    """Return by how much rows of a tree after `context` tokens differ from rows of its chains.

    The chains follow the same text, read in other passes than the tree's text. The test takes about
    20 passes, in a sequence of its own.
    """
    vocab_size = target.model.vocab_size
    text = strange_tokens(0, context, vocab_size)
    nodes = len(_PARENTS)
    tree = DraftTree(strange_tokens(context, nodes, vocab_size), np.array(_PARENTS), np.zeros(nodes, np.float32))
    with opened(target) as seq:
        _read(target, seq, text, [context])
        found = _rows(target.verify({seq: tree})[seq])
        _read(target, seq, text, [context // 3, 1, context - context // 3 - 1])
        largest = 0.0
        for path in tree.paths():
            for kept in (path, path[:1]):
                target.rewind(seq, context)
                rows = _rows(target.verify({seq: DraftTree.chain(tree.tokens[kept])})[seq])
                # A NaN also counts as a difference.
                apart = np.where(rows == found[kept], 0.0, np.abs(rows - found[kept]))
                largest = max(largest, float(np.nan_to_num(apart, nan=np.inf).max()))
        return largest


def _read(target: OpenVINOTarget, seq: SequenceId, text: TokenArray, sizes: list[int]) -> None:
    target.rewind(seq, 0)
    begin = 0
    for size in sizes:
        target.prefill(seq, text[begin : begin + size])
        begin += size


def _rows(result: TargetPass) -> NDArray[np.float32]:
    return np.concatenate([result.logits, result.features], axis=1)
