"""Families: every architecture of the table becomes a target that writes the model's text, or is refused with a reason.

Each model is tiny and random, of float32 weights.  Windows are 32 tokens, contexts 12 to 200.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dovetail.exporter.build.progress import quiet
from dovetail.exporter.cli import main as cli
from dovetail.exporter.pairs.pair import add_drafter
from dovetail.exporter.target.architectures import (
    ARCHITECTURES,
    DOVETAIL_RUNS_WITH,
    OPTIMUM_INTEL,
    UNPAGED,
    check_architecture,
)
from dovetail.exporter.target.convert import WeightOptions
from dovetail.exporter.target.export import TargetOptions, export_target, versions
from dovetail.exporter.train.corpus import Corpus
from dovetail.exporter.train.plan import FitOptions, TrainPlan
from dovetail.exporter.train.run import train
from dovetail.exporter.train.writer import BatchWriter
from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import ExportError, InputError, SourceError
from dovetail.runtime.loop.sequence import Request
from dovetail.runtime.pair.manifest import read_manifest
from dovetail.runtime.system.progress import silent
from dovetail.runtime.target.exactness import largest_difference
from dovetail.runtime.target.graph import EXPERT_ROWS
from dovetail.runtime.target.layers.device import OrtDevice
from dovetail.runtime.target.layers.take import TakeLayers
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.target.paged import PagedModel
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.limits import TreeLimits

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs" / "reference" / "families.md"
FLOAT32 = TargetOptions(WeightOptions("fp32"))
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
INSTALLED = versions("transformers")["transformers"]
CONTEXTS, NEW_TOKENS = (12, 40, 200), 24
NEAR_TIE = 0.05  # of logits whose spread is 2.4; float16 keys move them by 0.03
PARENTS = np.array([-1, 0, 1, 2, 0, 4, 5, 1, 7, 0, 9, 2])

WINDOW = 32
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
COMMON = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 256, "initializer_range": 0.3,
    "tie_word_embeddings": False, **IDS,
}  # fmt: skip
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 320, "initializer_range": 0.3, **IDS}
MULTI_HEAD = {"num_key_value_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
NO_WINDOW: dict[str, Any] = {"sliding_window": None}
ALL_WINDOWS = {"sliding_window": WINDOW}
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}


@dataclass(frozen=True)
class Family:
    """A tiny model. settings: of its configuration, beside those of `base`. windows: it has a window of 32 tokens."""

    model_type: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=lambda: COMMON)

    @property
    def windows(self) -> bool:
        return bool(self.settings.get("sliding_window"))


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


WORKS = {
    "afmoe": Family("afmoe", {**EXPERTS, **ALTERNATING, "head_dim": 16, "num_dense_layers": 1}),
    "arcee": Family("arcee"),
    "biogpt": Family("biogpt", MULTI_HEAD),
    "bloom": Family("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "seq_length": 256}, GPT),
    "codegen": Family("codegen", {"rotary_dim": 8}, GPT),
    "cohere": Family("cohere", {"logit_scale": 1.0}),
    "cohere2": Family("cohere2", {**ALTERNATING, "logit_scale": 1.0}),
    "falcon": Family("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    "gemma": Family("gemma", {"head_dim": 16}),
    "gemma2": Family(
        "gemma2", {**ALTERNATING, "head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0}
    ),
    "gemma3": Family("gemma3_text", {**ALTERNATING, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "glm": Family("glm", {"head_dim": 16}),
    "glm4": Family("glm4", {"head_dim": 16}),
    "gpt2": Family("gpt2", {}, GPT),
    "gpt_bigcode": Family("gpt_bigcode", {}, GPT),
    "gpt_neox": Family("gpt_neox", MULTI_HEAD),
    "gpt_oss": Family("gpt_oss", {**LOCAL_EXPERTS, **ALTERNATING, **rope("default"), "head_dim": 16}),
    "gptj": Family("gptj", {"rotary_dim": 8}, GPT),
    "granite": Family("granite"),
    "granitemoe": Family("granitemoe", LOCAL_EXPERTS),
    "hunyuan_v1_dense": Family("hunyuan_v1_dense", {"head_dim": 16}),
    "llama": Family("llama"),
    "llama, Llama 3's RoPE": Family(
        "llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama, YaRN": Family("llama", rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "llama, dynamic RoPE": Family("llama", {**rope("dynamic", factor=4.0), "max_position_embeddings": 96}),
    "mistral": Family("mistral", NO_WINDOW),
    "mistral, window": Family("mistral", ALL_WINDOWS),
    "mixtral": Family("mixtral", {**LOCAL_EXPERTS, **NO_WINDOW}),
    "mixtral, window": Family("mixtral", {**LOCAL_EXPERTS, **ALL_WINDOWS}),
    "olmo": Family("olmo"),
    "olmo2": Family("olmo2"),
    "opt": Family("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.3}),
    "persimmon": Family("persimmon", MULTI_HEAD),
    "phi": Family("phi", MULTI_HEAD),
    "phi3": Family("phi3", NO_WINDOW),
    "phi3, window": Family("phi3", ALL_WINDOWS),
    "phi3, long RoPE": Family(
        "phi3",
        {
            **NO_WINDOW,
            **rope("longrope", short_factor=[1.0] * 8, long_factor=[1.5 + i / 2 for i in range(8)]),
            "original_max_position_embeddings": 96,
        },
    ),
    "phimoe": Family("phimoe", {**LOCAL_EXPERTS, **NO_WINDOW}),
    "qwen2": Family("qwen2"),
    "qwen2, window": Family("qwen2", {**ALL_WINDOWS, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen2_moe": Family("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 48}),
    "qwen3": Family("qwen3", {"head_dim": 16}),
    "qwen3_moe": Family("qwen3_moe", {**EXPERTS, "head_dim": 16, "decoder_sparse_step": 1}),
    "smollm3": Family("smollm3", {"num_hidden_layers": 4}),
    "stablelm": Family("stablelm"),
    "starcoder2": Family("starcoder2", NO_WINDOW),
    "starcoder2, window": Family("starcoder2", ALL_WINDOWS),
}  # fmt: skip
# What the installed transformers lets optimum-intel export; the others are tested as refusals.
HERE = {name: each for name, each in WORKS.items() if INSTALLED in ARCHITECTURES[each.model_type]}

# Fields that decide, and a part of the reason.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "falcon, ALiBi": ({"model_type": "falcon", "alibi": True}, "ALiBi"),
    "mpt": ({"model_type": "mpt"}, "ALiBi"),
    "gpt_neo": ({"model_type": "gpt_neo"}, "window"),
    "xglm": ({"model_type": "xglm"}, "without scaled dot-product attention"),
    "gpt_neox_japanese": ({"model_type": "gpt_neox_japanese"}, "without scaled dot-product attention"),
    "mamba": ({"model_type": "mamba", "state_size": 16}, "another state"),
    "falcon_mamba": ({"model_type": "falcon_mamba", "state_size": 16}, "another state"),
    "zamba2": ({"model_type": "zamba2", "mamba_d_state": 64}, "another state"),
    "granitemoehybrid": ({"model_type": "granitemoehybrid", "mamba_d_state": 64}, "another state"),
    "lfm2": ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, "layer_types: conv"),
    "lfm2_moe": ({"model_type": "lfm2_moe", "conv_L_cache": 3}, "another state"),
    "qwen3_next": ({"model_type": "qwen3_next", "layer_types": ["linear_attention"]}, "layer_types: linear_attention"),
    "qwen3_5_text": ({"model_type": "qwen3_5_text", "layer_types": ["linear_attention"]}, "another state"),
    "bart": ({"model_type": "bart", "is_encoder_decoder": True}, "encoder"),
    "olmo3": ({"model_type": "olmo3", "layer_types": ["full_attention"]}, "does not export"),
    "exaone4": ({"model_type": "exaone4"}, "4.57.6"),
    "deepseek_v3": ({"model_type": "deepseek_v3"}, "4.53.3"),
    "no model_type": ({"hidden_size": 64}, "model_type"),
}


def make_model(family: Family, folder: Path, **settings: Any) -> Any:
    """A random model of the family and a byte-level tokenizer in `folder`; returns the torch model."""
    with quiet():
        import torch
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

        torch.manual_seed(0)
        config = AutoConfig.for_model(family.model_type, **{**family.base, **family.settings, **settings})
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # biases and norms, which start as zeros and ones
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        pieces = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
        tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>").save_pretrained(folder)
    return model


def open_target(pair: Path) -> OpenVINOTarget:
    return OpenVINOTarget.load(pair, read_manifest(pair), ov_config=EXACT)


def tree_of(tokens: Any, parents: Any) -> DraftTree:
    return DraftTree(np.array(tokens), np.array(parents), np.zeros(len(tokens), np.float32))


def greedy(target: OpenVINOTarget, prompt: list[int], count: int) -> list[int]:
    """Plain text of the target: `count` tokens after `prompt`."""
    seq = target.open()
    logits, text = target.prefill(seq, np.array(prompt)).logits[0], []
    for _ in range(count):
        text.append(int(logits.argmax()))
        logits = target.verify({seq: DraftTree.root(text[-1])})[seq].logits[0]
        target.commit(seq, np.zeros(1, np.int64))
    target.close(seq)
    return text


def margins(model: Any, prompt: list[int], text: list[int]) -> np.ndarray:
    """By how much torch's best token is above the one that was chosen, [text]."""
    import torch

    with torch.no_grad(), quiet():
        logits = model(torch.tensor([[*prompt, *text[:-1]]]), use_cache=False).logits[0, len(prompt) - 1 :].numpy()
    assert logits.std() > 0.5, "all tokens are alike: the text says nothing"
    return logits.max(axis=1) - logits[np.arange(len(text)), text]


# Families whose experts are products over the experts of each row, and their number: three for each mixture.
SPARSE = {"afmoe": 3, "mixtral": 6, "mixtral, window": 6, "qwen2_moe": 6, "qwen3_moe": 6}
MULTIPLIED_AGAIN = {"afmoe"}  # whose copies of a row read its experts once more
MIXTURES = {"mixtral", "qwen2_moe", "qwen3_moe"}  # refused as first layers elsewhere for their experts


def assert_a_row_reads_its_own_experts(target: OpenVINOTarget, products: int, once: bool) -> None:
    """No pass reads all experts. once: copies of a row read none."""
    operations = target.model.compiled.get_runtime_model().get_ops()
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in operations]
    assert kinds.count("GatherMatmul") == products and target.plain_rows == (1 if once else 2)
    if not once:
        return
    seq, computed = target.open(), list[int]()
    target.prefill(seq, np.arange(1, 6))
    computed.append(len(target.model.request.get_tensor(EXPERT_ROWS).data))
    for nodes in (1, 2, 3):
        target.verify({seq: DraftTree.chain(np.arange(nodes))}, rows=3)
        computed.append(len(target.model.request.get_tensor(EXPERT_ROWS).data))
    assert computed == [5, 1, 2, 3]
    other, trees = target.open(), (DraftTree.chain(np.array([7, 9])), DraftTree.root(3))
    target.prefill(other, np.arange(4, 40))
    both = target.verify({seq: trees[0], other: trees[1]}, rows=6)
    assert len(target.model.request.get_tensor(EXPERT_ROWS).data) == 3
    for each, tree in zip((seq, other), trees, strict=True):
        np.testing.assert_array_equal(both[each].logits, target.verify({each: tree})[each].logits)
    target.close(seq)
    target.close(other)


def assert_tree_equals_chains(target: OpenVINOTarget, prompt: list[int], tokens: np.ndarray) -> None:
    """Every node's logits have the bits of its own path, read as a chain."""
    seq = target.open()
    target.prefill(seq, np.array(prompt))
    logits = target.verify({seq: tree_of(tokens, PARENTS)})[seq].logits.copy()
    for node in range(len(PARENTS)):
        path = [node]
        while PARENTS[path[0]] >= 0:
            path.insert(0, PARENTS[path[0]])
        target.rewind(seq, len(prompt))
        row = target.verify({seq: tree_of(tokens[path], np.arange(len(path)) - 1)})[seq].logits[-1]
        assert np.array_equal(row, logits[node]), f"node {node} behind {len(prompt)} tokens"
    target.close(seq)


@pytest.mark.parametrize("name", HERE)
def test_a_target_writes_the_models_text_and_verifies_trees(name: str, tmp_path: Path) -> None:
    model = make_model(HERE[name], tmp_path / "hf")
    export_target(str(tmp_path / "hf"), tmp_path / "pair", options=FLOAT32)
    target, random = open_target(tmp_path / "pair"), np.random.default_rng(0)
    for length in CONTEXTS:
        if length + NEW_TOKENS > target.max_context:
            continue
        prompt = random.integers(1, 250, length).tolist()
        text = greedy(target, prompt, NEW_TOKENS)
        assert margins(model, prompt, text).max() < NEAR_TIE, (length, text)
        assert_tree_equals_chains(target, prompt, random.integers(1, 250, len(PARENTS)))
    if name in SPARSE:
        assert_a_row_reads_its_own_experts(target, SPARSE[name], once=name not in MULTIPLIED_AGAIN)
    assert_first_layer_elsewhere_is_the_same(name, tmp_path / "pair")


# Families whose first layer can run in ONNX Runtime; any other says why not.
TRANSLATED = {
    "arcee", "cohere", "gemma", "granite", "hunyuan_v1_dense", "llama", "llama, Llama 3's RoPE", "llama, YaRN",
    "llama, dynamic RoPE", "mistral", "olmo", "olmo2", "qwen2", "qwen2, window", "qwen3", "smollm3", "starcoder2",
}  # fmt: skip


def assert_first_layer_elsewhere_is_the_same(name: str, pair: Path) -> None:
    """It computes the same in ONNX Runtime, or is refused."""
    manifest, tokens = read_manifest(pair), np.random.default_rng(0).integers(1, 250, 80)
    take = TakeLayers(1, OrtDevice.cpu(), manifest.target.max_context)
    try:
        target = OpenVINOTarget.load(pair, manifest, ov_config=EXACT, take=take)
    except InputError as error:
        assert name not in TRANSLATED, error
        assert str(error).endswith(": leave out --gpu-layers, or give --gpu-layers 0") and "\n" not in str(error)
        assert "_rows" not in str(error) and ("mixture of experts" in str(error) or name not in MIXTURES), error
        return
    assert name in TRANSLATED
    whole = open_target(pair)
    found, expected = (np.array(each.prefill(each.open(), tokens).logits) for each in (target, whole))
    np.testing.assert_allclose(found, expected, atol=0.01)  # float16 keys move them
    assert largest_difference(target) == 0


def test_enough_families_work() -> None:
    assert len({family.model_type for family in HERE.values()}) >= 20
    assert {family.model_type for family in HERE.values() if family.windows} >= {"mistral", "phi3", "gpt_oss"}


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_cannot_work_is_refused_before_its_weights(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, reason = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to("nowhere")  # reading it would be another error
    start = time.monotonic()
    assert cli.main(["target", str(tmp_path), str(tmp_path / "pair")]) == SourceError.exit_code
    assert time.monotonic() - start < 5
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    assert len(lines) == 1 and reason in lines[0], lines
    assert not (tmp_path / "pair").exists()


def test_a_refusal_takes_less_than_five_seconds_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "exaone4"}')
    (tmp_path / "model.safetensors").symlink_to("nowhere")
    command = [sys.executable, "-m", "dovetail.exporter.cli.main", "target", str(tmp_path), str(tmp_path / "pair")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    assert done.returncode == SourceError.exit_code and "dovetail-export environment" in done.stderr


def test_a_version_outside_the_range_is_named_with_the_way_to_get_another() -> None:
    for name, version, remedy in (
        ("gemma3_text", "5.5.4", "4.57 to 5.0.0, and 5.5.4 is installed: pip install transformers==5.0.0"),
        ("gemma3_text", "5.0.1", "4.57 to 5.0.0, and 5.0.1 is installed: pip install transformers==5.0.0"),
        ("exaone4", "5.0.0", "4.57 to 4.57.6, and 5.0.0 is installed: dovetail-export environment FOLDER --for exa"),
    ):
        with pytest.raises(SourceError, match=re.escape(f"needs transformers {remedy}")):
            check_architecture("m", {"model_type": name}, version)
    for version in ("4.57.0", "5.0.0", "5.0.0.dev0"):
        check_architecture("m", {"model_type": "gemma3_text"}, version)
    with pytest.raises(SourceError, match=r"4\.56\.2"):
        check_architecture("m", {"model_type": "llama"}, "4.56.2")


# Decoders that optimum-intel exports as parts of models of several media, or with no transformers at all (Gemma 4 text:
# 5.5 at least, 5.0 at most).
OF_SEVERAL_PARTS = {
    "gemma4_text", "gemma4_unified_text", "muse_glimmer_text", "qwen3_omni_moe_text", "qwen3_omni_moe_talker_text",
    "qwen3_vl_text",
}  # fmt: skip


NARROWER = {"phimoe"}  # its graph is wrong with the oldest release that optimum-intel lets in


def declared() -> dict[str, Any]:
    """Export classes of the installed optimum-intel, of every decoder of text."""
    with quiet():
        import optimum.exporters.openvino.model_configs as configs
        from optimum.exporters.tasks import TasksManager

    found = {}
    for name, by_exporter in TasksManager._SUPPORTED_MODEL_TYPE.items():
        constructor = by_exporter.get("openvino", {}).get("text-generation-with-past")
        if constructor is not None and issubclass(constructor.func, configs.TextDecoderOpenVINOConfig):
            found[name] = constructor.func
    return found


def numbers(version: str | None) -> list[int] | None:
    return [*map(int, (version + ".0").split(".")[:3])] if version else None


def test_the_ranges_are_those_that_optimum_intel_declares() -> None:
    export_classes = declared()
    assert set(ARCHITECTURES) <= set(export_classes)
    for name, known in ARCHITECTURES.items():
        theirs = export_classes[name]
        assert name in NARROWER or numbers(known.first) == numbers(theirs.MIN_TRANSFORMERS_VERSION), name
        assert numbers(known.last) == numbers(getattr(theirs, "MAX_TRANSFORMERS_VERSION", None)), name
        assert known.newest in known


def test_every_other_decoder_is_refused_for_its_state() -> None:
    from transformers import CONFIG_MAPPING

    for name in set(declared()) - set(ARCHITECTURES) - OF_SEVERAL_PARTS:
        if name in CONFIG_MAPPING:
            with pytest.raises(SourceError, match="another state"):
                check_architecture("m", CONFIG_MAPPING[name]().to_dict())


def test_the_ranges_of_pyproject_are_those_of_the_table() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["optional-dependencies"]["export"]
    assert f"optimum-intel>={OPTIMUM_INTEL},<2.3" in wanted and "transformers>=5.0,<5.6" in wanted
    assert "5.0.0" in DOVETAIL_RUNS_WITH and "5.5.4" in DOVETAIL_RUNS_WITH and "4.57.6" not in DOVETAIL_RUNS_WITH
    assert versions("optimum-intel")["optimum-intel"].startswith(OPTIMUM_INTEL)


def status(name: str) -> str:
    """What the documentation says of an architecture."""
    if reason := UNPAGED.get(name):
        return f"refused: it {reason}"
    if name not in {family.model_type for family in WORKS.values()}:
        return "exported, not tried"
    tried = [each for each in WORKS.values() if each.model_type == name]
    return "works" + (", with and without a window" if len({each.windows for each in tried}) == 2 else
                      ", with a window" if tried[0].windows else "")  # fmt: skip


def test_the_documentation_lists_every_architecture() -> None:
    rows = [f"| `{name}` | {ARCHITECTURES[name]} | {status(name)} |" for name in sorted(ARCHITECTURES)]
    table = "\n".join(["| `model_type` | transformers | |", "|---|---|---|", *rows])
    assert table in DOCS.read_text(), f"docs/reference/families.md needs this table:\n{table}"


def test_a_context_ends_where_the_factors_of_long_rope_change(tmp_path: Path) -> None:
    make_model(WORKS["phi3, long RoPE"], tmp_path / "hf")
    said: list[str] = []
    export_target(
        str(tmp_path / "hf"), tmp_path / "pair", options=FLOAT32, progress=lambda stage, *_: said.append(stage)
    )
    assert read_manifest(tmp_path / "pair").target.max_context == 96
    assert any("context ends at 96 tokens" in line for line in said)
    with pytest.raises(InputError, match="--max-context 97 passes the original context 96"):
        options = replace(FLOAT32, max_context=97)
        export_target(str(tmp_path / "hf"), tmp_path / "other", options=options)


def spoil_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every node attends to all nodes before it."""
    monkeypatch.setattr(DraftTree, "paths", lambda tree: [np.arange(len(tree))])


@pytest.mark.parametrize("name", ["llama", "mistral, window"])
def test_a_graph_that_applies_the_mask_wrongly_is_caught_at_export(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(WORKS[name], tmp_path / "hf")
    spoil_the_mask(monkeypatch)
    with pytest.raises(ExportError, match="does not verify trees"):
        export_target(str(tmp_path / "hf"), tmp_path / "pair", options=FLOAT32)
    assert not (tmp_path / "pair").exists()


@pytest.mark.parametrize("weight_format", ["fp32", "int8", "int4"])
def test_a_graph_that_leaves_the_window_out_is_caught_at_export(
    weight_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-Neo's window of 32 is left out by OpenVINO: the comparison finds it where its name were not known."""
    settings = {
        "hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
        "window_size": WINDOW, "vocab_size": 320, "max_position_embeddings": 256, "initializer_range": 0.3, **IDS,
    }  # fmt: skip
    monkeypatch.delitem(UNPAGED, "gpt_neo")
    make_model(Family("gpt_neo", {}, settings), tmp_path / "hf")
    with pytest.raises(ExportError, match="does not compute the model: after 80 tokens"):
        options = TargetOptions(WeightOptions(weight_format, group_size=32 if weight_format == "int4" else None))
        export_target(str(tmp_path / "hf"), tmp_path / "pair", options=options)
    assert not (tmp_path / "pair").exists()


@pytest.mark.parametrize("name", ["mistral, window", "gpt_oss", "qwen3_moe"])
def test_a_drafter_is_trained_on_a_family_and_changes_no_token(name: str, tmp_path: Path) -> None:
    make_model(HERE[name], tmp_path / "hf")
    export_target(str(tmp_path / "hf"), tmp_path / "pair", options=FLOAT32)
    model = PagedModel(tmp_path / "pair/target/openvino_model.xml", properties=EXACT)
    random = np.random.default_rng(0)
    requests = [Request(tuple(map(int, random.integers(1, 250, 6))), 50) for _ in range(8)]
    Corpus.of(BatchWriter(model, [], slots=8, max_length=64).write(requests, random)).save(tmp_path / "corpus.npz")
    fit = FitOptions(epochs=4, unroll=2, window=48, batch=4, warmup=2, learning_rate=3e-3)
    plan = TrainPlan(corpora=(tmp_path / "corpus.npz",), draft_vocab=128, held_out=0.1, fit=fit)
    train(tmp_path / "pair", tmp_path / "drafter", plan, silent)
    add_drafter(tmp_path / "drafter", tmp_path / "pair")
    tree = TreeLimits(width=12, depth=3, top_k=3, lookup=4)
    with Engine.from_pretrained(tmp_path / "pair", drafter_device="cpu", tree=tree, ov_config=EXACT) as engine:
        drafted = engine.generate("a window of words", 60, raw=True)
        assert drafted.metrics.drafted > 60
        assert drafted.token_ids == engine.generate("a window of words", 60, raw=True, speculate=False).token_ids
