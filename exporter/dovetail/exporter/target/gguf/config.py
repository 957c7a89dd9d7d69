"""Makes the transformers configuration of a GGUF model from its header.

The configuration takes every key of the header that changes the model. `_Facts` refuses unknown
keys by name, because such a key may be a soft cap or a window that the model needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dovetail.exporter.target.gguf.header import GgufHeader
from dovetail.runtime.errors import SourceError

ROPE_FACTORS = "rope_freqs.weight"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_META_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class _Architecture:
    """Names in transformers for the facts of one of llama.cpp's architectures.

    eps: keys of the norm's epsilon. sizes, numbers: more keys of integers and floats.
    fixed: facts from llama.cpp's code. rotary: "whole" (head), "part" or "none".
    head_dim: whether the configuration states the size of a head.
    names: common facts that transformers names differently.
    biases: a tensor of the first block -> the flag that gives every block this bias.
    """

    model_type: str
    eps: tuple[str, str] = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
    sizes: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rotary: str = "whole"
    head_dim: bool = True
    window: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)


_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_LAYER_NORM = "attention.layer_norm_epsilon"
_SOFT_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_GPT2_NAMES = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "intermediate_size": "n_inner",
    "num_attention_heads": "n_head",
}
_ARCHITECTURES = {
    "llama": _Architecture("llama", biases={"blk.0.attn_q.bias": "attention_bias", "blk.0.ffn_gate.bias": "mlp_bias"}),
    "qwen2": _Architecture("qwen2", head_dim=False, fixed={"use_sliding_window": False}),
    "qwen3": _Architecture("qwen3", biases={"blk.0.attn_q.bias": "attention_bias"}),
    "qwen2moe": _Architecture(
        "qwen2_moe",
        head_dim=False,
        sizes={**_EXPERTS, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        fixed={"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "qwen3moe": _Architecture(
        "qwen3_moe",
        sizes=_EXPERTS,
        fixed={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        biases={"blk.0.attn_q.bias": "attention_bias"},
    ),
    "phi3": _Architecture("phi3", head_dim=False, rotary="part", window=True),
    "starcoder2": _Architecture(
        "starcoder2", eps=(_LAYER_NORM, "norm_epsilon"), head_dim=False, biases={"blk.0.attn_q.bias": "use_bias"}
    ),
    "stablelm": _Architecture(
        "stablelm",
        eps=(_LAYER_NORM, "layer_norm_eps"),
        head_dim=False,
        rotary="part",
        biases={"blk.0.attn_q.bias": "use_qkv_bias"},
    ),
    "gpt2": _Architecture(
        "gpt2", eps=(_LAYER_NORM, "layer_norm_epsilon"), rotary="none", head_dim=False, names=_GPT2_NAMES
    ),
    "gemma2": _Architecture("gemma2", window=True, numbers={key: key for key in _SOFT_CAPS}),
    "gemma3": _Architecture("gemma3_text", window=True),
}
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, whose attention has another scale
_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """`config.json` of a GGUF model; reads no weights. Raises SourceError."""
    name = header.architecture
    architecture = _ARCHITECTURES.get(name)
    if architecture is None:
        raise header.error(f"GGUF architecture {name!r} is none of {', '.join(_ARCHITECTURES)}")
    facts = _Facts(header, name)
    heads = facts.size("attention.head_count")
    vocab_size, hidden_size = _table(header, facts)
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": _blocks(header, facts),
        "intermediate_size": facts.size("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": facts.size("attention.head_count_kv", heads),
        "max_position_embeddings": facts.size("context_length"),
        architecture.eps[1]: facts.number(architecture.eps[0]),
        "tie_word_embeddings": HEAD not in header.tensors,
        **{name: _token_id(header, key, vocab_size) for name, key in _TOKENS.items()},
        **architecture.fixed,
        **{flag: tensor in header.tensors for tensor, flag in architecture.biases.items()},
    }
    config |= {known: facts.size(key) for key, known in architecture.sizes.items()}
    config |= {known: facts.number(key) for key, known in architecture.numbers.items()}
    if architecture.window:
        config["sliding_window"] = facts.size("attention.sliding_window", 0, least=0) or None
    head_dim = _head_dim(facts, config, architecture)
    if architecture.head_dim:
        config["head_dim"] = head_dim
    if architecture.rotary != "none":
        config["rope_parameters"] = _rope(header, facts, head_dim, config, architecture)
    if name == "stablelm":
        config["use_parallel_residual"] = facts.take("use_parallel_residual", False)
    if name in _GEMMA_27B:
        _gemma(name, facts, config, head_dim)
    facts.finish()
    if architecture.names:
        del config["num_key_value_heads"]
    return {architecture.names.get(key, key): value for key, value in config.items()}


def _gemma(name: str, facts: _Facts, config: dict[str, Any], head_dim: int) -> None:
    """Add the facts of Gemma 2 and 3 from llama.cpp's code: attention's scale, RoPE of windows."""
    is_27b = config["num_hidden_layers"] == _GEMMA_27B[name]
    config["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"] if is_27b else head_dim
    if name == "gemma3":
        theta = facts.number("rope.freq_base_swa", 10000.0)
        config["rope_parameters"] = {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": theta},
        }


class _Facts:
    """Keys of an architecture's namespace: `take` removes a key, `finish` refuses the others."""

    # Keys with the values that have no effect. None: no value has an effect.
    _INERT: Mapping[str, tuple[Any, ...] | None] = {
        "tensor_data_layout": None,
        "rope.scaling.finetuned": None,
        "attention.causal": (True,),
        "expert_count": (0,),
        "expert_used_count": (0,),
        "leading_dense_block_count": (0,),
        "pooling_type": (0,),
        "rope.scaling.attn_factor": (1.0,),
        "rope.scaling.yarn_ext_factor": (1.0,),
    }

    def __init__(self, header: GgufHeader, architecture: str):
        self._header, self._prefix = header, (prefix := architecture + ".")
        self._left = {k.removeprefix(prefix): v for k, v in header.metadata.items() if k.startswith(prefix)}

    def has(self, key: str) -> bool:
        return key in self._left

    def take(self, key: str, default: Any = None) -> Any:
        """The value of `key`, or `default`; an array with equal items counts as one value."""
        value = self._left.pop(key, default)
        if isinstance(value, list):
            if not value or any(item != value[0] for item in value):
                raise self.error(key, f"differs between layers ({value[:4]})")
            value = value[0]
        return value

    def size(self, key: str, default: int | None = None, least: int = 1) -> int:
        """The integer `key`, `least` to _LARGEST. Raises SourceError for other values."""
        value = self.take(key, default)
        if type(value) is not int or not least <= value <= _LARGEST:
            raise self.error(key, "is missing" if value is None else f"is {value!r}, not {least} to {_LARGEST}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The positive finite number `key`. Raises SourceError for other values."""
        value = self.take(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self.error(key, "is missing" if value is None else f"is {value!r}, no positive number")
        return float(value)

    def error(self, key: str, what: str) -> SourceError:
        return self._header.error(f"{self._prefix}{key} {what}")

    def finish(self) -> None:
        """Raise SourceError for the first key that nothing took and that changes the model."""
        for key, value in self._left.items():
            if key not in self._INERT or ((inert := self._INERT[key]) is not None and value not in inert):
                raise self.error(key, f"({value if not isinstance(value, list) else '...'}) is not supported")


def _table(header: GgufHeader, facts: _Facts) -> tuple[int, int]:
    """Rows and columns of the embedding table. Raises SourceError if the facts differ."""
    table = header.tensors.get(EMBEDDING)
    if table is None or len(table.shape) != 2:
        raise SourceError(f"{header.path} has no embedding table {EMBEDDING}: give a whole language model")
    rows, columns = table.shape
    if (said := facts.size("embedding_length")) != columns:
        raise facts.error("embedding_length", f"is {said}, but {EMBEDDING} has {columns} columns")
    if (said := facts.size("vocab_size", rows)) != rows:
        raise facts.error("vocab_size", f"is {said}, but {EMBEDDING} has {rows} rows")
    tokens = header.metadata.get("tokenizer.ggml.tokens", [])
    if isinstance(tokens, list) and len(tokens) > rows:
        raise SourceError(f"{header.path} has {len(tokens)} tokens, but {EMBEDDING} has {rows} rows: download it again")
    return rows, columns


def _token_id(header: GgufHeader, name: str, vocab_size: int) -> int | None:
    token = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
    return token if type(token) is int and 0 <= token < vocab_size else None


def _blocks(header: GgufHeader, facts: _Facts) -> int:
    count = facts.size("block_count")
    held = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    if len(held) != count or held != {str(block) for block in range(count)}:
        raise facts.error("block_count", f"is {count}, but the file holds {len(held)} blocks")
    return count


def _head_dim(facts: _Facts, config: Mapping[str, Any], architecture: _Architecture) -> int:
    hidden, heads, kv_heads = (config[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if heads % kv_heads:
        raise facts.error("attention.head_count", f"is {heads}, no multiple of its {kv_heads} key-value heads")
    if not facts.has("attention.key_length") and hidden % heads:
        raise facts.error("attention.head_count", f"is {heads}, but embedding_length is {hidden}")
    head_dim = facts.size("attention.key_length", hidden // heads)
    if (value_dim := facts.size("attention.value_length", head_dim)) != head_dim:
        raise facts.error("attention.value_length", f"is {value_dim}, not the key's {head_dim}")
    if not architecture.head_dim and head_dim * heads != hidden:
        raise facts.error("attention.key_length", f"is {head_dim}, but {heads} heads make {hidden} values")
    return head_dim


def _rope(
    header: GgufHeader, facts: _Facts, head_dim: int, config: Mapping[str, Any], architecture: _Architecture
) -> dict[str, Any]:
    """`rope_parameters`: the base, the rotated part of a head, and the scaling."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": facts.number("rope.freq_base", 10000.0)}
    turned = facts.size("rope.dimension_count", head_dim)
    if turned > head_dim or turned % 2 or (turned != head_dim and architecture.rotary != "part"):
        raise facts.error("rope.dimension_count", f"is {turned}, but a head has {head_dim} values")
    if architecture.rotary == "part":
        rope["partial_rotary_factor"] = turned / head_dim
    kind = facts.take("rope.scaling.type", "linear")
    old = facts.number("rope.scale_linear", 1.0)
    factor = facts.number("rope.scaling.factor", old)
    original = facts.size("rope.scaling.original_context_length", config["max_position_embeddings"])
    if kind not in ("none", "linear", "yarn"):
        raise facts.error("rope.scaling.type", f"is {kind!r}, not none, linear or yarn")
    if kind != "none" and factor != 1.0:
        rope |= {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = original
            for known in ("beta_fast", "beta_slow"):
                if facts.has(key := f"rope.scaling.yarn_{known}"):
                    rope[known] = facts.number(key)
    if ROPE_FACTORS in header.tensors:
        rope |= _llama3_rope(header, rope, turned)
    return rope


def _llama3_rope(header: GgufHeader, rope: Mapping[str, Any], turned: int) -> dict[str, Any]:
    """Llama 3.1's scaling of RoPE, from the factors that divide each frequency.

    A GGUF file stores only the factors. Raises SourceError if Meta's constants give other factors.
    """
    factors = header.tensors[ROPE_FACTORS].read().ravel()
    if (factors == 1).all():
        return {}
    scaling = {"rope_type": "llama3", "factor": float(factors.max()), **_META_LLAMA3}
    low, high, original = _META_LLAMA3.values()
    frequencies = rope["rope_theta"] ** (-np.arange(0, turned, 2) / turned)
    turns = original * frequencies / (2 * np.pi)  # of each frequency, in the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    if rope["rope_type"] != "default" or factors.shape != expected.shape or not np.allclose(factors, expected, 1e-3):
        raise header.error(f"{ROPE_FACTORS} is not Llama 3.1's scaling of RoPE")
    return scaling
