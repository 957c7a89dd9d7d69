"""DFlash checkpoints in the published layouts, and their forward written from the published formulas.

The forward reads the raw tensors and computes in float64, one query after the other. It shares no
code with the product. Axes: n context tokens, B block, P drafted tokens, H hidden, K draft vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Flags:
    """How a checkpoint is made. taps: blocks of the target, by their outputs."""

    layout: str = "z-lab"  # or speculators
    vocabulary: int = 264
    hidden: int = 32
    depth: int = 4  # of the target
    taps: tuple[int, ...] = (0, 2)
    layers: int = 2
    block: int = 5
    mask: int = 262
    causal: bool | None = None  # z-lab's setting
    causal_name: str = "causal"  # JetSpec's is causal_head
    from_anchor: bool = False
    sliding: tuple[bool, ...] = (False, False)
    window: int = 6
    two_ways: bool = False  # speculators' sliding_window_non_causal
    draft: int | None = None  # size of a random draft vocabulary
    kept: tuple[int, ...] = ()  # a draft vocabulary by its ids
    own_rows: bool = False  # embedding and head of its own
    qk_norm: bool = True
    theta: float = 10000.0
    seed: int = 0

    def with_(self, **changes: Any) -> Flags:
        return replace(self, **changes)


HEADS, GROUPS, SIZE, INNER, EPS = 4, 2, 16, 48, 1e-6


def ids_of(flags: Flags) -> Array:
    """Target ids [K] of the draft tokens."""
    if flags.kept:
        return np.sort(flags.kept)
    if flags.draft is None:
        return np.arange(flags.vocabulary)
    return np.sort(np.random.default_rng(flags.seed).choice(flags.vocabulary, flags.draft, replace=False))


def tensors_of(flags: Flags) -> dict[str, torch.Tensor]:
    torch.manual_seed(flags.seed)
    size = flags.hidden

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns) / columns**0.5

    def norm(length: int) -> torch.Tensor:
        return 1 + 0.2 * torch.randn(length)

    tensors = {
        "fc.weight": matrix(size, len(flags.taps) * size), "hidden_norm.weight": norm(size), "norm.weight": norm(size)
    }  # fmt: skip
    for number in range(flags.layers):
        layer = f"layers.{number}."
        tensors |= {
            f"{layer}input_layernorm.weight": norm(size),
            f"{layer}post_attention_layernorm.weight": norm(size),
            f"{layer}self_attn.q_proj.weight": matrix(HEADS * SIZE, size),
            f"{layer}self_attn.k_proj.weight": matrix(GROUPS * SIZE, size),
            f"{layer}self_attn.v_proj.weight": matrix(GROUPS * SIZE, size),
            f"{layer}self_attn.o_proj.weight": matrix(size, HEADS * SIZE),
            f"{layer}mlp.gate_proj.weight": matrix(INNER, size),
            f"{layer}mlp.up_proj.weight": matrix(INNER, size),
            f"{layer}mlp.down_proj.weight": matrix(size, INNER),
        }
        if flags.qk_norm:
            tensors |= {f"{layer}self_attn.{part}_norm.weight": norm(SIZE) for part in "qk"}
    ids = ids_of(flags)
    if flags.own_rows:
        tensors["embed_tokens.weight"] = torch.randn(flags.vocabulary, size)
        tensors["lm_head.weight"] = torch.randn(len(ids), size)
    if len(ids) < flags.vocabulary:
        tensors["d2t"] = torch.from_numpy(ids - np.arange(len(ids)))
        tensors["t2d"] = torch.zeros(flags.vocabulary, dtype=torch.bool)
        tensors["t2d"][torch.from_numpy(ids)] = True
    return tensors


def config_of(flags: Flags) -> dict[str, Any]:
    layer: dict[str, Any] = {
        "model_type": "qwen3", "hidden_size": flags.hidden, "intermediate_size": INNER, "head_dim": SIZE,
        "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "num_hidden_layers": flags.layers,
        "rms_norm_eps": EPS, "vocab_size": flags.vocabulary, "max_position_embeddings": 256, "hidden_act": "silu",
        "attention_bias": False, "rope_theta": flags.theta, "rope_scaling": None,
        "layer_types": ["sliding_attention" if sliding else "full_attention" for sliding in flags.sliding],
        "use_sliding_window": any(flags.sliding), "sliding_window": flags.window if any(flags.sliding) else None,
    }  # fmt: skip
    if flags.layout == "speculators":
        return {
            "architectures": ["DFlashSpeculator"],
            "speculators_model_type": "dflash",
            "transformer_layer_config": layer,
            "draft_vocab_size": len(ids_of(flags)),
            "block_size": flags.block,
            "aux_hidden_state_layer_ids": [tap + 1 for tap in flags.taps],
            "mask_token_id": flags.mask,
            "sliding_window_non_causal": flags.two_ways,
            "sample_from_anchor": flags.from_anchor,
            "speculators_config": {
                "algorithm": "dflash",
                "default_proposal_method": "greedy",
                "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": flags.block - 1}],
                "verifier": {"name_or_path": None, "architectures": []},
            },
        }
    nested: dict[str, Any] = {"mask_token_id": flags.mask, "target_layer_ids": list(flags.taps)}
    nested |= {} if flags.causal is None else {flags.causal_name: flags.causal}
    nested |= {"sample_from_anchor": True} if flags.from_anchor else {}
    sizes = {"draft_vocab_size": len(ids_of(flags))} if len(ids_of(flags)) < flags.vocabulary else {}
    return {
        "architectures": ["DFlashDraftModel"], "auto_map": {"AutoModel": "dflash.DFlashDraftModel"}, **layer, **sizes,
        "block_size": flags.block, "num_target_layers": flags.depth, "dflash_config": nested,
    }  # fmt: skip


def write(folder: Path, flags: Flags) -> Path:
    """Write a random checkpoint, as its project does."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors_of(flags).items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of(flags)))
    return folder


def forward(flags: Flags, taps: Array, token: int, embed: Array, head: Array) -> Array:
    """Logits [P, K] after a context. taps: [n, taps x H]. embed, head: the target's rows [V, H].

    Row i of the block is at position n + i. It sees context position j if no window forbids that:
    z-lab's window counts from the row itself, speculators' from the known token.
    """
    raw = {name: value.double().numpy() for name, value in tensors_of(flags).items()}
    ids, n = ids_of(flags), len(taps)
    embed = raw.get("embed_tokens.weight", embed).astype(np.float64)
    head = raw["lm_head.weight"] if "lm_head.weight" in raw else head[ids].astype(np.float64)

    def norm(x: Array, name: str) -> Array:
        if name not in raw:
            return x
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * raw[name]

    def turned(x: Array, position: int) -> Array:
        """RoPE of [heads, SIZE]: value i turns together with value i + SIZE / 2."""
        half = SIZE // 2
        angle = position * flags.theta ** (-2 * np.arange(half) / SIZE)
        first, second = x[:, :half], x[:, half:]
        return np.concatenate(
            [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], axis=1
        )

    context = norm(taps.astype(np.float64) @ raw["fc.weight"].T, "hidden_norm.weight")
    x = embed[[token] + [flags.mask] * (flags.block - 1)]
    for number in range(flags.layers):
        at = f"layers.{number}."
        rows = norm(x, f"{at}input_layernorm.weight")
        keys, values = list[Array](), list[Array]()
        for position, row in enumerate([*context, *rows]):
            key = (raw[f"{at}self_attn.k_proj.weight"] @ row).reshape(GROUPS, SIZE)
            keys.append(turned(norm(key, f"{at}self_attn.k_norm.weight"), position))
            values.append((raw[f"{at}self_attn.v_proj.weight"] @ row).reshape(GROUPS, SIZE))
        sliding = flags.sliding[number]
        causal = sliding and not flags.two_ways if flags.layout == "speculators" else flags.causal
        causal = sliding if causal is None else causal
        out = list[Array]()
        for i, row in enumerate(rows):
            query = (raw[f"{at}self_attn.q_proj.weight"] @ row).reshape(HEADS, SIZE)
            query = turned(norm(query, f"{at}self_attn.q_norm.weight"), n + i)
            least = 0
            if sliding:
                least = n - flags.window if flags.layout == "speculators" else n + i - flags.window + 1
            seen = [j for j in range(n + flags.block) if j >= least and not (causal and j > n + i)]
            heads = []
            for h in range(HEADS):
                group = h * GROUPS // HEADS
                scores = np.array([query[h] @ keys[j][group] for j in seen]) / SIZE**0.5
                weights = np.exp(scores - scores.max())
                heads.append(sum(w * values[j][group] for w, j in zip(weights / weights.sum(), seen, strict=True)))
            out.append(raw[f"{at}self_attn.o_proj.weight"] @ np.concatenate(heads))
        x = x + np.array(out)
        y = norm(x, f"{at}post_attention_layernorm.weight")
        gate = y @ raw[f"{at}mlp.gate_proj.weight"].T
        inner = gate / (1 + np.exp(-gate)) * (y @ raw[f"{at}mlp.up_proj.weight"].T)
        x = x + inner @ raw[f"{at}mlp.down_proj.weight"].T
    predicting = x if flags.from_anchor else x[1:]
    return norm(predicting, "norm.weight") @ head.T
