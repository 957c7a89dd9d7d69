"""The layers of drafters: norm, rotary embedding, attention, feed-forward, Llama block.

Axes: B batch, T positions, H hidden size, h query heads, g key-value heads, d head size. A layer
projects queries, keys and values. Its caller computes the attention: training over unrolled steps,
the exported graph over a static buffer. The layer's `finish` takes the result.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Keys and values of one layer over the unrolled steps: [(k, v)] with k, v [B, T, g, d].
StepCache = list[tuple[Tensor, Tensor]]


class DraftLayer(Protocol):
    """One attention layer of a drafter, as its caller sees it."""

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [..., T, H] -> rotated q [..., T, h, d]."""
        ...

    def keys_and_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x: [..., T, H] -> rotated k, and v, both [..., T, g, d]."""
        ...

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The next layer's x. x: [..., T, H], attended: [..., T, h, d]."""
        ...


class BlockSizes(Protocol):
    """What `Block` reads of a configuration."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def rms_norm_eps(self) -> float: ...


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 so that a float16 graph stays safe."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., size], any float dtype, kept."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


def rope_table(theta: float, head_dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotary embedding, each [*positions.shape, d] float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    inverse = 1.0 / (theta**exponents)
    angles = positions.float().unsqueeze(-1) * inverse
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embedding (half-split). x: [..., T, heads, d], cos, sin: [..., T, d]."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)


class Attention(nn.Module):
    """Projections of grouped-query attention without biases; the caller computes the attention."""

    def __init__(self, sizes: BlockSizes):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim
        size = sizes.hidden_size
        self.q_proj = nn.Linear(size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, size, bias=False)

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [..., T, H] -> rotated q [..., T, h, d]."""
        return rotate(self.q_proj(x).unflatten(-1, (self.heads, self.head_dim)), cos, sin)

    def keys_and_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x: [..., T, H] -> rotated k, and v, both [..., T, g, d]."""
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        return rotate(k, cos, sin), v


class MLP(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, sizes: BlockSizes):
        super().__init__()
        self.gate_proj = nn.Linear(sizes.hidden_size, sizes.intermediate_size, bias=False)
        self.up_proj = nn.Linear(sizes.hidden_size, sizes.intermediate_size, bias=False)
        self.down_proj = nn.Linear(sizes.intermediate_size, sizes.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., H] -> [..., H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One Llama block. The first block has no input norm, because the fusion gives its input."""

    def __init__(self, sizes: BlockSizes, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps) if index else nn.Identity()
        self.self_attn = Attention(sizes)
        self.post_attention_layernorm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.mlp = MLP(sizes)

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [..., T, H] -> rotated q [..., T, h, d]."""
        return self.self_attn.queries(self.input_layernorm(x), cos, sin)

    def keys_and_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x: [..., T, H] -> rotated k, and v, both [..., T, g, d]."""
        return self.self_attn.keys_and_values(self.input_layernorm(x), cos, sin)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add attention and feed-forward to x. x: [..., T, H], attended: [..., T, h, d]."""
        x = x + self.self_attn.o_proj(attended.flatten(-2))
        return x + self.mlp(self.post_attention_layernorm(x))


def unrolled_attention(q: Tensor, cache: StepCache, start: int) -> Tensor:
    """Attention [B, T, h, d] of unrolled step j = len(cache) - 1. q: [B, T, h, d], from `start` on.

    Rows t < j (from `start`) have no drafted ancestors. These rows are void and carry no loss.
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
    """Move keys and values `by` positions right, zeros entering. Each: [B, T, g, d]."""
    if by == 0:
        return pair
    k, v = (F.pad(x, (0, 0, 0, 0, by, 0))[:, : x.shape[1]] for x in pair)
    return k, v
