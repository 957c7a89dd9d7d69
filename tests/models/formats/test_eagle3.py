"""EAGLE-3 checkpoints in the layouts of their projects equal a forward pass from the formulas."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the models need torch")

from safetensors.torch import save_file
from tests.models.formats.eagle3_forward import Flags, chain
from torch import Tensor

from dovetail.models.drafter import DraftModel
from dovetail.models.eagle3 import Eagle3Drafter
from dovetail.models.formats.format import TargetParts
from dovetail.models.formats.registry import find_checkpoint

V, K, D, TAPS, INNER = 60, 24, 32, 3, 48
FLAGS = Flags(heads=4, groups=2, head_dim=8, eps=1e-6)
TARGET = {"hidden_size": D, "num_hidden_layers": 8, "vocab_size": V}
LLAMA: dict[str, Any] = {
    "hidden_size": D, "intermediate_size": INNER, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 1, "rms_norm_eps": 1e-6, "max_position_embeddings": 128, "vocab_size": V, "head_dim": 8,
    "hidden_act": "silu",
}  # fmt: skip


def weights(
    flags: Flags, *, width: int = D, target: int = D, taps: int = TAPS, draft: int = K, qk_norm: bool = False,
    bias: bool = False, fc_norm: bool = False, input_norm: bool = False, embed: bool = True, vocab: int = V,
) -> dict[str, Tensor]:  # fmt: skip
    """Random tensors of a drafter, in the layout that `flags` says."""
    q, kv = flags.heads * flags.head_dim, flags.groups * flags.head_dim
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (width, taps * target), "norm.weight": (width,)}
    shapes["lm_head.weight"] = (draft, width)
    if embed:
        shapes["embed_tokens.weight"] = (vocab, width)
    if input_norm:
        shapes["input_norm.weight"] = (taps * target,)
    for tap in range(taps if fc_norm else 0):
        shapes[f"fc_norm.{tap}.weight"] = (target,)
    for index in range(flags.layers):
        p, inner = (flags.first, 2 * width) if index == 0 else (f"layers.{index}.", width)
        for name, rows, columns in (("q", q, inner), ("k", kv, inner), ("v", kv, inner), ("o", width, q)):
            shapes[f"{p}self_attn.{name}_proj.weight"] = (rows, columns)
            if bias:
                shapes[f"{p}self_attn.{name}_proj.bias"] = (rows,)
        if qk_norm:
            shapes |= {f"{p}self_attn.{name}_norm.weight": (flags.head_dim,) for name in "qk"}
        for name, rows, columns in (("gate", INNER, width), ("up", INNER, width), ("down", width, INNER)):
            shapes[f"{p}mlp.{name}_proj.weight"] = (rows, columns)
        norms = ("input_layernorm", "post_attention_layernorm", *(("hidden_norm",) if index == 0 else ()))
        shapes |= {f"{p}{name}.weight": (width,) for name in norms}
    torch.manual_seed(len(shapes))
    made = {
        name: torch.rand(shape) + 0.5 if "norm" in name else torch.randn(shape) * (0.5 if len(shape) == 1 else 0.25)
        for name, shape in shapes.items()
    }
    if draft < vocab:
        ids = torch.randperm(vocab)[:draft].sort().values
        made["d2t"] = ids - torch.arange(draft)
        made["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill(0, ids, True)
    return made


def speculators(**settings: Any) -> dict[str, Any]:
    layer = {**LLAMA, "model_type": "llama", **settings.pop("layer", {})}
    return {
        "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "draft_vocab_size": K,
        "transformer_layer_config": layer, "eagle_aux_hidden_state_layer_ids": [2, 4, 5], **settings,
        "speculators_config": {"verifier": {"name_or_path": "org/target", "architectures": ["LlamaForCausalLM"]}},
    }  # fmt: skip


def safeai(**settings: Any) -> dict[str, Any]:
    return {
        **LLAMA,
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "draft_vocab_size": K,
        **settings,
    }


MODELOPT = {
    "eagle_aux_hidden_state_layer_ids": [1, 3, 4], "use_aux_hidden_state": True, "use_last_layernorm": True,
    "use_input_layernorm_in_first_layer": True, "use_mtp_layernorm": False, "next_layer_regular": True,
    "parallel_draft_step": 1,
}  # fmt: skip
ZERO = replace(FLAGS, first="layers.0.")
# name -> config, flags, tensors, and the blocks whose outputs are read
LAYOUTS: dict[str, tuple[dict[str, Any], Flags, dict[str, Any], tuple[int, ...]]] = {
    "SafeAILab": (safeai(), FLAGS, {}, (1, 3, 4)),
    "SafeAILab, the target's embedding": (safeai(), FLAGS, {"embed": False}, (1, 3, 4)),
    "SafeAILab, all tokens": (safeai(draft_vocab_size=V), FLAGS, {"draft": V}, (1, 3, 4)),
    "SafeAILab, narrow": (
        safeai(hidden_size=16, head_dim=8, target_hidden_size=D), FLAGS, {"width": 16}, (1, 3, 4)
    ),
    "SpecForge, biases": (
        safeai(attention_bias=True, rope_theta=500.0), replace(FLAGS, theta=500.0), {"bias": True}, (1, 3, 4)
    ),
    "EAGLE-3.1": (
        safeai(fc_norm=True, norm_output=True), replace(FLAGS, norm_output=True), {"fc_norm": True}, (1, 3, 4)
    ),
    "AngelSlim": (safeai(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 2, 6]}), FLAGS, {}, (0, 2, 6)),
    "ModelOpt": (safeai(eagle_config=MODELOPT), ZERO, {"embed": False}, (1, 3, 4)),
    "DeepSpec": (
        {**LLAMA, "architectures": ["Qwen3Eagle3Model"], "model_type": "qwen3", "target_layer_ids": [0, 1, 3, 5, 6]},
        ZERO, {"qk_norm": True, "taps": 5, "draft": V}, (0, 1, 3, 5, 6),
    ),
    "speculators, llama": (speculators(), ZERO, {}, (1, 3, 4)),
    "speculators, all tokens": (speculators(draft_vocab_size=V), ZERO, {"draft": V}, (1, 3, 4)),
    "speculators, normed residual": (
        speculators(norm_before_residual=True), replace(ZERO, norm_before_residual=True), {}, (1, 3, 4)
    ),
    "speculators, norm before fc": (speculators(norm_before_fc=True), ZERO, {"input_norm": True}, (1, 3, 4)),
    "speculators, fc norms": (speculators(fc_norm=True), ZERO, {"fc_norm": True}, (1, 3, 4)),
    "speculators, normed output": (speculators(norm_output=True), replace(ZERO, norm_output=True), {}, (1, 3, 4)),
    "speculators, qwen3 and two layers": (
        speculators(layer={"model_type": "qwen3", "num_hidden_layers": 2, "rope_parameters": {"rope_theta": 300.0}}),
        replace(ZERO, layers=2, theta=300.0), {"qk_norm": True}, (1, 3, 4),
    ),
}  # fmt: skip


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def target_parts(tensors: dict[str, Tensor]) -> TargetParts:
    rows = torch.randn(V, D)
    return TargetParts(TARGET, tensors.get("embed_tokens.weight", rows), torch.randn(V, D))


def drafted(module: DraftModel, taps: Tensor, tokens: Tensor, steps: int) -> list[Tensor]:
    """Logits of a chain: the module over the whole text at each step, in place of a cache."""
    f, known, found = module.read(taps), tokens, []
    for _ in range(steps):
        g = module(f[None], known[None])[0]
        logits = module.logits(g[-1])
        found.append(logits)
        known = torch.cat([known, module.d2t[logits.argmax()][None]])
        f = torch.cat([f, g[-1:]])
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_chain_equals_the_formulas(layout: str, tmp_path: Path) -> None:
    config, flags, parts, layers = LAYOUTS[layout]
    tensors = weights(flags, **parts)
    parts_of_target = target_parts(tensors)
    found = find_checkpoint(write(tmp_path, config, tensors))
    module = found.read(parts_of_target)
    assert isinstance(module, Eagle3Drafter) and module.mix.layers == layers
    assert found.needs(TARGET).layers == layers and found.needs(TARGET).target_size == D
    reference = {"embed_tokens.weight": parts_of_target.embed_tokens, **tensors}
    taps, tokens = torch.randn(9, parts.get("taps", TAPS) * D), torch.randint(0, V, (9,))
    want = chain(reference, flags, taps, tokens, 4)
    with torch.no_grad():
        got = drafted(module, taps, tokens, 4)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert torch.stack(want).std() > 0.1  # the comparison is of numbers that differ


def test_a_narrowed_drafter_is_the_same_over_what_it_keeps_and_says_its_size(tmp_path: Path) -> None:
    tensors = weights(FLAGS)
    whole = find_checkpoint(write(tmp_path, safeai(), tensors)).read(target_parts(tensors))
    assert isinstance(whole, Eagle3Drafter)
    kept = torch.arange(K) % 3 > 0
    small = whole.narrowed(kept)
    assert small.config.draft_vocab_size == small.shape.draft_vocab_size == int(kept.sum()) < K
    assert whole.config.draft_vocab_size == whole.shape.draft_vocab_size == K
    x = torch.randn(2, D)
    torch.testing.assert_close(small.logits(x), whole.logits(x)[:, kept])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_folded_mix_is_the_mix(layout: str, tmp_path: Path) -> None:
    """The runtime's form: norms without weights, then one matrix."""
    config, flags, parts, _ = LAYOUTS[layout]
    tensors = weights(flags, **parts)
    mix = find_checkpoint(write(tmp_path, config, tensors)).read(target_parts(tensors)).mix
    assert mix is not None
    taps = torch.randn(5, parts.get("taps", TAPS) * D)
    split = {"none": taps.shape[-1], "each": D, "all": taps.shape[-1]}[mix.tap_norm]
    rows = taps.unflatten(-1, (-1, split))
    if mix.tap_norm != "none":
        rows = rows / (rows.pow(2).mean(-1, keepdim=True) + mix.eps).sqrt()
    torch.testing.assert_close(rows.flatten(-2) @ mix.folded().T, mix(taps), atol=1e-5, rtol=1e-5)
