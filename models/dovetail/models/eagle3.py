"""EAGLE-3's drafter (arXiv 2503.01840) with the settings that its descendants added.

Axes: B batch, T positions, H target width, d drafter width, n taps, K draft vocabulary, V target
vocabulary. The first layer reads [n(e); n(h)], embedding and feature side by side. Its output
before the final norm is the next feature; with `norm_output` (EAGLE-3.1) the normed output is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.models.drafter import DraftModel, DraftShape
from dovetail.models.fusion import TapMix
from dovetail.models.layers import DraftLayer, RMSNorm, rotate
from dovetail.models.rope import Rope


@dataclass(frozen=True)
class BlockSizes:
    """The sizes of a Llama or Qwen3 block, and which of its parts it has.

    hidden_size: d. qkv_bias, o_bias, mlp_bias: biases of the projections. qk_norm: Qwen3's norms of
    queries and keys, each over a head.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    def shape(self, vocab_size: int, draft_vocab_size: int, blocks: int, max_context: int) -> DraftShape:
        """The sizes of a drafter of such blocks, whose features are as wide as its blocks."""
        return DraftShape(
            vocab_size=vocab_size,
            draft_vocab_size=draft_vocab_size,
            hidden_size=self.hidden_size,
            feature_size=self.hidden_size,
            blocks=blocks,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            max_context=max_context,
        )


@dataclass(frozen=True)
class Eagle3Config:
    """An EAGLE-3 drafter. target_size: H. taps: blocks of the target whose outputs it reads.

    tap_norm: see TapMix. norm_before_residual: the first layer's residual is the normed feature.
    """

    block: BlockSizes
    vocab_size: int
    draft_vocab_size: int
    target_size: int
    taps: tuple[int, ...]
    rope: Rope
    max_position_embeddings: int
    blocks: int = 1
    tap_norm: str = "none"
    norm_before_residual: bool = False
    norm_output: bool = False


class EagleBlock(nn.Module):
    """A Llama or Qwen3 block, a DraftLayer. width: of its input, d unless a subclass says another."""

    def __init__(self, sizes: BlockSizes, width: int | None = None, *, input_norm: bool = True):
        super().__init__()
        d, inner, eps = sizes.hidden_size, sizes.intermediate_size, sizes.rms_norm_eps
        self.head_dim, width = sizes.head_dim, width or d
        wide, narrow = sizes.num_attention_heads * self.head_dim, sizes.num_key_value_heads * self.head_dim
        self.input_layernorm = RMSNorm(d, eps) if input_norm else nn.Identity()
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(width, wide, bias=sizes.qkv_bias),
                "k_proj": nn.Linear(width, narrow, bias=sizes.qkv_bias),
                "v_proj": nn.Linear(width, narrow, bias=sizes.qkv_bias),
                "o_proj": nn.Linear(wide, d, bias=sizes.o_bias),
            }
        )
        if sizes.qk_norm:
            self.self_attn.update({"q_norm": RMSNorm(self.head_dim, eps), "k_norm": RMSNorm(self.head_dim, eps)})
        self.post_attention_layernorm = RMSNorm(d, eps)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(d, inner, bias=sizes.mlp_bias),
                "up_proj": nn.Linear(d, inner, bias=sizes.mlp_bias),
                "down_proj": nn.Linear(inner, d, bias=sizes.mlp_bias),
            }
        )

    def normed(self, x: Tensor) -> Tensor:
        """The input of the projections."""
        return self.input_layernorm(x)

    def residual(self, x: Tensor) -> Tensor:
        """The addend of the attention's result [..., d]."""
        return x

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(self._heads("q", self.normed(x)), cos, sin)

    def keys_and_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = self.normed(x)
        return rotate(self._heads("k", x), cos, sin), self._heads("v", x)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = self.residual(x) + self.self_attn["o_proj"](attended.flatten(-2))
        y = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))

    def _heads(self, part: str, x: Tensor) -> Tensor:
        """x: [..., T, width] -> [..., T, heads, head_dim]."""
        x = self.self_attn[f"{part}_proj"](x).unflatten(-1, (-1, self.head_dim))
        return self.self_attn[f"{part}_norm"](x) if f"{part}_norm" in self.self_attn else x


class WideBlock(EagleBlock):
    """EAGLE-3's first layer: its input is [e; h], twice as wide as its output."""

    def __init__(self, sizes: BlockSizes, *, norm_before_residual: bool):
        super().__init__(sizes, 2 * sizes.hidden_size)
        self.size, self.norm_before_residual = sizes.hidden_size, norm_before_residual
        self.hidden_norm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)

    def normed(self, x: Tensor) -> Tensor:
        e, h = x.split(self.size, dim=-1)
        return torch.cat([self.input_layernorm(e), self.hidden_norm(h)], dim=-1)

    def residual(self, x: Tensor) -> Tensor:
        h = x[..., self.size :]
        return self.hidden_norm(h) if self.norm_before_residual else h


@dataclass(frozen=True)
class NormedOutput:
    """A layer whose output passes a norm, a DraftLayer."""

    layer: DraftLayer
    norm: nn.Module

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.layer.queries(x, cos, sin)

    def keys_and_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer.keys_and_values(x, cos, sin)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        return self.norm(self.layer.finish(x, attended))


class Eagle3Drafter(DraftModel):
    """EAGLE-3's drafter. embed_tokens: [V, d], head: [K, d], d2t: [K] target ids."""

    sized = ("shape", "config")
    mix: TapMix

    def __init__(self, config: Eagle3Config, embed_tokens: Tensor, head: Tensor, d2t: Tensor):
        sizes = config.block
        shape = sizes.shape(config.vocab_size, config.draft_vocab_size, config.blocks, config.max_position_embeddings)
        super().__init__(shape, embed_tokens, head, d2t)
        self.config = config
        first = WideBlock(sizes, norm_before_residual=config.norm_before_residual)
        self.layers = nn.ModuleList([first, *(EagleBlock(sizes) for _ in range(config.blocks - 1))])
        self.norm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.mix = TapMix(sizes.hidden_size, config.target_size, config.taps, sizes.rms_norm_eps, config.tap_norm)

    def combine(self, f: Tensor, e: Tensor) -> Tensor:
        return torch.cat([e, f], dim=-1)

    def blocks(self) -> Sequence[DraftLayer]:
        layers: list[DraftLayer] = [layer for layer in self.layers if isinstance(layer, EagleBlock)]
        return [*layers[:-1], NormedOutput(layers[-1], self.norm)] if self.config.norm_output else layers

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.config.rope(positions)

    def head_input(self, g: Tensor) -> Tensor:
        return g if self.config.norm_output else self.norm(g)
