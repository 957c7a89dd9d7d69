"""A small language model as a drafter: it reads a text by its tokens alone.

Axes: d model width, K draft vocabulary, V target vocabulary. Embedding and head are the model's own
rows, in the order of the target's tokens. The model's output at token t predicts token t + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.models.drafter import DraftModel
from dovetail.models.eagle3 import BlockSizes, EagleBlock
from dovetail.models.layers import RMSNorm, rotate
from dovetail.models.rope import Rope


@dataclass(frozen=True)
class LanguageConfig:
    """A language model of Llama or Qwen3 blocks. vocab_size: V, draft_vocab_size: K."""

    block: BlockSizes
    vocab_size: int
    draft_vocab_size: int
    rope: Rope
    max_position_embeddings: int
    blocks: int


class LanguageBlock(EagleBlock):
    """A block that keeps float32 where float16 weights alone would make it too coarse.

    The sums of the layers are float32. SmolLM2's reach 22,000, a third of float16's range, and a
    late layer takes most of that away again. With biases the scores of attention are float32 too:
    Qwen2.5's reach 1,200, where float16 is coarser than 0.5.
    """

    def __init__(self, sizes: BlockSizes):
        super().__init__(sizes)
        self.exact_scores = sizes.qkv_bias

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The queries, in the dtype of the scores."""
        return rotate(self._wide(self._heads("q", self.normed(x))), cos, sin)

    def keys_and_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = self.normed(x)
        return rotate(self._wide(self._heads("k", x)), cos, sin).to(self._dtype), self._heads("v", x)

    def _wide(self, x: Tensor) -> Tensor:
        return x.float() if self.exact_scores else x

    def normed(self, x: Tensor) -> Tensor:
        return super().normed(x).to(self._dtype)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.self_attn["o_proj"](attended.flatten(-2)).float()
        y = self.post_attention_layernorm(x).to(self._dtype)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y)).float()

    @property
    def _dtype(self) -> torch.dtype:
        return self.post_attention_layernorm.weight.dtype


class LanguageDrafter(DraftModel):
    """A language model. embed_tokens: [V, d], head: [K, d], d2t: [K] target ids."""

    sized = ("shape", "config")
    reads_tokens = True

    def __init__(self, config: LanguageConfig, embed_tokens: Tensor, head: Tensor, d2t: Tensor):
        sizes = config.block
        shape = sizes.shape(config.vocab_size, config.draft_vocab_size, config.blocks, config.max_position_embeddings)
        super().__init__(shape, embed_tokens, head, d2t)
        self.config = config
        self.layers = nn.ModuleList(LanguageBlock(sizes) for _ in range(config.blocks))
        self.norm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)

    def combine(self, f: Tensor, e: Tensor) -> Tensor:
        return e.float()

    def blocks(self) -> Sequence[LanguageBlock]:
        return [layer for layer in self.layers if isinstance(layer, LanguageBlock)]

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.config.rope(positions)

    def head_input(self, g: Tensor) -> Tensor:
        return self.norm(g).to(self.head.dtype)
