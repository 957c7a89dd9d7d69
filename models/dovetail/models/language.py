"""A small language model as a drafter: it reads a text by its tokens alone.

Axes: d model width, K draft vocabulary, V target vocabulary. Embedding and head are the model's own
rows, in the order of the target's tokens. The model's output at token t predicts token t + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from dovetail.models.drafter import DraftModel
from dovetail.models.eagle3 import BlockSizes, EagleBlock
from dovetail.models.layers import RMSNorm
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


class LanguageDrafter(DraftModel):
    """A language model. embed_tokens: [V, d], head: [K, d], d2t: [K] target ids."""

    sized = ("shape", "config")
    reads_tokens = True

    def __init__(self, config: LanguageConfig, embed_tokens: Tensor, head: Tensor, d2t: Tensor):
        sizes = config.block
        shape = sizes.shape(config.vocab_size, config.draft_vocab_size, config.blocks, config.max_position_embeddings)
        super().__init__(shape, embed_tokens, head, d2t)
        self.config = config
        self.layers = nn.ModuleList(EagleBlock(sizes) for _ in range(config.blocks))
        self.norm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)

    def combine(self, f: Tensor, e: Tensor) -> Tensor:
        return e

    def blocks(self) -> Sequence[EagleBlock]:
        return [layer for layer in self.layers if isinstance(layer, EagleBlock)]

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.config.rope(positions)

    def head_input(self, g: Tensor) -> Tensor:
        return self.norm(g)
