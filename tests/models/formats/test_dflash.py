"""DFlash checkpoints of every layout give the published forward; any other checkpoint is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the models need torch")

from safetensors.torch import save_file

from dovetail.models.checkpoint import CheckpointError
from dovetail.models.dflash import DFlash
from dovetail.models.formats.format import TargetParts
from dovetail.models.formats.registry import find_checkpoint

WIDTH, VOCABULARY, DEPTH = 32, 264, 4
TARGET = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "vocab_size": VOCABULARY}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"block": 8, "taps": (1,), "causal": True},
    {"causal": False, "sliding": (True, False), "window": 7},
    {"causal_name": "causal_head", "causal": True},
    {"causal_name": "causal_head", "causal": False},
    {"sliding": (True, True), "window": 5, "taps": (2, 0, 1)},
    {"from_anchor": True, "block": 3},
    {"qk_norm": False, "theta": 1e6},
    {"draft": 50},
    {"draft": 50, "own_rows": True, "from_anchor": True},
    {"layout": "speculators"},
    {"layout": "speculators", "draft": 60, "own_rows": True, "block": 7},
    {"layout": "speculators", "from_anchor": True, "taps": (1, 2, 0)},
    {"layout": "speculators", "sliding": (True, False), "window": 6},
    {"layout": "speculators", "sliding": (True, True), "window": 6, "two_ways": True},
    {"layout": "speculators", "qk_norm": False, "own_rows": True},
]


@pytest.fixture(scope="module")
def parts() -> TargetParts:
    torch.manual_seed(1)
    return TargetParts(TARGET, torch.randn(VOCABULARY, WIDTH), torch.randn(VOCABULARY, WIDTH))


def read(folder: Path, parts: TargetParts) -> DFlash:
    module = find_checkpoint(folder).read(parts)
    assert isinstance(module, DFlash)
    return module.eval()


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings)) or "plain")
@pytest.mark.parametrize("context", [1, 20])
def test_the_module_computes_the_published_forward(
    settings: dict[str, Any], context: int, parts: TargetParts, dflash: Any, tmp_path: Path
) -> None:
    flags = dflash.Flags(**settings)
    module = read(dflash.write(tmp_path / "checkpoint", flags), parts)
    rng = np.random.default_rng(2)
    taps = rng.standard_normal((context, len(flags.taps) * WIDTH)).astype(np.float32)
    with torch.no_grad():
        got = module(module.mix(torch.from_numpy(taps)), torch.tensor([7]))
    want = dflash.forward(flags, taps, 7, parts.embed_tokens.numpy(), parts.lm_head.numpy())
    assert got.shape == want.shape == (flags.block - (not flags.from_anchor), flags.draft or VOCABULARY)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-4)
    assert module.d2t.tolist() == dflash.ids_of(flags).tolist()
    assert module.mix.layers == flags.taps


def test_prefixes_and_the_verifiers_parts_do_not_matter(parts: TargetParts, dflash: Any, tmp_path: Path) -> None:
    flags = dflash.Flags(layout="speculators")
    plain = dflash.write(tmp_path / "plain", flags)
    other = dflash.write(tmp_path / "other", flags)
    tensors = {f"model.{name}": value for name, value in dflash.tensors_of(flags).items()}
    tensors |= {"verifier_norm.weight": torch.ones(WIDTH), "verifier_lm_head.weight": torch.randn(VOCABULARY, WIDTH)}
    save_file(tensors, other / "model.safetensors")
    features = torch.randn(4, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(*(read(folder, parts)(features, torch.tensor([3])) for folder in (plain, other)))


@pytest.mark.parametrize("layout", ["z-lab", "speculators"])
def test_needs_say_what_the_drafter_reads(layout: str, dflash: Any, tmp_path: Path) -> None:
    found = find_checkpoint(dflash.write(tmp_path / "checkpoint", dflash.Flags(layout=layout, taps=(0, 2))))
    needs = found.needs(TARGET)
    assert (needs.layers, needs.target_size, needs.vocab_size) == ((0, 2), WIDTH, VOCABULARY)
    assert "DFlash" in found.description
    (choice,) = needs.choices
    assert ("[0, 2] count outputs" if layout == "z-lab" else "[1, 3] count inputs") in choice


def test_nemos_architecture_is_dflash_too(parts: TargetParts, dflash: Any, tmp_path: Path) -> None:
    folder = dflash.write(tmp_path / "checkpoint", dflash.Flags())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3DFlashDraftModel"]}))
    assert read(folder, parts).d2t.tolist() == list(range(VOCABULARY))


def test_needs_name_the_model_that_speculators_trained_for(dflash: Any, tmp_path: Path) -> None:
    folder = dflash.write(tmp_path / "checkpoint", dflash.Flags(layout="speculators"))
    config = json.loads((folder / "config.json").read_text())
    named = changed(config, "speculators_config.verifier.name_or_path", "org/model")
    (folder / "config.json").write_text(json.dumps(named))
    assert find_checkpoint(folder).needs(TARGET).target == "org/model"


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of `config` with the value at "a.b" replaced, or removed for None."""
    out: dict[str, Any] = json.loads(json.dumps(config))
    *parents, last = path.split(".")
    inner = out
    for name in parents:
        inner = inner[name]
    inner[last] = value
    if value is None:
        del inner[last]
    return out


Z_LAB, SPECULATORS = "z-lab", "speculators"
BAD: list[tuple[str, str, Any, str]] = [
    (Z_LAB, "dflash_config", 3, "dflash_config 3 is no object"),
    (Z_LAB, "dflash_config.mask_token_id", 264, "mask_token_id 264 is outside the target's vocabulary of 264"),
    (Z_LAB, "dflash_config.mask_token_id", None, "mask_token_id None is out of range"),
    (Z_LAB, "dflash_config.target_layer_ids", [0, 3], "the output of the last layer, 3"),
    (Z_LAB, "dflash_config.target_layer_ids", [0, 4], "the output of layer 4 of a target that has 4"),
    (Z_LAB, "dflash_config.target_layer_ids", [], r"target_layer_ids \[\] is no list of layers"),
    (Z_LAB, "dflash_config.target_layer_ids", None, "target_layer_ids None is no list of layers"),
    (Z_LAB, "dflash_config.projector_type", "other", "projector_type 'other', which is not supported"),
    (Z_LAB, "dflash_config.attention_sink_bias", True, "attention_sink_bias True, which is not supported"),
    (Z_LAB, "dflash_config.attention_mode", "mla", "attention_mode 'mla', which is not supported"),
    (Z_LAB, "dflash_config.causal", "yes", "causal 'yes' is neither true nor false"),
    (Z_LAB, "dflash_config.causal_head", 1, "causal_head 1 is neither true nor false"),
    (Z_LAB, "dflash_config", {"causal": True, "causal_head": False}, "causal and causal_head contradict each other"),
    (Z_LAB, "dflash_config.target_hidden_size", 48, "its target_hidden_size is 48, the target is 32 wide"),
    (Z_LAB, "final_logit_softcapping", 30.0, "final_logit_softcapping 30.0 is not supported"),
    (Z_LAB, "block_size", 1, "block_size 1 is out of range: 2 to 32"),
    (Z_LAB, "block_size", 10**9, "block_size 1000000000 is out of range"),
    (Z_LAB, "block_size", None, "block_size None is out of range"),
    (Z_LAB, "layer_types", ["full_attention"], "does not list 2 layers"),
    (Z_LAB, "layer_types", ["full_attention", "linear_attention"], "does not list 2 layers of full or sliding"),
    (Z_LAB, "layer_types", ["full_attention", "sliding_attention"], "use_sliding_window is not true"),
    (Z_LAB, "num_target_layers", 36, "a target of 36 layers, not 4"),
    (Z_LAB, "hidden_size", 64, "its hidden_size is 64, the target is 32 wide"),
    (Z_LAB, "vocab_size", 1000, "its vocabulary of 1000 is not the target's of 264"),
    (Z_LAB, "model_type", "qwen3_5", "blocks of 'qwen3_5' are not supported"),
    (Z_LAB, "hidden_act", "gelu", "hidden_act 'gelu' is not supported"),
    (Z_LAB, "num_hidden_layers", 3, "layer_types .* does not list 3 layers"),
    (Z_LAB, "intermediate_size", 40, "does not fit its config"),
    (SPECULATORS, "transformer_layer_config", None, "transformer_layer_config None is no object"),
    (SPECULATORS, "aux_hidden_state_layer_ids", [0, 2], "the input of layer 0, the embedding"),
    (SPECULATORS, "aux_hidden_state_layer_ids", [1, 4], "the output of the last layer, 3"),
    (SPECULATORS, "aux_hidden_state_layer_ids", [1], "fc.weight is"),
    (SPECULATORS, "draft_vocab_size", 100, "d2t is missing"),
    (SPECULATORS, "target_hidden_size", 48, "its target_hidden_size is 48, the target is 32 wide"),
    (SPECULATORS, "sample_from_anchor", 1, "sample_from_anchor 1 is neither true nor false"),
    (SPECULATORS, "transformer_layer_config.rope_scaling", {"rope_type": "dynamic"}, "RoPE 'dynamic' is not supported"),
]


@pytest.mark.parametrize(("layout", "path", "value", "said"), BAD)
def test_a_setting_that_cannot_be_right_is_an_error_in_one_line(
    layout: str, path: str, value: Any, said: str, parts: TargetParts, dflash: Any, tmp_path: Path
) -> None:
    folder = dflash.write(tmp_path / "checkpoint", dflash.Flags(layout=layout))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(changed(config, path, value)))
    found = find_checkpoint(folder)
    with pytest.raises((ValueError, CheckpointError), match=said) as error:
        found.read(parts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"norm.weight": None}, "norm.weight is missing"),
        ({"extra.weight": torch.zeros(2)}, "extra.weight is left over"),
        ({"layers.1.self_attn.k_norm.weight": None}, "layers.1.self_attn.k_norm.weight is missing"),
        ({"fc.weight": torch.zeros(WIDTH, WIDTH)}, r"fc.weight is \[32, 32\], not \[32, 64\]"),
        ({"norm.weight": torch.full((WIDTH,), float("nan"))}, "norm.weight .* no numbers"),
        ({"norm.weight": torch.ones(WIDTH, dtype=torch.int8)}, "norm.weight.* is I8"),
        ({"d2t": torch.arange(40)}, "d2t and t2d|names a token twice"),
        ({"d2t": torch.full((40,), 10**6)}, "does not map 40 ids into the target vocabulary"),
    ],
)
def test_tensors_of_another_drafter_are_refused(
    change: dict[str, Any], said: str, parts: TargetParts, dflash: Any, tmp_path: Path
) -> None:
    flags = dflash.Flags(layout="speculators", draft=40, own_rows=True)
    folder = dflash.write(tmp_path / "checkpoint", flags)
    tensors = {**dflash.tensors_of(flags), **change}
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=said):
        find_checkpoint(folder).read(parts)
