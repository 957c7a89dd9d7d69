"""EAGLE's forward pass from its published formulas, for comparison: no module of the product.

Axes: T positions, d width of target and drafter, V vocabulary.
Sources: EAGLE (arXiv 2401.15077), section 4.1, SafeAILab's and speculators' checkpoints; for the
gated fusion Dovetail (arXiv 2412.18934), section 3.2. Tensors have SafeAILab's names.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tests.models.formats.eagle3_forward import Flags, attention, linear, rms
from torch import Tensor


def chain(w: Mapping[str, Tensor], flags: Flags, f: Tensor, tokens: Tensor, steps: int) -> list[Tensor]:
    """Draft a chain after T known pairs, each step from its own feature and best token.

    f: [T, d] last features of the target. tokens: [T] x[t+1]. Returns the logits [V] of each step.
    """
    known, found = tokens, []
    for _ in range(steps):
        g = layers(w, flags, fused(w, flags, w["embed_tokens.weight"][known], f))
        read = rms(g[-1], w["lm_head_layernorm.weight"], flags.eps) if "lm_head_layernorm.weight" in w else g[-1]
        logits = w["lm_head.weight"] @ read
        found.append(logits)
        known = torch.cat([known, logits.argmax()[None]])
        f = torch.cat([f, g[-1:]])
    return found


def fused(w: Mapping[str, Tensor], flags: Flags, e: Tensor, f: Tensor) -> Tensor:
    """One linear layer over [e; f], or the gated fusion, whose matrices are (in, out)."""
    if "W_z" in w:
        h1 = f @ w["W_1"]
        h2 = rms(e, w["input_layernorm.weight"], flags.eps) @ w["W_2"]
        h2 = h2 * torch.sigmoid(h2)
        z = torch.sigmoid(torch.cat([h1, h2], dim=-1) @ w["W_z"])
        return z * h1 + (1 - z) * h2
    if "embed_layernorm.weight" in w:
        e = rms(e, w["embed_layernorm.weight"], flags.eps)
    return linear(torch.cat([e, f], dim=-1), w, "fc")


def layers(w: Mapping[str, Tensor], flags: Flags, x: Tensor) -> Tensor:
    """All blocks over a whole text [T, d]; a block has a norm of its input if there is one in `w`."""
    for index in range(flags.layers):
        p = f"layers.{index}."
        norm = w.get(f"{p}input_layernorm.weight")
        x = x + attention(w, flags, f"{p}self_attn.", x if norm is None else rms(x, norm, flags.eps))
        y = rms(x, w[f"{p}post_attention_layernorm.weight"], flags.eps)
        gate = linear(y, w, f"{p}mlp.gate_proj")
        x = x + linear(gate * torch.sigmoid(gate) * linear(y, w, f"{p}mlp.up_proj"), w, f"{p}mlp.down_proj")
    return x
