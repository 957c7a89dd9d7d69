"""EAGLE checkpoints of SafeAILab, speculators and Dovetail's research code equal a pass from the formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the models need torch")

from tests.models.formats.eagle3_forward import Flags
from tests.models.formats.eagle_forward import chain
from tests.models.formats.test_eagle3 import FLAGS, INNER, LLAMA, TARGET, D, V, drafted, target_parts, write
from torch import Tensor

from dovetail.models.checkpoint import CheckpointError
from dovetail.models.eagle import EagleDrafter
from dovetail.models.formats.registry import find_checkpoint


def weights(
    flags: Flags, *, fc_bias: bool = False, qkv_bias: bool = False, norms: bool = False, gated: bool = False,
    rows: bool = True, vocab: int = V,
) -> dict[str, Tensor]:  # fmt: skip
    """Random tensors of a drafter, by SafeAILab's names. rows: copies of the target's embedding and head."""
    q, kv = flags.heads * flags.head_dim, flags.groups * flags.head_dim
    shapes: dict[str, tuple[int, ...]] = {"W_1": (D, D), "W_2": (D, D), "W_z": (2 * D, D)} if gated else {}
    shapes["input_layernorm.weight" if gated else "fc.weight"] = (D,) if gated else (D, 2 * D)
    if rows:
        shapes |= {"embed_tokens.weight": (vocab, D), "lm_head.weight": (vocab, D)}
    if fc_bias:
        shapes["fc.bias"] = (D,)
    if norms:
        shapes |= {"embed_layernorm.weight": (D,), "lm_head_layernorm.weight": (D,)}
    for index in range(flags.layers):
        p = f"layers.{index}."
        for name, rows_, columns in (("q", q, D), ("k", kv, D), ("v", kv, D), ("o", D, q)):
            shapes[f"{p}self_attn.{name}_proj.weight"] = (rows_, columns)
            if qkv_bias and name != "o":
                shapes[f"{p}self_attn.{name}_proj.bias"] = (rows_,)
        for name, rows_, columns in (("gate", INNER, D), ("up", INNER, D), ("down", D, INNER)):
            shapes[f"{p}mlp.{name}_proj.weight"] = (rows_, columns)
        shapes[f"{p}post_attention_layernorm.weight"] = (D,)
        if index or norms:
            shapes[f"{p}input_layernorm.weight"] = (D,)
    torch.manual_seed(len(shapes))
    return {
        name: torch.rand(shape) + 0.5 if "norm" in name else torch.randn(shape) * (0.5 if len(shape) == 1 else 0.15)
        for name, shape in shapes.items()
    }


CONVERTED = {
    "fc.": "fusion_fc.", "layers.0.": "transformer.", "embed_layernorm.": "embedding_layernorm.",
    "lm_head_layernorm.": "pre_lm_head_layernorm.",
}  # fmt: skip


def converted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by speculators' names."""

    def name_of(name: str) -> str:
        start = next((start for start in CONVERTED if name.startswith(start)), "")
        return CONVERTED.get(start, "") + name.removeprefix(start)

    return {name_of(name): tensor for name, tensor in tensors.items()}


def safeai(**settings: Any) -> dict[str, Any]:
    return {**LLAMA, "architectures": ["LlamaForCausalLM"], "model_type": "llama", **settings}


def speculators(**settings: Any) -> dict[str, Any]:
    return {
        "architectures": ["EagleSpeculator", "LlamaDecoderLayer"], "speculators_model_type": "eagle",
        "transformer_layer_config": {**LLAMA, "model_type": "llama", **settings.pop("layer", {})},
        "transformer_layer_architecture": "LlamaDecoderLayer", **settings,
        "speculators_config": {"verifier": {"name_or_path": "org/target"}},
    }  # fmt: skip


TWO = replace(FLAGS, layers=2)
# name -> config, flags, tensors, format
LAYOUTS: dict[str, tuple[dict[str, Any], Flags, dict[str, Any], str]] = {
    "SafeAILab": (safeai(bias=False), FLAGS, {}, "eagle"),
    "SafeAILab, the target's rows": (safeai(bias=False), FLAGS, {"rows": False}, "eagle"),
    "SafeAILab, bias": (safeai(bias=True), FLAGS, {"fc_bias": True}, "eagle"),
    "SafeAILab, bias that the config leaves out": (safeai(), FLAGS, {"fc_bias": True}, "eagle"),
    "SafeAILab, Qwen2 and another theta": (
        safeai(qkv_bias=True, rope_theta=700.0), replace(FLAGS, theta=700.0), {"qkv_bias": True}, "eagle"
    ),
    "SafeAILab, two layers": (safeai(num_hidden_layers=2), TWO, {}, "eagle"),
    "HASS with norms": (safeai(), FLAGS, {"norms": True, "fc_bias": True}, "eagle"),
    "speculators": (speculators(fusion_bias=False, layernorms=False), FLAGS, {"rows": False}, "eagle"),
    "speculators, bias": (speculators(fusion_bias=True), FLAGS, {"fc_bias": True, "rows": False}, "eagle"),
    "speculators, norms": (
        speculators(fusion_bias=True, layernorms=True), FLAGS, {"norms": True, "fc_bias": True, "rows": False}, "eagle"
    ),
    "speculators, another theta": (
        speculators(layer={"rope_parameters": {"rope_theta": 90.0}}), replace(FLAGS, theta=90.0), {}, "eagle"
    ),
    "research code": (safeai(), FLAGS, {"gated": True}, "research"),
    "research code, two blocks": (safeai(num_hidden_layers=2), TWO, {"gated": True}, "research"),
    "research code, the target's rows": (safeai(num_hidden_layers=2), TWO, {"gated": True, "rows": False}, "research"),
}  # fmt: skip


def stored_names(layout: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return converted(tensors) if layout.startswith("speculators") else tensors


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_chain_equals_the_formulas(layout: str, tmp_path: Path) -> None:
    config, flags, parts, name = LAYOUTS[layout]
    tensors = weights(flags, **parts)
    target = replace(target_parts(tensors), lm_head=torch.randn(V, D) * 0.1)
    found = find_checkpoint(write(tmp_path, config, stored_names(layout, tensors)))
    module = found.read(target)
    assert found.format.name == name and isinstance(module, EagleDrafter) and module.mix is None
    needs = found.needs(TARGET)
    assert (needs.target_size, needs.vocab_size, needs.draft_vocab_size, needs.layers) == (D, V, V, ())
    reference = {"embed_tokens.weight": target.embed_tokens, "lm_head.weight": target.lm_head, **tensors}
    f, tokens = torch.randn(9, D), torch.randint(0, V, (9,))
    want = chain(reference, flags, f, tokens, 4)
    with torch.no_grad():
        got = drafted(module, f, tokens, 4)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert torch.stack(want).std() > 0.1  # the comparison is of numbers that differ


@pytest.mark.parametrize(
    ("layout", "damage", "said"),
    [
        ("SafeAILab", {"bias": True}, "fusion.fc.bias is missing"),
        ("SafeAILab, bias", {"bias": False}, "fusion.fc.bias is left over"),
        ("SafeAILab", {"num_hidden_layers": 2}, "layers.1.input_layernorm.weight is missing"),
        ("speculators, norms", {"layernorms": False}, "fusion.embedding_layernorm.weight is left over"),
        ("speculators", {"layernorms": True}, "fusion.embedding_layernorm.weight is missing"),
        ("research code, two blocks", {"num_hidden_layers": 1}, "layers.1.input_layernorm.weight is left over"),
    ],
)
def test_a_config_that_does_not_fit_its_tensors_is_refused(
    layout: str, damage: dict[str, Any], said: str, tmp_path: Path
) -> None:
    config, flags, parts, _ = LAYOUTS[layout]
    tensors = weights(flags, **parts)
    found = find_checkpoint(write(tmp_path, {**config, **damage}, stored_names(layout, tensors)))
    with pytest.raises(CheckpointError, match=said):
        found.needs(TARGET)
    with pytest.raises(CheckpointError, match=said):
        found.read(target_parts(tensors))


@pytest.mark.parametrize("layout", ["SafeAILab", "speculators", "research code"])
@pytest.mark.parametrize(
    ("other", "said"),
    [({"hidden_size": 64}, "width 32, the target's is 64"), ({"vocab_size": 61}, "vocabulary of 60 is not the target")],
)
def test_another_target_is_refused(layout: str, other: dict[str, int], said: str, tmp_path: Path) -> None:
    config, flags, parts, _ = LAYOUTS[layout]
    tensors = weights(flags, **parts)
    found = find_checkpoint(write(tmp_path, config, stored_names(layout, tensors)))
    assert (found.needs({**TARGET, **other}).target_size, found.needs({**TARGET, **other}).vocab_size) == (D, V)
    with pytest.raises(ValueError, match=said):
        found.read(replace(target_parts(tensors), config={**TARGET, **other}))


def test_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    config, flags, parts, _ = LAYOUTS["SafeAILab"]
    tensors = weights(flags, **parts)
    found = find_checkpoint(write(tmp_path, config, {**tensors, "fusion_fc.weight": tensors["fc.weight"].clone()}))
    with pytest.raises(CheckpointError, match=r"has one tensor twice, as 'fc.weight' and 'fusion_fc.weight'"):
        found.needs(TARGET)
