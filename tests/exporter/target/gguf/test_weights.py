"""A GGUF model computes what the model that it was made from computes, in one file or in parts, or it is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dovetail.exporter.build.progress import quiet
from dovetail.exporter.target.convert import WeightOptions
from dovetail.exporter.target.export import TargetOptions, export_target
from dovetail.exporter.target.gguf.header import read_model
from dovetail.exporter.target.gguf.weights import write_checkpoint
from dovetail.exporter.target.sources import resolve_source
from dovetail.runtime.errors import SourceError

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.5,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ROPE = "rope_freqs.weight"
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXPERT_KEYS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 16}
# llama.cpp's architecture, transformers' type, what its configuration has besides SIZES, what the header has besides.
MODELS: Mapping[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", "llama", {"rms_norm_eps": 1e-3}, {}),
    "llama-head-dim": ("llama", "llama", {"head_dim": 16}, {"attention.key_length": 16, "attention.value_length": 16}),
    "llama-biases": ("llama", "llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "llama-tied": ("llama", "llama", {"tie_word_embeddings": True}, {}),
    "llama3": ("llama", "llama", {"rope_parameters": LLAMA3, "head_dim": 32}, {"rope.freq_base": 500000.0,
               "attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32}),
    "llama-linear": ("llama", "llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
                     {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "qwen2": ("qwen2", "qwen2", {}, {"rope.freq_base": 10000.0}),
    "qwen2-yarn": ("qwen2", "qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6,
                   "original_max_position_embeddings": 32}}, {"rope.freq_base": 1e6, "rope.scaling.type": "yarn",
                   "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 16}, {"attention.key_length": 16, "attention.value_length": 16}),
    "qwen2moe": ("qwen2moe", "qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 24},
                 {**EXPERT_KEYS, "expert_shared_feed_forward_length": 24}),
    "qwen3moe": ("qwen3moe", "qwen3_moe", {**EXPERTS, "head_dim": 16, "norm_topk_prob": True},
                 {**EXPERT_KEYS, "attention.key_length": 16, "attention.value_length": 16}),
    "phi3": ("phi3", "phi3", {"sliding_window": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
             "partial_rotary_factor": 0.5}}, {"rope.dimension_count": 4, "attention.sliding_window": 8}),
    "phi3-whole": ("phi3", "phi3", {}, {"attention.sliding_window": 0}),
    "starcoder2": ("starcoder2", "starcoder2", {"tie_word_embeddings": True}, {}),
    "stablelm": ("stablelm", "stablelm", {"use_qkv_bias": True, "rope_parameters": {"rope_type": "default",
                 "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
                 {"rope.dimension_count": 4, "use_parallel_residual": False}),
    "gemma2": ("gemma2", "gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8,
               "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "tie_word_embeddings": True},
               {"attention.key_length": 16, "attention.value_length": 16, "attention.sliding_window": 8,
                "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3", "gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8,
               "num_hidden_layers": 7, "tie_word_embeddings": True, "rope_parameters": {
                   "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                   "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
               {"attention.key_length": 16, "attention.value_length": 16, "attention.sliding_window": 8,
                "rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}),
    "gpt2": ("gpt2", "gpt2", {"tie_word_embeddings": True, "n_inner": 48}, {}),
}  # fmt: skip


def tiny_model(kind: str, sizes: Mapping[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    with torch.no_grad():
        for value in model.parameters():  # norms and biases that are not all one or zero
            if value.ndim == 1:
                value.add_(torch.randn(value.shape) * 0.2)
    return model


def facts(model: PreTrainedModel, more: Mapping[str, Any]) -> dict[str, Any]:
    """What llama.cpp's converter says of every model of these architectures."""
    config = model.config
    eps = next(getattr(config, k) for k in ("rms_norm_eps", "norm_epsilon", "layer_norm_eps", "layer_norm_epsilon")
               if hasattr(config, k))  # fmt: skip
    kind = "layer_norm_rms_epsilon" if hasattr(config, "rms_norm_eps") else "layer_norm_epsilon"
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": SIZES["intermediate_size"],
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", config.num_attention_heads),
        f"attention.{kind}": eps,
        **more,
    }


def tensors(model: PreTrainedModel, arch: str) -> dict[str, np.ndarray]:
    """The model's tensors by llama.cpp's names, laid out as its converter does."""
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    mapping = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    heads = {"attn_q": model.config.num_attention_heads,
             "attn_k": getattr(model.config, "num_key_value_heads", None)}  # fmt: skip
    found: dict[str, np.ndarray] = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        tensor = value.numpy()
        if name.endswith("experts.gate_up_proj"):
            block = f"blk.{re.search(r'[0-9]+', name)[0]}"  # type: ignore[index]  # every layer's name has its number
            found[f"{block}.ffn_gate_exps.weight"], found[f"{block}.ffn_up_exps.weight"] = np.split(tensor, 2, axis=1)
            continue
        suffix = f".{name.rsplit('.', 1)[1]}" if name.endswith((".weight", ".bias")) else ""
        short = mapping.get_name(name.removesuffix(suffix))
        assert short, name
        part = short.split(".")[-1]
        if arch == "llama" and part in heads:
            tensor = tensor.reshape(heads[part], 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        if arch == "gpt2" and tensor.ndim == 2 and ".h." in name:
            tensor = tensor.T
        if arch.startswith("gemma") and part.endswith("norm"):
            tensor = tensor + 1
        if part == "ffn_gate_inp_shexp":
            tensor = tensor[0]
        found[short + (suffix or ".weight")] = tensor
    return found


def write(path: Path, arch: str, metadata: Mapping[str, Any], parts: list[dict[str, np.ndarray]]) -> Path:
    """A GGUF model in as many files as `parts`; returns the first."""
    total = sum(map(len, parts))
    first = None
    for index, part in enumerate(parts):
        name = path if len(parts) == 1 else path.with_name(f"{path.stem}-{index + 1:05}-of-{len(parts):05}.gguf")
        first = first or name
        writer = gguf.GGUFWriter(name, arch)
        if len(parts) > 1:
            writer.add_uint16("split.no", index)
            writer.add_uint16("split.count", len(parts))
            writer.add_int32("split.tensors.count", total)
        for key, value in metadata.items() if index == 0 else ():
            add: dict[type, Callable[[str, Any], None]] = {
                bool: writer.add_bool,
                int: writer.add_uint32,
                float: writer.add_float32,
                str: writer.add_string,
            }
            add[type(value)](f"{arch}.{key}", value)
        for key, tensor in part.items():
            writer.add_tensor(key, np.ascontiguousarray(tensor))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert first
    return first


def logits(model: PreTrainedModel) -> np.ndarray:
    ids = torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits.numpy()


def made(name: str, tmp_path: Path, change: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None) -> Path:
    arch, kind, sizes, more = MODELS[name]
    with quiet():
        model = tiny_model(kind, {**SIZES, **sizes})
    found = tensors(model, arch)
    if name == "llama3":
        found[ROPE] = llama3_factors()
    change(found)
    return write(tmp_path / f"{name}.gguf", arch, facts(model, more), [found])


def llama3_factors() -> np.ndarray:
    """As convert_hf_to_gguf.py writes them, for heads of 32 values."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.for_model("llama", **{**SIZES, "head_dim": 32, "rope_parameters": LLAMA3})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, 32, 2) / 32)
    return (plain / scaled).numpy()


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_computes_what_its_model_computes(tmp_path: Path, name: str) -> None:
    _, kind, sizes, _ = MODELS[name]
    path = made(name, tmp_path)
    folder = tmp_path / "hf"
    folder.mkdir()
    with quiet():
        write_checkpoint(read_model(path), folder)
        ours, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        theirs = tiny_model(kind, {**SIZES, **sizes})
        assert not any(found.values()), found
        np.testing.assert_allclose(logits(ours.eval()), logits(theirs), atol=1e-4)


def drop(*names: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in names:
            del tensors[name]

    return change


def renamed(old: str, new: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def add(name: str, *shape: int) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: tensors.update({name: np.ones(shape, np.float32)})


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("llama", drop("blk.1.ffn_up.weight"), "lacks blk.1.ffn_up.weight"),
        ("llama", drop("output_norm.weight", "blk.0.attn_q.weight"), "lacks blk.0.attn_q.weight, output_norm.weight"),
        ("llama-biases", drop("blk.0.attn_output.bias"), "lacks blk.0.attn_output.bias"),
        ("llama-biases", drop("blk.0.attn_q.bias"), "no tensor for blk.0.attn_k.bias"),
        ("llama", add("blk.1.attn_q.bias", 32), "no tensor for blk.1.attn_q.bias"),
        ("llama", add("blk.0.attn_q_norm.weight", 8), "no tensor for blk.0.attn_q_norm.weight"),
        ("llama", add("blk.0.attn_k.weight", 8, 32), r"blk.0.attn_k.weight of shape \(8, 32\) does not fit llama"),
        ("llama", add(ROPE, 4), None),
        ("llama3", add(ROPE, 16), None),
        ("llama3", lambda tensors: tensors.update({ROPE: tensors[ROPE] * 1.5}), "not Llama 3.1's scaling"),
        ("llama-linear", lambda tensors: tensors.update({ROPE: llama3_factors()[12:]}), "not Llama 3.1"),
        ("phi3", add("rope_factors_long.weight", 2), "no tensor for rope_factors_long.weight"),
        ("gpt2", add(ROPE, 4), "no tensor for rope_freqs.weight"),
        ("qwen2", drop("blk.1.attn_k.bias"), "lacks blk.1.attn_k.bias"),
        ("llama", renamed("blk.1.", "blk.\u00b2."), "block_count is 2, but the file holds 2 blocks"),
        ("qwen3moe", drop("blk.1.ffn_up_exps.weight"), "ffn_gate_exps.weight of shape"),
    ],
)
def test_tensors_that_are_missing_or_left_over_are_named(
    tmp_path: Path, name: str, change: Callable[[dict[str, np.ndarray]], None], named: str | None
) -> None:
    header = read_model(made(name, tmp_path, change))
    folder = tmp_path / "hf"
    folder.mkdir()
    with quiet():
        if named is None:  # factors of one change nothing
            write_checkpoint(header, folder)
            return
        with pytest.raises(SourceError, match=named) as error:
            write_checkpoint(header, folder)
    assert f"{name}.gguf" in str(error.value) and "\n" not in str(error.value)
    assert not list(folder.iterdir())


@pytest.fixture
def split(tmp_path: Path) -> tuple[Path, ...]:
    """A tiny Llama in two files."""
    arch, kind, sizes, more = MODELS["llama"]
    with quiet():
        model = tiny_model(kind, {**SIZES, **sizes})
    found = list(tensors(model, arch).items())
    folder = tmp_path / "split"
    folder.mkdir()
    write(folder / "m.gguf", arch, facts(model, more), [dict(found[:10]), dict(found[10:])])
    return tuple(sorted(folder.iterdir()))


def test_all_parts_of_a_split_model_are_read(split: tuple[Path, ...], tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    for named in (*split, split[0].parent):
        source = resolve_source(str(named))
        assert source.path == split[0]
        assert list(source.files) == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    with quiet():
        write_checkpoint(read_model(split[1]), tmp_path / "hf")
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
        theirs = tiny_model("llama", {**SIZES, **MODELS["llama"][2]})
        np.testing.assert_allclose(logits(ours), logits(theirs), atol=1e-4)


@pytest.mark.parametrize("count", [0, 1, "2"])
def test_split_of_no_parts_is_one_file_or_refused(tmp_path: Path, count: object) -> None:
    path = tmp_path / "m-00001-of-00000.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", count) if isinstance(count, int) else writer.add_string("split.count", str(count))
    writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if isinstance(count, int):
        assert read_model(path).parts == (path,)
    else:
        with pytest.raises(SourceError, match="a part of a model in 2 files"):
            read_model(path)


def test_parts_that_are_missing_or_misnamed_are_named(split: tuple[Path, ...]) -> None:
    first, second = split
    kept = second.read_bytes()
    second.unlink()
    for location in (first, first.parent):
        with pytest.raises(SourceError, match=r"m-00002-of-00002.gguf is missing, and the model is in 2 files"):
            resolve_source(str(location))
    second.write_bytes(first.read_bytes())
    with pytest.raises(SourceError, match="do not belong together"):
        resolve_source(str(first))
    (first.parent / "part2.gguf").write_bytes(kept)
    with pytest.raises(SourceError, match=r"NAME-00001-of-00002.gguf"):
        resolve_source(str(first.parent / "part2.gguf"))


def test_split_model_becomes_a_pair_that_knows_its_ends(tiny_gguf: Path, tmp_path: Path) -> None:
    """One export from two parts, of which the second is named; its answers end where either id of the file says."""
    header, parts = read_model(tiny_gguf), []
    reader = gguf.GGUFReader(tiny_gguf)
    for index in range(2):
        path = tmp_path / f"tiny-{index + 1:05}-of-00002.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.no", index)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(header.tensors))
        for key, field in reader.fields.items() if index == 0 else ():
            if not key.startswith("GGUF.") and key not in ("general.architecture", "tokenizer.ggml.eos_token_id"):
                inner = field.types[1] if len(field.types) > 1 else None
                writer.add_key_value(key, field.contents(), field.types[0], inner)
        if index == 0:
            writer.add_eos_token_id(7)
            writer.add_eot_token_id(8)
        for name in list(header.tensors)[index::2]:
            writer.add_tensor(name, header.tensors[name].read().copy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        parts.append(path)
    manifest = export_target(str(parts[1]), tmp_path / "pair", options=TargetOptions(WeightOptions("fp32")))
    assert manifest.target.eos_token_ids[:2] == (7, 8)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((tmp_path / "pair/target" / name).read_text())
        assert tuple(config["eos_token_id"]) == manifest.target.eos_token_ids
    whole = export_target(str(tiny_gguf), tmp_path / "whole", options=TargetOptions(WeightOptions("fp32")))
    assert manifest.files["target/openvino_model.bin"] == whole.files["target/openvino_model.bin"]
