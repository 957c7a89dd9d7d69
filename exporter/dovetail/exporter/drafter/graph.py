"""The drafter as one ONNX graph, which runs tree levels, accepted tokens and prompt chunks.

Axes: n tokens of a call, m query rows, T tree slots, S context pairs, K draft vocabulary, k
children per row, D = H feature and hidden size, h query heads, g key-value heads, d head size. A
call returns children for its m query rows.

A key-value buffer has T + S rows: row i < T belongs to tree node i, row T + j to context pair j.
The feature bank has T + 1 rows. Row 0 holds the root's feature and row i holds the feature of tree
node i. Row T takes features that nobody reads. Each buffer is both an input and an output of the
graph, so the caller can bind it in place.
"""

from __future__ import annotations

import copy
import importlib
from base64 import b64encode
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from dovetail.exporter.build.progress import quiet
from dovetail.models.drafter import DraftBase, DraftModel
from dovetail.models.layers import DraftLayer
from dovetail.runtime.drafter.graph_io import DRAFT_IDS, NOISE

OPSET = 20
BLOCKED = -1e4  # added to the score of a masked key; in float16's range


class DrafterGraph(nn.Module):
    """A drafter with the graph's interface. Three axes are dynamic: n, m and T + S.

    A prompt needs children for its last token only. Its other tokens leave keys and values.
    """

    target_ids: Tensor

    def __init__(self, drafter: DraftModel, tree_slots: int, top_k: int):
        super().__init__()
        self.drafter = drafter
        self.tree_slots = tree_slots
        self.top_k = top_k
        self.register_buffer("target_ids", drafter.d2t.int().unsqueeze(1), persistent=False)  # [K, 1]

    def forward(
        self,
        input_ids: Tensor,  # [n] int64, target vocabulary
        position_ids: Tensor,  # [n] int64, for RoPE
        features: Tensor,  # [n, D], of the target, for new context pairs
        feature_rows: Tensor,  # [n] int64: row of concat(bank, features)
        kv_slots: Tensor,  # [n] int64: buffer rows written
        bank_slots: Tensor,  # [n] int64: bank rows written
        context_begin: Tensor,  # [n] int64: first context pair attended to; texts have pairs of their own
        context_end: Tensor,  # [n] int64: the pair after the last one attended to
        tree_mask: Tensor,  # [n, T] additive, over tree rows
        noise: Tensor,  # [1, K] float32, added to the logits: a sampling target adds the same noise to its logits
        queries: Tensor,  # [m] int64, rows of n: only these rows get children, and the bank takes only their features
        bank: Tensor,  # [T + 1, D]
        kv: list[Tensor],  # per block [T + S, 2, g, d]; 0 = key after RoPE, 1 = value
    ) -> tuple[Tensor, ...]:
        """Return top_logprobs [m, k] float32, top_ids [m, k] int32, bank, kv per block.

        The ids are ids of the target's vocabulary.
        """
        drafter = self.drafter
        feature = nn.functional.embedding(feature_rows, torch.cat([bank, features]))  # [n, D]
        x = drafter.combine(feature, nn.functional.embedding(input_ids, drafter.embed_tokens))
        cos, sin = (table.to(bank.dtype) for table in drafter.rope(position_ids))
        written, layers = [], drafter.blocks()
        for layer, buffer in zip(layers, kv, strict=True):
            rows = queries if layer is layers[-1] else None  # later layers need keys and values of all rows
            seen, begin, end = _taken(rows, tree_mask, context_begin, context_end)
            mask = self._mask(seen, begin, end, buffer)
            x, buffer = attend(layer, x, cos, sin, mask, buffer, kv_slots, rows)
            written.append(buffer)
        logprobs, rows = torch.log_softmax(drafter.logits(x).float() + noise, dim=-1).topk(self.top_k, dim=-1)
        ids = nn.functional.embedding(rows, self.target_ids).squeeze(-1)
        return logprobs, ids, bank.index_put(_taken(queries, bank_slots), x.to(bank.dtype)), *written

    def _mask(self, tree_mask: Tensor, context_begin: Tensor, context_end: Tensor, kv: Tensor) -> Tensor:
        """Additive mask [h/g * rows, T + S]: a row attends to pairs from its context_begin to its context_end."""
        shape, dtype = self.drafter.shape, tree_mask.dtype
        pairs = torch.arange(kv.shape[0] - self.tree_slots)
        blocked = torch.tensor(BLOCKED, dtype=dtype)
        free = torch.zeros((), dtype=dtype)
        context = torch.where(pairs < context_end.unsqueeze(1), free, blocked)
        context = context + torch.where(pairs < context_begin.unsqueeze(1), blocked, free)
        mask = torch.cat([tree_mask, context], dim=1)
        return torch.cat([mask] * (shape.num_attention_heads // shape.num_key_value_heads))


def _taken(rows: Tensor | None, *values: Tensor) -> tuple[Tensor, ...]:
    """Take `rows` of each value [n] or [n, d]; None takes all rows."""
    if rows is None:
        return values
    taken = (nn.functional.embedding(rows, value.reshape(value.shape[0], -1)) for value in values)
    return tuple(some.squeeze(1) if value.dim() == 1 else some for some, value in zip(taken, values, strict=True))


def attend(
    layer: DraftLayer, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, kv: Tensor, kv_slots: Tensor,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run one layer over its static buffer, for the m `rows` of x; None runs all rows.

    x: [n, H], mask: [h/g * m, T + S] additive, kv: [T + S, 2, g, d] -> [m, H] and the buffer.
    The query heads of a group are the rows of one product, so the graph never repeats keys and
    values. Shapes depend on n through one free axis only: with `slots` fixed, no shape arithmetic
    remains.
    """
    k, v = layer.keys_and_values(x, cos, sin)  # [n, g, d]
    x, cos, sin = _taken(rows, x, cos, sin)
    q = layer.queries(x, cos, sin)  # [m, h, d]
    kv = kv.index_put((kv_slots,), torch.stack([k, v], dim=1))
    return layer.finish(x, over_buffer(q, kv, mask)), kv


def over_buffer(q: Tensor, kv: Tensor, mask: Tensor) -> Tensor:
    """Attention [m, h, d]. q: [m, h, d], kv: [T + S, 2, g, d], mask: [h/g * m, T + S] additive.

    The scores have the dtype of q, which may be wider than that of kv.
    """
    groups, size = kv.shape[2], kv.shape[3]
    repeats = q.shape[1] // groups
    q = (q * size**-0.5).unflatten(1, (groups, repeats)).permute(1, 2, 0, 3)  # [g, h/g, m, d]
    scores = q.reshape(groups, -1, size) @ kv[:, 0].permute(1, 2, 0).to(q.dtype)  # [g, h/g * m, T + S]
    out = torch.softmax(scores + mask, dim=-1).to(kv.dtype) @ kv[:, 1].permute(1, 0, 2)  # [g, h/g * m, d]
    return out.reshape(groups, repeats, -1, size).permute(2, 0, 1, 3).flatten(1, 2)  # [m, h, d]


def to_onnx(drafter: DraftModel, dtype: torch.dtype, *, tree_slots: int, top_k: int) -> ir.Model:
    """Export the drafter with weights and activations of `dtype` (float16 or float32), opset 20."""
    graph = DrafterGraph(copy.deepcopy(drafter).to(dtype).eval(), tree_slots, top_k)
    shape = drafter.shape
    tokens, slots = torch.export.Dim("tokens", min=1, max=4096), torch.export.Dim("slots", min=tree_slots + 2)
    n, rows = 3, tree_slots + 5  # any sizes that differ from all other sizes of the graph

    def index() -> Tensor:
        return torch.arange(n)

    per_token = {0: tokens}
    arguments: dict[str, tuple[Tensor, dict[int, torch.export.Dim]]] = {
        "input_ids": (index(), per_token),
        "position_ids": (index(), per_token),
        "features": (torch.zeros(n, shape.feature_size, dtype=dtype), per_token),
        "feature_rows": (index(), per_token),
        "kv_slots": (index(), per_token),
        "bank_slots": (index(), per_token),
        "context_begin": (index(), per_token),
        "context_end": (index(), per_token),
        "tree_mask": (torch.zeros(n, tree_slots, dtype=dtype), per_token),
        NOISE: (torch.zeros(1, shape.draft_vocab_size), {}),
        "queries": (torch.arange(n - 1), {0: torch.export.Dim("queries", min=1, max=4096)}),
        "bank": (torch.zeros(tree_slots + 1, shape.feature_size, dtype=dtype), {}),
    }
    kv_shape = (rows, 2, shape.num_key_value_heads, shape.head_dim)
    kv = [torch.zeros(kv_shape, dtype=dtype) for _ in range(shape.blocks)]
    return traced(graph, drafter, arguments, kv, slots, ("top_logprobs", "top_ids", "bank_out"))


def share_rows(model: ir.Model) -> None:
    """Let the head use the embedding's memory if both are the same rows, as in a tied language model."""
    initializers, name = model.graph.initializers, "drafter.head"
    embedding, head = initializers.get("drafter.embed_tokens"), initializers.get(name)
    if embedding is None or head is None or embedding.shape != head.shape:
        return
    if embedding.const_value is None or head.const_value is None:
        return
    if np.array_equal(embedding.const_value.numpy(), head.const_value.numpy()):
        ir.convenience.replace_all_uses_with(head, embedding)
        del initializers[name]


def traced(
    graph: nn.Module, drafter: DraftBase, arguments: Mapping[str, tuple[Tensor, dict[int, torch.export.Dim]]],
    kv: list[Tensor], slots: torch.export.Dim, outputs: Sequence[str],
) -> ir.Model:  # fmt: skip
    """Trace a graph of a drafter, with the ids of its draft vocabulary in the metadata.

    arguments: by name, an example of each input and its dynamic axes. kv: examples of the buffers,
    whose first axis is `slots`; they follow the other inputs and outputs.
    """
    # torch.onnx imports this module late, and after an interrupt of the import imports it again: for seconds.
    importlib.import_module("torch._dynamo")
    layers = [f"kv.{i}" for i in range(len(kv))]
    with torch.no_grad(), quiet():  # the exporter prints progress, and warnings about its own internals
        program = torch.onnx.export(
            graph,
            (*(value for value, _ in arguments.values()), kv),
            dynamo=True,
            opset_version=OPSET,
            input_names=[*arguments, *layers],
            output_names=[*outputs, *(f"{name}.out" for name in layers)],
            dynamic_shapes=(*(dims for _, dims in arguments.values()), [{0: slots}] * len(kv)),
            optimize=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props[DRAFT_IDS] = b64encode(drafter.d2t.numpy().astype("<i4").tobytes()).decode()
    return program.model
