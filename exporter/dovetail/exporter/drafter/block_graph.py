"""A DFlash drafter as one ONNX graph, which reads context and drafts a block in the same call.

Axes: n context rows of a call, B tokens of a block, P drafted tokens, T block slots, S context
rows, K draft vocabulary, k candidates of a token, D = H feature and hidden size, h query heads, g
key-value heads, d head size.

A key-value buffer has T + S rows: row i < B belongs to row i of the block, row T + j to context row
j. No row attends to the rows from B to T - 1; a call writes context rows that are none to row T - 1.
Each buffer is both an input and an output of the graph, so the caller can bind it in place.
"""

from __future__ import annotations

import copy

import onnx_ir as ir
import torch
from torch import Tensor, nn

from dovetail.exporter.drafter.graph import BLOCKED, over_buffer, traced
from dovetail.models.dflash import DFlash, Sight
from dovetail.runtime.drafter.graph_io import NOISE


class BlockGraph(nn.Module):
    """A DFlash drafter with the graph's interface. Two axes are dynamic: n and T + S."""

    target_ids: Tensor
    masks: Tensor

    def __init__(self, drafter: DFlash, slots: int, top_k: int):
        super().__init__()
        self.drafter, self.slots, self.top_k = drafter, slots, top_k
        config = drafter.config
        rows = drafter.embed_tokens[config.mask_token].repeat(config.block_size - 1, 1)
        self.register_buffer("masks", rows, persistent=False)  # [B - 1, H]
        self.register_buffer("target_ids", drafter.d2t.int().unsqueeze(1), persistent=False)  # [K, 1]

    def forward(
        self,
        token: Tensor,  # [1] int64, the last known token, target vocabulary
        context_begin: Tensor,  # [1] int64: first context row that the block attends to
        context_end: Tensor,  # [1] int64: the row after the last one attended to, new rows included
        kv_slots: Tensor,  # [n] int64: buffer rows written, T + context_begin + position
        noise: Tensor,  # [P, K] float32, added to the logits: a sampling target adds the same noise to its logits
        features: Tensor,  # [n, D], mixed, of the target, for new context rows
        kv: list[Tensor],  # per layer [T + S, 2, g, d]; 0 = key after RoPE, 1 = value
    ) -> tuple[Tensor, ...]:
        """Return top_logprobs [P, k] float32, top_ids [P, k] int32, kv per layer.

        The ids are ids of the target's vocabulary.
        """
        drafter = self.drafter
        own = torch.arange(drafter.config.block_size)
        x = torch.cat([nn.functional.embedding(token, drafter.embed_tokens), self.masks])  # [B, H]
        context, slots = drafter.hidden_norm(features), torch.cat([own, kv_slots])
        positions = torch.cat([context_end - context_begin + own, kv_slots - self.slots - context_begin])
        cos, sin = (table.to(x.dtype) for table in drafter.config.rope(positions))
        masks, written = dict[Sight, Tensor](), []
        for layer, buffer in zip(drafter.blocks(), kv, strict=True):
            if layer.sight not in masks:
                masks[layer.sight] = self._mask(layer.sight, context_begin, context_end, buffer)
            rows = layer.input_layernorm(x)
            q = layer.queries(rows, cos[: len(own)], sin[: len(own)])  # [B, h, d]
            k, v = layer.keys_and_values(torch.cat([rows, context]), cos, sin)  # [B + n, g, d]
            buffer = buffer.index_put((slots,), torch.stack([k, v], dim=1))
            x = layer.finish(x, over_buffer(q, buffer, masks[layer.sight]))
            written.append(buffer)
        logprobs, rows = torch.log_softmax(drafter.logits(x).float() + noise, dim=-1).topk(self.top_k, dim=-1)
        return logprobs, nn.functional.embedding(rows, self.target_ids).squeeze(-1), *written

    def _mask(self, sight: Sight, context_begin: Tensor, context_end: Tensor, kv: Tensor) -> Tensor:
        """Additive mask [h/g * B, T + S] of one kind of layer."""
        shape, block, dtype = self.drafter.shape, self.drafter.config.block_size, kv.dtype
        free, blocked = torch.zeros((), dtype=dtype), torch.tensor(BLOCKED, dtype=dtype)
        own = torch.full((block, self.slots), BLOCKED, dtype=dtype)
        seen = torch.ones(block, block, dtype=torch.bool)
        own[:, :block] = torch.where(seen.tril() if sight.causal else seen, free, blocked)
        rows = torch.arange(kv.shape[0] - self.slots)
        read = (rows < context_end).expand(block, -1)
        if sight.reach is not None:
            read = read & (rows >= context_end - torch.tensor(sight.reach).unsqueeze(1))
        context = torch.where(read, free, blocked) + torch.where(rows < context_begin, blocked, free)
        mask = torch.cat([own, context], dim=1)
        return torch.cat([mask] * (shape.num_attention_heads // shape.num_key_value_heads))


def to_onnx(drafter: DFlash, dtype: torch.dtype, *, slots: int, top_k: int) -> ir.Model:
    """Export the drafter with weights and activations of `dtype` (float16 or float32)."""
    graph = BlockGraph(copy.deepcopy(drafter).to(dtype).eval(), slots, top_k)
    shape, count = drafter.shape, drafter.config.positions
    tokens, all_rows = torch.export.Dim("tokens", min=1, max=4096), torch.export.Dim("slots", min=slots + 2)
    n, rows = 3, slots + 5  # any sizes that differ from all other sizes of the graph
    arguments: dict[str, tuple[Tensor, dict[int, torch.export.Dim]]] = {
        "token": (torch.zeros(1, dtype=torch.int64), {}),
        "context_begin": (torch.zeros(1, dtype=torch.int64), {}),
        "context_end": (torch.ones(1, dtype=torch.int64), {}),
        "kv_slots": (torch.arange(n), {0: tokens}),
        NOISE: (torch.zeros(count, shape.draft_vocab_size), {}),
        "features": (torch.zeros(n, shape.feature_size, dtype=dtype), {0: tokens}),
    }
    kv = [torch.zeros(rows, 2, shape.num_key_value_heads, shape.head_dim, dtype=dtype) for _ in range(shape.blocks)]
    return traced(graph, drafter, arguments, kv, all_rows, ("top_logprobs", "top_ids"))
