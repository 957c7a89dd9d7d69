"""Reads a checkpoint's JSON files and checks them before transformers and optimum use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dovetail.runtime.errors import SourceError
from dovetail.runtime.system.bounds import CONTEXT_MOST, LARGEST, check_number, check_whole
from dovetail.runtime.system.files import read_object

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx", "max_seq_len")
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
WIDTH_KEYS = ("hidden_size", "n_embd", "d_model")
JSON_FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "model.safetensors.index.json", "pytorch_model.bin.index.json",
)  # fmt: skip

ROPE_KEYS = ("rope_scaling", "rope_parameters")
_SCALED = ("linear", "dynamic", "yarn", "llama3")  # types of RoPE that need a factor
_ROPE_LISTS = ("short_factor", "long_factor")
_ROPE_NUMBERS = (
    "factor", "rope_theta", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor",
    "partial_rotary_factor", *_ROPE_LISTS,
)  # fmt: skip
_ROPE_MOST = 1e15

WEIGHTS_PER_BYTE = 8  # at most, in every packing
_AGAIN = "copy or download it again"
# Sizes of a model and the name of their bound in LARGEST.
_SIZES = {
    "vocab_size": "vocab_size",
    **dict.fromkeys(WIDTH_KEYS, "hidden_size"),
    **dict.fromkeys(LAYER_KEYS, "num_layers"),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), "num_attention_heads"),
}
# Sizes that may be null, because they follow from other sizes, or a list with a size per layer.
_OPTIONAL_SIZES = {
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), "num_kv_heads"),
    **dict.fromkeys(("intermediate_size", "n_inner"), "intermediate_size"),
    **dict.fromkeys(CONTEXT_KEYS, "max_context"),
    "head_dim": "head_dim",
}


def check_json(folder: Path) -> None:
    """Check the JSON files of a checkpoint. Raises SourceError for the first that is no object."""
    for name in JSON_FILES:
        read_object(folder / name, SourceError, _AGAIN)


def read_config(folder: Path, failure: type[Exception] = SourceError) -> dict[str, Any]:
    """config.json of a checkpoint or target. Raises `failure` for sizes that no model has."""
    file = folder / "config.json"
    config = read_object(file, failure, _AGAIN)
    for sizes in (config, text_config(config, file, failure)):
        for name, bound in (_SIZES | _OPTIONAL_SIZES).items():
            value = sizes.get(name)
            optional = name in _OPTIONAL_SIZES
            if name not in sizes or (value is None and optional):
                continue
            for size in value if isinstance(value, list) and value and optional else [value]:
                check_whole(f"{file}: {name}", size, failure, _AGAIN, most=LARGEST[bound])
        for name in ROPE_KEYS:
            _check_rope(f"{file}: {name}", sizes.get(name), failure)
    return config


def _check_rope(where: str, rope: object, failure: type[Exception]) -> None:
    """Raise `failure` for a RoPE scaling that no library can compute.

    Each type of layer may have a scaling of its own (`full_attention`, `sliding_attention`).
    """
    if rope is None:
        return
    if not isinstance(rope, dict):
        raise failure(f"{where} is a {type(rope).__name__}, not an object: {_AGAIN}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str):
        raise failure(f"{where} has a rope_type {kind!r:.60} that is no string: {_AGAIN}")
    if kind in _SCALED and "factor" not in rope:
        raise failure(f"{where} of type {kind} has no factor: {_AGAIN}")
    for name, value in rope.items():
        if name.endswith("_attention"):
            _check_rope(f"{where}.{name}", value, failure)
        elif name == "original_max_position_embeddings" and value is not None:
            check_whole(f"{where}.{name}", value, failure, _AGAIN, most=CONTEXT_MOST)
        elif name in _ROPE_NUMBERS and value is not None:
            for number in value if isinstance(value, list) and name in _ROPE_LISTS else [value]:
                check_number(f"{where}.{name}", number, failure, _AGAIN, most=_ROPE_MOST)


def check_weights(config: dict[str, Any], folder: Path, stored: int) -> None:
    """Raise SourceError if config.json describes far more weights than `stored` bytes can hold.

    Libraries fill missing weights with random numbers, and need memory for them.
    """
    sizes = text_config(config, folder / "config.json")
    width, layers = (next((sizes[key] for key in keys if key in sizes), 0) for keys in (WIDTH_KEYS, LAYER_KEYS))
    least = width * (sizes.get("vocab_size", 0) + 2 * width * layers)  # an embedding, and two square matrices a layer
    if least > WEIGHTS_PER_BYTE * stored:
        raise SourceError(
            f"{folder / 'config.json'} describes {least:,} weights or more, the files of weights have {stored:,} "
            f"bytes: {_AGAIN}"
        )


def text_config(config: dict[str, Any], file: Path, failure: type[Exception] = SourceError) -> dict[str, Any]:
    """The part of a configuration that describes the language model. Raises `failure`."""
    inner = config.get("text_config") or config
    if not isinstance(inner, dict):
        raise failure(f"{file}: text_config is a {type(inner).__name__}, not an object: {_AGAIN}")
    return inner


def sizes_config(config: dict[str, Any], file: Path, failure: type[Exception] = SourceError) -> dict[str, Any]:
    """The same part with width and layers under Llama's names, which formats of drafters read."""
    inner = text_config(config, file, failure)
    named = {"hidden_size": WIDTH_KEYS, "num_hidden_layers": LAYER_KEYS}
    found = {name: inner[key] for name, keys in named.items() for key in keys if key in inner and name not in inner}
    return {**inner, **found}
