"""Converts a GGUF drafter of llama.cpp (architecture "eagle3") to a checkpoint folder.

Axes: d drafter width, K draft vocabulary. llama.cpp stores target ids, not offsets, and the rows of
queries and keys in the order of its own RoPE. Source: llama.cpp's converter and src/models/eagle3.cpp.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from dovetail.exporter.target.gguf.header import GgufHeader, GgufTensor, read_header
from dovetail.runtime.errors import SourceError
from dovetail.runtime.pair.files import cache_dir, sha256_file

ARCHITECTURE = "eagle3"
VERSION = 1  # of the conversion; another number converts kept files again
_NAMES = {
    "fc": "fc", "output_norm": "norm", "output": "lm_head", "token_embd": "embed_tokens",
    "blk.0.attn_norm": "layers.0.input_layernorm", "blk.0.attn_norm_2": "layers.0.hidden_norm",
    "blk.0.attn_q": "layers.0.self_attn.q_proj", "blk.0.attn_k": "layers.0.self_attn.k_proj",
    "blk.0.attn_v": "layers.0.self_attn.v_proj", "blk.0.attn_output": "layers.0.self_attn.o_proj",
    "blk.0.ffn_norm": "layers.0.post_attention_layernorm", "blk.0.ffn_gate": "layers.0.mlp.gate_proj",
    "blk.0.ffn_up": "layers.0.mlp.up_proj", "blk.0.ffn_down": "layers.0.mlp.down_proj",
}  # fmt: skip


def converted(file: Path) -> Path:
    """Return a folder in the layout of speculators with the drafter in `file`, which is kept in the cache.

    Raises SourceError: another architecture, an unknown tensor, a missing key.
    """
    header = read_header(file)
    if header.architecture != ARCHITECTURE:
        raise SourceError(
            f"{file} is a GGUF of {header.architecture!r}, no EAGLE-3 drafter: a language model drafts with "
            "dovetail-run --draft-model"
        )
    folder = cache_dir() / "drafters" / f"{sha256_file(file)}-{VERSION}"
    if not folder.is_dir():
        config, heads = _config(header)
        names = {name: _name(header, name) for name in header.tensors}
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            _write(header, names, heads, made)
            (made / "config.json").write_text(json.dumps(config, indent=2))
            try:
                os.replace(made, folder)
            except OSError:  # another process was first
                if not folder.is_dir():
                    raise
                shutil.rmtree(made)
    return folder


def _config(header: GgufHeader) -> tuple[dict[str, Any], dict[str, int]]:
    """The config in speculators' form, and the heads of q_proj and k_proj. Raises SourceError."""

    def key(name: str, kind: type, default: Any = None) -> Any:
        value = header.metadata.get(f"{ARCHITECTURE}.{name}", default)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise header.error(f"{ARCHITECTURE}.{name} is {value!r:.60}")
        return value

    if key("block_count", int) != 1:
        raise header.error(f"{ARCHITECTURE}.block_count is not 1")
    if header.metadata.get(f"{ARCHITECTURE}.rope.scaling.type", "none") != "none":
        raise header.error("it has a scaled RoPE, which its tensors do not describe whole")
    heads, width = key("attention.head_count", int), key("embedding_length", int)
    groups = key("attention.head_count_kv", int, heads)
    if heads < 1 or groups < 1:
        raise header.error(f"{heads} and {groups} heads")
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    vocabulary = key("vocab_size", int, len(tokens) if isinstance(tokens, list) else None)
    d2t = header.tensors.get("d2t")
    layer = {
        "model_type": "llama", "hidden_size": width, "intermediate_size": key("feed_forward_length", int),
        "num_attention_heads": heads, "num_key_value_heads": groups, "num_hidden_layers": 1,
        "head_dim": key("attention.key_length", int, width // heads), "vocab_size": vocabulary,
        "max_position_embeddings": key("context_length", int),
        "rms_norm_eps": key("attention.layer_norm_rms_epsilon", float),
        "rope_theta": key("rope.freq_base", float, 10000.0),
    }  # fmt: skip
    config = {
        "speculators_model_type": "eagle3",
        "transformer_layer_config": layer,
        "draft_vocab_size": d2t.shape[0] if d2t else vocabulary,
        "eagle_aux_hidden_state_layer_ids": key("extract_layers", list),
        "target_hidden_size": key("target_hidden_size", int),
        "norm_before_residual": key("norm_before_residual", bool, False),
        "norm_output": False,
    }
    return config, {"blk.0.attn_q": heads, "blk.0.attn_k": groups}


def _name(header: GgufHeader, name: str) -> str:
    """The checkpoint's name of a tensor. Raises SourceError."""
    if name == "d2t":
        return name
    stem, _, part = name.rpartition(".")
    if stem not in _NAMES or part != "weight":
        raise header.error(f"it has the tensor {name!r}, which no EAGLE-3 drafter of llama.cpp has")
    return f"{_NAMES[stem]}.weight"


def _write(header: GgufHeader, names: dict[str, str], heads: dict[str, int], folder: Path) -> None:
    """Write model.safetensors: float32, with offsets for d2t. Raises SourceError."""
    from safetensors.numpy import save_file

    arrays: dict[str, NDArray[Any]] = {}
    for given, name in names.items():
        tensor = header.tensors[given]
        if given == "d2t":
            arrays[name] = _offsets(header, tensor)
            continue
        try:
            values = tensor.read()
        except NotImplementedError as error:
            raise header.error(f"{given} has type {tensor.kind.name}, which gguf cannot read") from error
        if count := heads.get(given.removesuffix(".weight")):
            values = _in_halves(header, values, count)
        arrays[name] = np.ascontiguousarray(values, np.float32)
    save_file(arrays, folder / "model.safetensors")


def _offsets(header: GgufHeader, tensor: GgufTensor) -> NDArray[np.int64]:
    """[K] int64, target id less draft id."""
    kinds = {GGMLQuantizationType.I64: np.int64, GGMLQuantizationType.I32: np.int32}
    if tensor.kind not in kinds or len(tensor.shape) != 1:
        raise header.error(f"d2t is {tensor.kind.name} {list(tensor.shape)}, not a row of whole numbers")
    ids = np.memmap(tensor.file, kinds[tensor.kind], "r", tensor.offset, tensor.shape).astype(np.int64)
    return ids - np.arange(len(ids))


def _in_halves(header: GgufHeader, rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Order the rows [heads * head_dim, ..] as halves of each head, from llama.cpp's pairs."""
    if len(rows) % (2 * heads):
        raise header.error(f"{len(rows)} rows do not divide into {heads} heads")
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
