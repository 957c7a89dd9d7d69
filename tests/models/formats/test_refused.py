"""Checkpoints that Dovetail knows and does not read are refused by name, with a reason and a remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the models need torch")

from tests.models.formats.test_eagle import LAYOUTS as EAGLE
from tests.models.formats.test_eagle import stored_names, weights
from tests.models.formats.test_eagle3 import FLAGS, LLAMA, safeai, speculators, write
from tests.models.formats.test_eagle3 import LAYOUTS as EAGLE3
from tests.models.formats.test_eagle3 import weights as eagle3_weights

from dovetail.models.checkpoint import UnknownFormat
from dovetail.models.formats.refused import REFUSED, check_not_refused
from dovetail.models.formats.registry import find_checkpoint

DFLASH = {**LLAMA, "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "block_size": 4}
DFLASH_NAMES = ["fc.weight", "hidden_norm.weight", "norm.weight", "layers.0.self_attn.q_norm.weight"]
MODEL_NAMES = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]
MODEL = {**LLAMA, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
GPT2_NAMES = ["transformer.wte.weight", "transformer.h.0.attn.c_attn.weight", "transformer.ln_f.weight"]
# kind, config, names of tensors beside EAGLE-3's own, where there are any
CASES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("P-EAGLE", {**speculators(), "speculators_model_type": "peagle"}, []),
    ("P-EAGLE", safeai(), ["mask_hidden"]),
    ("P-EAGLE", safeai(ptd_token_id=7), []),
    ("DSpark", {"speculators_model_type": "dspark"}, DFLASH_NAMES),
    ("DSpark", DFLASH, [*DFLASH_NAMES, "markov_head.markov_w1.weight"]),
    ("DSpark", {**DFLASH, "architectures": ["Qwen3DSparkModel"]}, DFLASH_NAMES),
    ("Domino", DFLASH, [*DFLASH_NAMES, "prefix_gru.weight_ih_l0"]),
    ("Domino", {**DFLASH, "dflash_config": {"projector_type": "domino"}}, DFLASH_NAMES),
    ("DFlash 2", {"speculators_model_type": "dflash2"}, DFLASH_NAMES),
    ("DFlash 2", DFLASH, [*DFLASH_NAMES, "layers.0.mlp_conv.base_kernel"]),
    ("DFlash 2", DFLASH, [*DFLASH_NAMES, "candidate_selector.hidden_projection.weight"]),
    ("XPress", {"speculators_model_type": "xpress"}, DFLASH_NAMES),
    ("Medusa", {"medusa_num_heads": 5, "medusa_num_layers": 1}, ["0.0.linear.weight", "0.1.weight"]),
    ("Medusa", {"model_type": "llama"}, ["blocks.0.weight", "lm_heads.0.weight"]),
    ("Hydra", {"hydra_num_heads": 4}, ["0.0.linear.weight"]),
    ("MLP or LSTM", {"architectures": ["MLPSpeculatorPreTrainedModel"]}, ["speculator.emb.0.weight"]),
    ("MLP or LSTM", {"architectures": ["ArcticLSTMSpeculatorPreTrainedModel"]}, ["speculator.emb.0.weight"]),
    ("MTP", {"speculators_model_type": "mtp"}, ["mtp_layers.0.input_proj.weight"]),
    ("MTP", {"architectures": ["Qwen3NextMTP"]}, ["mtp.fc.weight"]),
    ("MTP", {**MODEL, "num_nextn_predict_layers": 1}, [*MODEL_NAMES, "model.layers.61.eh_proj.weight"]),
    ("MLA", safeai(model_type="kimi_k2"), ["midlayer.self_attn.kv_a_proj_with_mqa.weight"]),
    ("MLA", safeai(architectures=["Eagle3DeepseekV2ForCausalLM"]), []),
    ("quantised", safeai(quantization_config={"quant_method": "fp8"}), []),
    ("quantised", safeai(), ["midlayer.self_attn.q_proj.qweight"]),
    ("language model", {**MODEL, "architectures": ["Gemma2ForCausalLM"]}, MODEL_NAMES),
    ("language model", {"architectures": ["GPT2LMHeadModel"]}, GPT2_NAMES),
]


@pytest.mark.parametrize(("kind", "config", "names"), CASES)
def test_a_known_kind_is_refused_by_name(kind: str, config: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    """EAGLE-3's own tensors lie beside the marks, so that the refusal comes before a format that matches."""
    own = {} if {*DFLASH_NAMES[:1], *MODEL_NAMES[:1], *GPT2_NAMES[:1]} & {*names} else eagle3_weights(FLAGS)
    folder = write(tmp_path / "drafter", config, {**own, **{name: torch.ones(2, 2) for name in names}})
    with pytest.raises(UnknownFormat) as error:
        find_checkpoint(folder)
    said = str(error.value)
    assert kind in said.partition("which Dovetail does not read: ")[0] and str(folder) in said
    assert "\n" not in said and len(said) < 500


def test_every_refusal_has_a_case_and_a_remedy() -> None:
    for refusal in REFUSED:
        assert any(kind in refusal.name for kind, _, _ in CASES), refusal.name
        assert any(word in refusal.reason for word in ("use a", "give ")), refusal.name


@pytest.mark.parametrize("layout", [*EAGLE, *EAGLE3])
def test_no_format_that_dovetail_reads_is_refused(layout: str) -> None:
    if layout in EAGLE:
        config, flags, parts, _ = EAGLE[layout]
        names = list(stored_names(layout, weights(flags, **parts)))
    else:
        config, flags, parts, _ = EAGLE3[layout]
        names = list(eagle3_weights(flags, **parts))
    check_not_refused(Path("folder"), config, names)
    check_not_refused(Path("folder"), {**config, "quantization_config": None, "num_nextn_predict_layers": 1}, names)


@pytest.mark.parametrize(
    "config", [DFLASH, {**DFLASH, "dflash_config": {"causal_head": True}}, {"speculators_model_type": "dflash"}]
)
def test_dflash_is_none_of_its_descendants(config: dict[str, Any]) -> None:
    check_not_refused(Path("folder"), config, DFLASH_NAMES)


def test_a_refusal_comes_before_the_question_of_pickles(tmp_path: Path) -> None:
    folder = write(tmp_path, {"medusa_num_heads": 5}, {"0.weight": torch.ones(1)})
    (folder / "model.safetensors").rename(folder / "medusa_lm_head.pt")
    with pytest.raises(UnknownFormat, match="a Medusa drafter"):
        find_checkpoint(folder)


@pytest.mark.parametrize("value", ["x", 3, None, [], {}, [None], [["a"]], {"a": 1}])
@pytest.mark.parametrize(
    "key",
    ["architectures", "model_type", "speculators_model_type", "dflash_config", "quantization_config"],
)
def test_strange_values_are_no_crash(key: str, value: object, tmp_path: Path) -> None:
    folder = write(tmp_path, {key: value}, {"weight": torch.ones(1)})
    with pytest.raises(UnknownFormat):
        find_checkpoint(folder)
