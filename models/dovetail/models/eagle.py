"""EAGLE's first drafter (arXiv 2401.15077), which EAGLE-2, HASS and Dovetail's research code share.

Axes: V target vocabulary, d width of target and drafter. A fusion reads the target's last feature
and a token's embedding; Llama blocks follow, the first without a norm of its input. The head is the
target's. The last block's output is the next feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dovetail.models.drafter import DraftModel
from dovetail.models.eagle3 import BlockSizes, EagleBlock
from dovetail.models.fusion import ConcatFusion, DynamicGatingFusion
from dovetail.models.layers import DraftLayer, RMSNorm
from dovetail.models.rope import Rope


@dataclass(frozen=True)
class EagleConfig:
    """An EAGLE drafter. fusion: "fc" or "dgf", see FUSIONS. fusion_bias: of the former.

    norms: speculators' `layernorms`, of the embedding, the first block's input and the head's input.
    taps: none, it reads the last feature.
    """

    taps: ClassVar[tuple[int, ...]] = ()

    block: BlockSizes
    vocab_size: int
    rope: Rope
    max_position_embeddings: int
    blocks: int = 1
    fusion: str = "fc"
    fusion_bias: bool = False
    norms: bool = False

    @property
    def draft_vocab_size(self) -> int:
        """V: the drafter proposes all tokens."""
        return self.vocab_size

    @property
    def target_size(self) -> int:
        """d, also the width of the target."""
        return self.block.hidden_size


class EagleDrafter(DraftModel):
    """EAGLE's drafter over the whole vocabulary. embed_tokens, head: [V, d]."""

    def __init__(self, config: EagleConfig, embed_tokens: Tensor, head: Tensor):
        sizes = config.block
        shape = sizes.shape(config.vocab_size, config.vocab_size, config.blocks, config.max_position_embeddings)
        super().__init__(shape, embed_tokens, head, torch.arange(config.vocab_size, device=head.device))
        self.config = config
        size, eps = sizes.hidden_size, sizes.rms_norm_eps
        self.fusion = (
            DynamicGatingFusion(size, eps)
            if config.fusion == "dgf"
            else ConcatFusion(size, eps, bias=config.fusion_bias, norm=config.norms)
        )
        self.layers = nn.ModuleList(
            EagleBlock(sizes, input_norm=index > 0 or config.norms) for index in range(config.blocks)
        )
        self.norm = RMSNorm(size, eps) if config.norms else nn.Identity()

    def combine(self, f: Tensor, e: Tensor) -> Tensor:
        return self.fusion(f, e)

    def blocks(self) -> Sequence[DraftLayer]:
        return [layer for layer in self.layers if isinstance(layer, EagleBlock)]

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.config.rope(positions)

    def head_input(self, g: Tensor) -> Tensor:
        return self.norm(g)
