"""The torch module that every drafter is, and Dovetail's own drafter.

Axes: B batch, T positions, H hidden size, D feature size, V target vocabulary, K draft vocabulary.
Position t pairs feature f[t] with token x[t+1]. The output at t approximates f[t+1], so the logits
at t predict x[t+2].
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.models.config import DrafterConfig
from dovetail.models.fusion import FUSIONS, LayerMix, TapMix
from dovetail.models.layers import DraftLayer, RMSNorm, StepCache, rope_table, rotate, unrolled_attention


@dataclass(frozen=True)
class DraftShape:
    """The sizes of a drafter's graph.

    hidden_size: H, width of the token embedding. feature_size: D, width of the features that the
    drafter reads and returns. blocks: layers with keys and values. max_context: pairs.
    """

    vocab_size: int
    draft_vocab_size: int
    hidden_size: int
    feature_size: int
    blocks: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_context: int


class DraftBase(nn.Module):
    """What the torch modules of all drafters have: the rows of their vocabulary, and their features.

    embed_tokens: [V, H], head: [K, D], both frozen. d2t: [K] int64, the target id of each draft
    token. mix: how the drafter reads layers of the target; None if it reads the last feature alone.
    sized: the attributes that tell K as their draft_vocab_size.
    reads_tokens: whether the drafter reads tokens alone, and no features.
    """

    sized: ClassVar[tuple[str, ...]] = ("shape",)
    reads_tokens: ClassVar[bool] = False
    embed_tokens: Tensor
    head: Tensor
    d2t: Tensor

    def __init__(self, shape: DraftShape, embed_tokens: Tensor, head: Tensor, d2t: Tensor):
        super().__init__()
        expected = {
            "embed_tokens": (embed_tokens, (shape.vocab_size, shape.hidden_size)),
            "head": (head, (shape.draft_vocab_size, shape.feature_size)),
            "d2t": (d2t, (shape.draft_vocab_size,)),
        }
        for name, (tensor, size) in expected.items():
            if tuple(tensor.shape) != size:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the drafter's config says {size}")
            self.register_buffer(name, tensor, persistent=False)
        self.shape = shape
        self.mix: LayerMix | TapMix | None = None

    def narrowed(self, kept: Tensor) -> Self:
        """A copy that proposes fewer tokens. kept: [K] bool."""
        small = copy.deepcopy(self, {id(self.embed_tokens): self.embed_tokens})  # the rows are shared
        small.head, small.d2t = self.head[kept], self.d2t[kept]
        for name in self.sized:
            setattr(small, name, replace(getattr(self, name), draft_vocab_size=len(small.d2t)))
        return small


class DraftModel(DraftBase, ABC):
    """The torch module of a drafter that drafts a tree level by level, whatever format its checkpoint has.

    A subclass defines `combine`, `blocks` and `rope`, and `head_input` if a norm stands before the
    head. A subclass without use for features ignores f.
    """

    @abstractmethod
    def combine(self, f: Tensor, e: Tensor) -> Tensor:
        """The first layer's input. f: features [..., D], e: token embeddings [..., H]."""

    @abstractmethod
    def blocks(self) -> Sequence[DraftLayer]:
        """The layers, first to last; the last one's output is the drafter's feature [..., D]."""

    @abstractmethod
    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin of the rotary embedding, each [*positions.shape, d] float32."""

    def head_input(self, g: Tensor) -> Tensor:
        """The head's input [..., D] from output features g [..., D]."""
        return g

    def logits(self, g: Tensor) -> Tensor:
        """Logits over the draft vocabulary [..., K] from output features g [..., D]."""
        return F.linear(self.head_input(g), self.head)

    def read(self, features: Tensor) -> Tensor:
        """The feature f [..., D], from the outputs of the target that the drafter reads."""
        return features if self.mix is None else self.mix(features)

    def forward(self, f: Tensor, tokens: Tensor) -> Tensor:
        """Output features [B, T, D] of true features. f: [B, T, D], tokens: [B, T] x[t+1]."""
        return self.step(f, tokens, [[] for _ in self.blocks()])

    def step(self, f: Tensor, tokens: Tensor, caches: list[StepCache], start: int = 0, lend: int = 0) -> Tensor:
        """Run an unrolled step (EAGLE-3's training-time test); add its keys and values to `caches`.

        Step j = len(caches[0]) drafts level j of a tree at every position at once. f: [B, T, D] is
        the target's feature for j = 0, else the previous step's output shifted right by one. A
        query at t attends to step 0's keys at positions <= t - j (true features). For 0 < i <= j
        the query also attends to step i's key at t - j + i (its own drafted ancestors): the
        diagonal.
        start: steps after the first may run on positions from `start` on. f and tokens are then
        that slice, and its first j rows are void.
        lend: the first `lend` rows give keys and values only. The output is [B, T - lend, D].
        """
        x = self.combine(f, F.embedding(tokens, self.embed_tokens))
        cos, sin = self.rope(torch.arange(start, start + x.shape[1], device=x.device))
        layers = self.blocks()
        for layer, cache in zip(layers, caches, strict=True):
            q, (k, v) = layer.queries(x, cos, sin), layer.keys_and_values(x, cos, sin)
            cache.append((k, v))
            skip = lend if layer is layers[-1] else 0
            x = layer.finish(x[:, skip:], unrolled_attention(q[:, skip:], cache, start + skip))
        return x


class Block(nn.Module):
    """A Llama block, a DraftLayer. The first has no input norm: the fusion gives its input."""

    def __init__(self, config: DrafterConfig, index: int):
        super().__init__()
        size, inner, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
        self.head_dim = config.head_dim
        wide, narrow = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.input_layernorm = RMSNorm(size, eps) if index else nn.Identity()
        self.self_attn = _linears(
            q_proj=(size, wide), k_proj=(size, narrow), v_proj=(size, narrow), o_proj=(wide, size)
        )
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = _linears(gate_proj=(size, inner), up_proj=(size, inner), down_proj=(inner, size))

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(self._heads("q_proj", self.input_layernorm(x)), cos, sin)

    def keys_and_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = self.input_layernorm(x)
        k, v = self._heads("k_proj", x), self._heads("v_proj", x)
        return rotate(k, cos, sin), v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.self_attn["o_proj"](attended.flatten(-2))
        y = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))

    def _heads(self, projection: str, x: Tensor) -> Tensor:
        """x: [..., T, H] -> [..., T, heads, d]."""
        return self.self_attn[projection](x).unflatten(-1, (-1, self.head_dim))


def _linears(**sizes: tuple[int, int]) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})


class Drafter(DraftModel):
    """Dovetail's drafter: a fusion, m Llama blocks, and rows of the target's head.

    Source: Dovetail (arXiv 2412.18934). Block 0 has no input norm, no norm follows the last block,
    and the head is the target's. The draft vocabulary follows EAGLE-3 (arXiv 2503.01840).
    """

    sized = ("shape", "config")

    def __init__(self, config: DrafterConfig, embed_tokens: Tensor, head: Tensor, d2t: Tensor):
        equal = {field.name: getattr(config, field.name) for field in fields(DraftShape) if hasattr(config, field.name)}
        shape = DraftShape(**equal, max_context=config.max_position_embeddings)
        super().__init__(shape, embed_tokens, head, d2t)
        self.config = config
        self.fusion = FUSIONS[config.fusion](config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.blocks))
        if config.feature_layers:
            self.mix = LayerMix(config.feature_size, config.feature_layers, config.rms_norm_eps)

    def combine(self, f: Tensor, e: Tensor) -> Tensor:
        return self.fusion(f, e)

    def blocks(self) -> Sequence[Block]:
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rope_table(self.config.rope_theta, self.config.head_dim, positions)
