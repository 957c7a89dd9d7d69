"""EAGLE-3's forward pass from its published formulas, for comparison: no module of the product.

Axes: T positions, H target width, d drafter width, n taps, K draft vocabulary.
Source: EAGLE-3 (arXiv 2503.01840), section 3, and SafeAILab's, SpecForge's and speculators' checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Flags:
    """Settings of the formats. first: the prefix of the first layer's tensors."""

    heads: int
    groups: int
    head_dim: int
    eps: float
    theta: float = 10000.0
    layers: int = 1
    first: str = "midlayer."
    norm_before_residual: bool = False
    norm_output: bool = False


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def linear(x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def turned(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding by complex numbers. x: [T, heads, d]."""
    half = x.shape[-1] // 2
    angles = positions[:, None] / theta ** (torch.arange(half) / half)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None, :]
    pairs = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def chain(w: Mapping[str, Tensor], flags: Flags, taps: Tensor, tokens: Tensor, steps: int) -> list[Tensor]:
    """Draft a chain after T known pairs, each step from its own feature and best token.

    taps: [T, n * H] outputs of the target. tokens: [T] x[t+1]. Returns the logits [K] of each step.
    """
    e = w["embed_tokens.weight"]
    f = features(w, flags, taps)  # [T, d]
    known, found = tokens, []
    for _ in range(steps):
        g = layers(w, flags, e[known], f)
        normed = rms(g[-1], w["norm.weight"], flags.eps)
        logits = w["lm_head.weight"] @ normed
        found.append(logits)
        best = logits.argmax()
        target = best + w["d2t"][best] if "d2t" in w else best
        known = torch.cat([known, target[None]])
        f = torch.cat([f, (normed if flags.norm_output else g[-1])[None]])
    return found


def features(w: Mapping[str, Tensor], flags: Flags, taps: Tensor) -> Tensor:
    if "input_norm.weight" in w:
        taps = rms(taps, w["input_norm.weight"], flags.eps)
    if norms := sorted(name for name in w if name.startswith("fc_norm.")):
        parts = taps.chunk(len(norms), dim=-1)
        taps = torch.cat([rms(part, w[name], flags.eps) for part, name in zip(parts, norms, strict=True)], dim=-1)
    return linear(taps, w, "fc")


def layers(w: Mapping[str, Tensor], flags: Flags, e: Tensor, h: Tensor) -> Tensor:
    """All layers over a whole text [T, d]: drafted positions are ordinary ones, as the text is causal."""
    x = h
    for index in range(flags.layers):
        p = flags.first if index == 0 else f"layers.{index}."
        if index == 0:
            normed = rms(x, w[f"{p}hidden_norm.weight"], flags.eps)
            residual = normed if flags.norm_before_residual else x
            inner = torch.cat([rms(e, w[f"{p}input_layernorm.weight"], flags.eps), normed], dim=-1)
        else:
            residual, inner = x, rms(x, w[f"{p}input_layernorm.weight"], flags.eps)
        x = residual + attention(w, flags, f"{p}self_attn.", inner)
        y = rms(x, w[f"{p}post_attention_layernorm.weight"], flags.eps)
        gate = linear(y, w, f"{p}mlp.gate_proj")
        x = x + linear(gate * torch.sigmoid(gate) * linear(y, w, f"{p}mlp.up_proj"), w, f"{p}mlp.down_proj")
    return x


def attention(w: Mapping[str, Tensor], flags: Flags, p: str, x: Tensor) -> Tensor:
    positions = torch.arange(len(x), dtype=torch.float32)
    q = linear(x, w, f"{p}q_proj").view(len(x), flags.heads, flags.head_dim)
    k = linear(x, w, f"{p}k_proj").view(len(x), flags.groups, flags.head_dim)
    v = linear(x, w, f"{p}v_proj").view(len(x), flags.groups, flags.head_dim)
    if f"{p}q_norm.weight" in w:
        q, k = rms(q, w[f"{p}q_norm.weight"], flags.eps), rms(k, w[f"{p}k_norm.weight"], flags.eps)
    q, k = turned(q, positions, flags.theta), turned(k, positions, flags.theta)
    rows: list[Any] = []
    for t in range(len(x)):
        heads = []
        for head in range(flags.heads):
            group = head * flags.groups // flags.heads
            weights = torch.softmax(k[: t + 1, group] @ q[t, head] / flags.head_dim**0.5, dim=0)
            heads.append(weights @ v[: t + 1, group])
        rows.append(torch.cat(heads))
    return linear(torch.stack(rows), w, f"{p}o_proj")
