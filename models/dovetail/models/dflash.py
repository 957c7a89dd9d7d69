"""The torch module of a DFlash drafter, which drafts a block of tokens in one pass.

Axes: n context rows, B tokens of a block, P drafted tokens, H hidden size, V target vocabulary, K
draft vocabulary, h query heads, g key-value heads, d head size.

A block is the last known token and B - 1 mask tokens, at the positions after the n context rows. A
context row is the target's mixed feature of one known token. Every layer projects keys and values
of the context from the same rows. The block attends to the context and to itself, in both
directions unless a layer is causal. Row i of the block predicts the token at its own position, or
the next token if the drafter also samples from the known token.
Source: DFlash (arXiv 2602.06036).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.models.drafter import DraftBase
from dovetail.models.eagle3 import BlockSizes, EagleBlock
from dovetail.models.fusion import TapMix
from dovetail.models.layers import RMSNorm
from dovetail.models.rope import Rope


@dataclass(frozen=True)
class Sight:
    """Which keys the rows of a block see in one layer.

    causal: in the block, a row sees no row after it. reach: [B], how many of the last context rows
    each row of the block sees; None for all.
    """

    causal: bool = False
    reach: tuple[int, ...] | None = None


@dataclass(frozen=True)
class DFlashConfig:
    """The sizes and settings of a DFlash drafter.

    taps: blocks of the target, 0 the first, whose outputs `fc` mixes, in the order of its columns.
    sights: one for each layer. from_anchor: the known token's row predicts too, so that P is B in
    place of B - 1.
    """

    block: BlockSizes
    vocab_size: int
    draft_vocab_size: int
    block_size: int
    mask_token: int
    taps: tuple[int, ...]
    sights: tuple[Sight, ...]
    rope: Rope
    max_position_embeddings: int
    from_anchor: bool = False

    @property
    def target_size(self) -> int:
        """H, also the width of the drafter."""
        return self.block.hidden_size

    @property
    def positions(self) -> int:
        """P, the tokens that one pass drafts."""
        return self.block_size - (not self.from_anchor)


class DFlashLayer(EagleBlock):
    """A Qwen3 block whose callers norm the rows of the block, because context rows need no norm."""

    def __init__(self, sizes: BlockSizes, sight: Sight):
        super().__init__(sizes)
        self.sight = sight

    def normed(self, x: Tensor) -> Tensor:
        return x


class DFlash(DraftBase):
    """The module that the exporter turns into a block graph. D is H."""

    sized = ("shape", "config")
    mix: TapMix

    def __init__(self, config: DFlashConfig, embed_tokens: Tensor, head: Tensor, d2t: Tensor):
        sizes = config.block
        size, eps = sizes.hidden_size, sizes.rms_norm_eps
        shape = sizes.shape(
            config.vocab_size, config.draft_vocab_size, len(config.sights), config.max_position_embeddings
        )
        super().__init__(shape, embed_tokens, head, d2t)
        self.config = config
        self.mix = TapMix(size, size, config.taps, eps)
        self.hidden_norm = RMSNorm(size, eps)
        self.layers = nn.ModuleList(DFlashLayer(sizes, sight) for sight in config.sights)
        self.norm = RMSNorm(size, eps)

    def blocks(self) -> list[DFlashLayer]:
        return [layer for layer in self.layers if isinstance(layer, DFlashLayer)]

    def block(self, token: Tensor) -> Tensor:
        """Embeddings [B, H] of a block. token: [1] int64, the last known token."""
        masks = self.embed_tokens[self.config.mask_token].expand(self.config.block_size - 1, -1)
        return torch.cat([F.embedding(token, self.embed_tokens), masks])

    def logits(self, x: Tensor) -> Tensor:
        """Logits over the draft vocabulary [P, K] from the last layer's output x [B, H]."""
        return F.linear(self.norm(x[self.config.block_size - self.config.positions :]), self.head)

    def forward(self, features: Tensor, token: Tensor) -> Tensor:
        """Logits [P, K] of the tokens after `token` [1]. features: [n, H], mixed by `mix`."""
        x, context = self.block(token), self.hidden_norm(features)
        cos, sin = self.config.rope(torch.arange(len(features) + len(x), device=x.device))
        for layer in self.blocks():
            rows = layer.input_layernorm(x)
            q = layer.queries(rows, cos[-len(x) :], sin[-len(x) :])
            k, v = layer.keys_and_values(torch.cat([context, rows]), cos, sin)
            x = layer.finish(x, _attention(q, k, v, visible(layer.sight, len(x), len(features))))
        return self.logits(x)


def visible(sight: Sight, block: int, context: int) -> Tensor:
    """Which of n context rows and then B block rows each row of the block sees: [B, n + B] bool."""
    own = torch.ones(block, block, dtype=torch.bool)
    reach = torch.full((block,), context) if sight.reach is None else torch.tensor(sight.reach)
    seen = torch.arange(context) >= context - reach.unsqueeze(1)
    return torch.cat([seen, own.tril() if sight.causal else own], dim=1)


def _attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention [B, h, d]. q: [B, h, d], k, v: [n + B, g, d], seen: [B, n + B]."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = torch.einsum("bhd,nhd->hbn", q * q.shape[-1] ** -0.5, k)
    weights = torch.softmax(scores.masked_fill(~seen, torch.finfo(scores.dtype).min), dim=-1)
    return torch.einsum("hbn,nhd->bhd", weights, v)
