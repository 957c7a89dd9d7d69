"""The drafter: a fusion, m Llama blocks, and the target's own embedding and head rows.

Axes: B batch, T positions, H hidden = feature size, K draft vocabulary, h query heads, g key-value
heads, d head size.  Position t pairs feature f[t] with token x[t+1]; its output approximates f[t+1],
so `logits` there are over x[t+2].

Source: Dovetail (arXiv 2412.18934): block 0 has no input norm, there is no final norm, the head is the
target's.  The draft vocabulary is EAGLE-3's (arXiv 2503.01840), with absolute target ids in `d2t`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.models.config import DrafterConfig
from dovetail.models.fusion import FUSIONS, LayerMix, RMSNorm


def rope_table(config: DrafterConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for rotary embedding, each [*positions.shape, d] float32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    inverse = 1.0 / (config.rope_theta**exponents)
    angles = positions.float().unsqueeze(-1) * inverse
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embedding in the half-split layout.  x: [..., T, heads, d], cos/sin: [..., T, d]."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)


class Attention(nn.Module):
    """Grouped-query attention without biases; the caller decides what is attended to."""

    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        size = config.hidden_size
        self.q_proj = nn.Linear(size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, size, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: [..., T, H] -> q [..., T, h, d], k and v [..., T, g, d]; q and k are rotated."""
        return self.queries(x, cos, sin), *self.keys_and_values(x, cos, sin)

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [..., T, H] -> [..., T, h, d], rotated."""
        return rotate(self.q_proj(x).unflatten(-1, (self.heads, self.head_dim)), cos, sin)

    def keys_and_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x: [..., T, H] -> k, rotated, and v, both [..., T, g, d]."""
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        return rotate(k, cos, sin), v


class MLP(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., H] -> [..., H]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One Llama block; the first has no input norm (its input comes from the fusion)."""

    def __init__(self, config: DrafterConfig, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps) if index else nn.Identity()
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residuals and feed-forward.  x: [..., T, H], attended: [..., T, h, d]."""
        x = x + self.self_attn.o_proj(attended.flatten(-2))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


# Keys and values of one block over the unrolled steps: [(k, v)] with k, v [B, T, g, d].
StepCache = list[tuple[Tensor, Tensor]]


class Drafter(nn.Module):
    """Fusion + blocks + frozen embedding [V, H], head rows [K, H] and `d2t` [K] int64 (target ids)."""

    embed_tokens: Tensor
    head: Tensor
    d2t: Tensor

    def __init__(self, config: DrafterConfig, embed_tokens: Tensor, head: Tensor, d2t: Tensor):
        super().__init__()
        expected = {
            "embed_tokens": (embed_tokens, (config.vocab_size, config.hidden_size)),
            "head": (head, (config.draft_vocab_size, config.hidden_size)),
            "d2t": (d2t, (config.draft_vocab_size,)),
        }
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the drafter's config says {shape}")
        self.config = config
        self.fusion = FUSIONS[config.fusion](config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.blocks))
        wide = len(config.feature_layers)
        self.mix = LayerMix(config.feature_size, wide, config.rms_norm_eps) if wide else None
        self.register_buffer("embed_tokens", embed_tokens, persistent=False)
        self.register_buffer("head", head, persistent=False)
        self.register_buffer("d2t", d2t, persistent=False)

    def blocks(self) -> Sequence[Block]:
        """The Llama blocks, typed."""
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def read(self, features: Tensor) -> Tensor:
        """What `step` takes for the target's feature, [..., D], from all that is read of it, [..., (L + 1) * D]."""
        return features if self.mix is None else self.mix(features)

    def logits(self, g: Tensor) -> Tensor:
        """Draft-vocabulary logits [..., K] of output features g [..., H]."""
        return F.linear(g, self.head)

    def forward(self, f: Tensor, tokens: Tensor) -> Tensor:
        """Causal pass over true features: f [B, T, H], tokens [B, T] (x[t+1]) -> output features [B, T, H]."""
        return self.step(f, tokens, [[] for _ in self.layers])

    def step(self, f: Tensor, tokens: Tensor, caches: list[StepCache], start: int = 0, lend: int = 0) -> Tensor:
        """One unrolled step (EAGLE-3's training-time test); appends this step's keys and values to `caches`.

        Step j = len(caches[0]) replays drafting level j at every position at once.  f: [B, T, H] is the
        target's feature for j = 0, else the previous step's output shifted right by one.  A query at t
        attends, in step 0's keys, to positions <= t - j (true features) and, for 0 < i <= j, to step i's
        key at t - j + i (its own drafted ancestors): the diagonal.  Steps after the first may run on the
        positions from `start` on alone; f and tokens are then that slice, and its first j rows are void.
        The first `lend` rows only lend their keys and values: the output is [B, T - lend, H].
        """
        x = self.fusion(f, F.embedding(tokens, self.embed_tokens))
        cos, sin = rope_table(self.config, torch.arange(start, start + x.shape[1], device=x.device))
        for block, cache in zip(self.blocks(), caches, strict=True):
            q, k, v = block.self_attn.project(block.input_layernorm(x), cos, sin)
            cache.append((k, v))
            skip = lend if block is self.layers[-1] else 0
            x = block.finish(x[:, skip:], unrolled_attention(q[:, skip:], cache, start + skip))
        return x


def unrolled_attention(q: Tensor, cache: StepCache, start: int) -> Tensor:
    """Attention of unrolled step j = len(cache) - 1.  q: [B, T, h, d] of positions start.. -> [B, T, h, d].

    Rows t < j (from `start`) have no such ancestors: they are void and carry no loss.
    """
    step = len(cache) - 1
    _, rows, heads, size = q.shape
    base_k, base_v = cache[0]
    length, groups = base_k.shape[1:3]
    q = q.unflatten(2, (groups, heads // groups)) * size**-0.5  # [B, T, g, r, d]
    scores = torch.einsum("btgrd,bsgd->bgrts", q, base_k)
    past = torch.ones(rows, length, dtype=torch.bool, device=q.device).tril(start - step)
    scores = scores.masked_fill(~past, torch.finfo(scores.dtype).min)
    diagonal = [shift(pair, step - i) for i, pair in enumerate(cache) if i > 0]
    own = [torch.einsum("btgrd,btgd->bgrt", q, k).unsqueeze(-1) for k, _ in diagonal]
    weights = torch.softmax(torch.cat([scores, *own], dim=-1), dim=-1)
    out = torch.einsum("bgrts,bsgd->btgrd", weights[..., :length], base_v)
    for i, (_, v) in enumerate(diagonal):
        out = out + torch.einsum("bgrt,btgd->btgrd", weights[..., length + i], v)
    return out.flatten(2, 3)


def shift(pair: tuple[Tensor, Tensor], by: int) -> tuple[Tensor, Tensor]:
    """Move keys and values `by` positions right, zeros entering.  Each: [B, T, g, d]."""
    if by == 0:
        return pair
    k, v = (F.pad(x, (0, 0, 0, 0, by, 0))[:, : x.shape[1]] for x in pair)
    return k, v
