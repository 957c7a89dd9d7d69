"""What the layers of drafters share: norm, rotary embedding, attention of unrolled steps.

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

    def keys_and_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x: [..., T, H] -> rotated k, and v, both [..., T, g, d]."""

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The next layer's x. x: [..., T, H], attended: [..., T, h, d]."""


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 so that a float16 graph stays safe."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., size], any float dtype, kept."""
        y = x.float()
        y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + self.eps)  # ONNX Runtime fuses this spelling
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
