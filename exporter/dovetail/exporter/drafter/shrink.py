"""Measures a drafter's activations on a GPU, and makes a drafter that needs less GPU memory.

Axes: K draft vocabulary, D feature size.
"""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from pathlib import Path

import numpy as np
import onnx
import sympy
import torch

from dovetail.models.drafter import DraftBase
from dovetail.runtime.drafter.graph_io import CHUNK
from dovetail.runtime.drafter.vram import ARENA_COPIES, CONTEXT, CONTEXT_STEP, VramPlan
from dovetail.runtime.errors import ExportError

LEAST_VOCABULARY = 1024  # draft tokens


def workspace(file: Path, tree_slots: int) -> tuple[int, int]:
    """Return the activation bytes of a graph's largest call: fixed, and per context pair.

    The peak is a maximum of lines in the context's length. A line through a short and a long
    context therefore lies above the peak of every context between the two.
    """
    model = onnx.load(file, load_external_data=False)
    low, high = (peak_bytes(model, CHUNK, tree_slots + context) for context in (CONTEXT_STEP, CONTEXT))
    per_pair = -(-(high - low) // (CONTEXT - CONTEXT_STEP))
    return max(low - per_pair * CONTEXT_STEP, 0), per_pair


def peak_bytes(model: onnx.ModelProto, tokens: int, slots: int) -> int:
    """Return the peak bytes of a graph's activations, each kept from its node to its last reader.

    Inputs, outputs and weights do not count. ONNX Runtime may need less, because it works in place.
    """
    fixed = {"tokens": tokens, "queries": tokens, "slots": slots}
    sizes = {value.name: _nbytes(value.type.tensor_type, fixed) for value in model.graph.value_info}
    nodes = model.graph.node
    last = {name: index for index, node in enumerate(nodes) for name in node.input}
    alive: dict[str, int] = {}
    peak = 0
    for index, node in enumerate(nodes):
        alive |= {name: sizes.get(name, 0) for name in node.output}
        peak = max(peak, sum(alive.values()))
        alive = {name: size for name, size in alive.items() if last.get(name, index) > index}
    return peak


def narrowed(drafter: DraftBase, plan: VramPlan, limit: int, keep: Collection[int]) -> DraftBase:
    """Return the drafter with fewer draft tokens, so that `plan` fits `limit` bytes.

    The tokens in `keep` stay, and then the tokens with the lowest ids, which BPE merged first.
    Raises ExportError with the plan if LEAST_VOCABULARY tokens do not fit.
    """
    size, total = drafter.shape.draft_vocab_size, plan.total
    each = 2 * drafter.shape.feature_size + 4  # bytes of a draft token: its row of the head and its target id
    if torch.equal(drafter.head, drafter.embed_tokens):
        total += 2 * drafter.shape.feature_size * size  # fewer rows no longer share the embedding's memory
        each += ARENA_COPIES * CHUNK * 8  # a float32 before and one after the softmax, in each row of a call
    fewer = size + (limit - total) // each
    least = min(LEAST_VOCABULARY, size)
    if fewer < least:
        raise ExportError(
            f"the drafter does not fit {limit / 2**20:.1f} MiB of VRAM with {least} draft tokens either: {plan}: give "
            "a larger --vram"
        )
    kept = torch.isin(drafter.d2t, torch.tensor(sorted(keep), dtype=torch.int64))
    kept[torch.nonzero(~kept).flatten()[: max(0, fewer - int(kept.sum()))]] = True
    return drafter.narrowed(kept).eval()


def _nbytes(tensor: onnx.TypeProto.Tensor, fixed: dict[str, int]) -> int:
    """Bytes of a tensor whose dimensions are numbers or terms like "3*tokens"."""
    dims = (dim.dim_value or int(sympy.sympify(dim.dim_param).subs(fixed)) for dim in tensor.shape.dim)
    return prod(dims) * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).itemsize
