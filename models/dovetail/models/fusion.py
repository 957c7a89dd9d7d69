"""Fusions: each makes the drafter's input from the target's feature and a token's embedding.

Axes: B batch, T positions, H hidden = feature size. f: feature [B, T, H], e: embedding [B, T, H].
A fusion is an nn.Module with `forward(f, e) -> [B, T, H]`. `FUSIONS` lists the fusions by name.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.models.layers import RMSNorm


class DynamicGatingFusion(nn.Module):
    """Dynamic gating fusion (Dovetail, arXiv 2412.18934, section 3.2).

    h1 = f W1, h2 = SiLU(RMSNorm(e) W2), z = sigmoid([h1; h2] Wz), out = z h1 + (1 - z) h2.
    No bias, Xavier initialisation. nn.Linear stores (out, in); the paper's files store (in, out).
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.input_layernorm = RMSNorm(size, eps)
        self.w1 = nn.Linear(size, size, bias=False)
        self.w2 = nn.Linear(size, size, bias=False)
        self.wz = nn.Linear(2 * size, size, bias=False)
        for linear in (self.w1, self.w2, self.wz):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, f: Tensor, e: Tensor) -> Tensor:
        h1 = self.w1(f)
        h2 = F.silu(self.w2(self.input_layernorm(e)))
        z = torch.sigmoid(self.wz(torch.cat([h1, h2], dim=-1)))
        return z * h1 + (1 - z) * h2


class ConcatFusion(nn.Module):
    """EAGLE's fusion (arXiv 2401.15077) for ablation and import: one linear layer over [e; f].

    norm: whether an RMSNorm of the embedding comes first, as in speculators' `layernorms`.
    """

    def __init__(self, size: int, eps: float, *, bias: bool = False, norm: bool = False):
        super().__init__()
        self.embedding_layernorm = RMSNorm(size, eps) if norm else nn.Identity()
        self.fc = nn.Linear(2 * size, size, bias=bias)
        nn.init.xavier_uniform_(self.fc.weight)

    def forward(self, f: Tensor, e: Tensor) -> Tensor:
        return self.fc(torch.cat([self.embedding_layernorm(e), f], dim=-1))


class TapMix(nn.Module):
    """EAGLE-3's features (arXiv 2503.01840): one linear layer over outputs of several target layers.

    f = P [n(l1); ...; n(ln)]. tap_norm: "none"; "each" for an RMSNorm of every output (EAGLE-3.1's
    `fc_norm`); "all" for an RMSNorm of their concatenation (speculators' `norm_before_fc`).
    """

    adds_last = False

    def __init__(self, size: int, target_size: int, layers: tuple[int, ...], eps: float, tap_norm: str = "none"):
        super().__init__()
        self.target_size, self.layers, self.eps, self.tap_norm = target_size, layers, eps, tap_norm
        self.fc = nn.Linear(len(layers) * target_size, size, bias=False)
        if tap_norm == "each":
            self.fc_norm = nn.ModuleList([RMSNorm(target_size, eps) for _ in layers])
        if tap_norm == "all":
            self.input_norm = RMSNorm(len(layers) * target_size, eps)

    def forward(self, features: Tensor) -> Tensor:
        """features: [..., n * target_size] -> [..., size]."""
        if self.tap_norm == "each":
            parts = features.split(self.target_size, dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        if self.tap_norm == "all":
            features = self.input_norm(features)
        return self.fc(features)

    def folded(self) -> Tensor:
        """P [size, n * target_size] with the weights of the norms in its columns."""
        if self.tap_norm == "each":
            return self.fc.weight * torch.cat([norm.weight for norm in self.fc_norm if isinstance(norm, RMSNorm)])
        return self.fc.weight * self.input_norm.weight if self.tap_norm == "all" else self.fc.weight


class LayerMix(nn.Module):
    """Mixes the outputs of the target's blocks `layers` into the last feature; a fusion reads the sum.

    f = last + P [rms(l1); ...; rms(lL)]. P starts at zero, so an untrained mix returns the last
    feature. f stays in the space of the drafter's own outputs, which replace f after the first
    step. The runtime computes the mix inside the target's graph.
    Source of the choice of blocks: EAGLE-3 (arXiv 2503.01840).
    """

    adds_last, tap_norm = True, "each"

    def __init__(self, size: int, layers: tuple[int, ...], eps: float):
        super().__init__()
        self.size, self.layers, self.eps = size, layers, eps
        self.proj = nn.Linear(len(layers) * size, size, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, features: Tensor) -> Tensor:
        """features: [..., (L + 1) * size], the last feature at the end -> [..., size]."""
        *layers, last = features.split(self.size, dim=-1)
        normed = [x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) for x in layers]
        return last + self.proj(torch.cat(normed, dim=-1))

    def folded(self) -> Tensor:
        """P [size, L * size]."""
        return self.proj.weight


FUSIONS: dict[str, type[DynamicGatingFusion] | type[ConcatFusion]] = {"dgf": DynamicGatingFusion, "fc": ConcatFusion}
