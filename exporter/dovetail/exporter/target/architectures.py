"""Decides from the configuration alone whether a model can become a target.

Each layer must keep keys and values and no other state, and optimum-intel must export the
architecture with the installed transformers. docs/reference/families.md lists the architectures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dovetail.exporter.target.configuration import CONTEXT_KEYS
from dovetail.runtime.errors import SourceError
from dovetail.runtime.system.machine import package_versions

OPTIMUM_INTEL = "2.2"


@dataclass(frozen=True)
class Range:
    """Versions of transformers with which optimum-intel exports an architecture, ends included.

    last: None if no release is too new. newest: the release to install for the architecture.
    """

    first: str
    last: str | None
    newest: str

    def __contains__(self, version: str) -> bool:
        here = _numbers(version)
        return _numbers(self.first) <= here and (self.last is None or here <= _numbers(self.last))

    def __str__(self) -> str:
        return f"{self.first} to {self.last}" if self.last else f"{self.first} or newer"


# Decoders that optimum-intel exports, by the range of transformers that optimum-intel declares.
_EXPORTED = {
    Range("4.57", None, "5.0.0"): """
        afmoe arcee biogpt bloom codegen cohere cohere2 falcon glm4 gpt2 gpt_bigcode gpt_neo gpt_neox
        gpt_neox_japanese gpt_oss gptj granite granitemoe hunyuan_v1_dense llama mistral mixtral mpt olmo olmo2 opt
        persimmon phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe smollm3 stablelm starcoder2 xglm""",
    # optimum-intel declares a wider range. But its export with 5.0.0 computes another model; 5.5.4
    # is right.
    Range("5.5", None, "5.5.4"): "phimoe",
    Range("4.57", "5.0.0", "5.0.0"): "gemma gemma2 gemma3_text glm",
    Range("5.0", "5.0.0", "5.0.0"): "gemma3n_text",
    Range("4.57", "4.57.6", "4.57.6"): """
        aquila baichuan bitnet dbrx deci exaone exaone4 internlm internlm2 jais llama4_text orion xverse""",
    Range("4.53", "4.57.6", "4.57.6"): "ouro",
    Range("4.51", "4.55.4", "4.55.4"): "chatglm qwen",
    Range("4.51", "4.53.3", "4.53.3"): "arctic deepseek deepseek_v2 deepseek_v3 minicpm minicpm3",
}
DOVETAIL_RUNS_WITH = Range("5.0.0", "5.5.4", "5.0.0")  # as pyproject.toml says
ARCHITECTURES = {name: versions for versions, names in _EXPORTED.items() for name in names.split()}

# Decoders that optimum-intel exports but whose paged form is wrong or does not exist
# (tests/exporter/target/test_families.py).
UNPAGED = {
    "gpt_neo": "limits every other layer to a window, which OpenVINO's paged attention leaves out",
    "mpt": "adds ALiBi to its attention, which OpenVINO's paged attention computes wrongly for MPT",
    **dict.fromkeys(
        ("xglm", "gpt_neox_japanese"),
        "is exported without scaled dot-product attention, from which OpenVINO makes paged attention",
    ),
}

# Fields of models with another kind of state: Mamba, short convolutions, linear attention.
_STATE_FIELDS = ("mamba_", "ssm_", "state_size", "conv_L_cache", "linear_num_", "linear_conv_")
_ATTENTION = {"full_attention", "sliding_attention"}


def check_architecture(location: str, config: Mapping[str, Any], transformers: str | None = None) -> None:
    """Refuse a checkpoint that cannot become a target.

    config: its config.json. transformers: a version, by default the installed version.
    Raises SourceError with the reason and the remedy.
    """
    kind = check_attention(location, config)
    if (accepted := ARCHITECTURES.get(kind)) is None:
        raise SourceError(
            f"{location} is a {kind} model, which optimum-intel {OPTIMUM_INTEL} does not export as a text decoder: "
            "choose an architecture from docs/reference/families.md"
        )
    installed = transformers or package_versions("transformers").get("transformers")  # without: the conversion says so
    if installed and installed not in accepted:
        here = f"pip install transformers=={accepted.newest}"
        apart = f"dovetail-export environment FOLDER --for {kind} (docs/reference/families.md)"
        raise SourceError(
            f"{location} ({kind}) needs transformers {accepted}, and {installed} is installed: "
            f"{here if accepted.newest in DOVETAIL_RUNS_WITH else apart}"
        )


def check_attention(location: str, config: Mapping[str, Any]) -> str:
    """Return a model's model_type. Raises SourceError if a tree verifier cannot compute its layers."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise SourceError(f"config.json of {location} names no model_type: give a language model")
    if state := _other_state(config):
        raise SourceError(
            f"{location} ({kind}) has layers that keep another state than keys and values ({state}), and that state "
            "cannot follow the branches of a token tree: choose a model with attention in every layer"
        )
    if wrong := _wrong_attention(config):
        raise SourceError(f"{location} ({kind}) {wrong}: choose another model")
    return kind


def context_of(config: Mapping[str, Any]) -> int | None:
    """Tokens of context that a target computes correctly; None if its configuration does not say.

    Long RoPE (Phi-3) changes its factors when a text passes the original context, but cached keys
    keep the old factors. The context of such a target therefore ends at the original context.
    """
    text = _text(config)
    claimed = next((int(text[key]) for key in CONTEXT_KEYS if text.get(key)), None)
    original = original_context(config)
    return min(claimed, original) if claimed and original else claimed or original


def original_context(config: Mapping[str, Any]) -> int | None:
    """The length in tokens at which long RoPE's factors change; None without long RoPE."""
    text = _text(config)
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    if not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type")) not in ("longrope", "su"):
        return None
    original = text.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    return int(original) if original else None


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def _other_state(config: Mapping[str, Any]) -> str | None:
    """The field that names a layer without attention; None if every layer is attention."""
    text = _text(config)
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and (other := next((kind for kind in kinds if kind not in _ATTENTION), None)):
        return f"layer_types: {other}"
    return next((field for field in text if field.startswith(_STATE_FIELDS)), None)


def _wrong_attention(config: Mapping[str, Any]) -> str | None:
    """The reason why OpenVINO's paged attention computes the model wrongly; None if it is right."""
    if config.get("is_encoder_decoder"):
        return "has an encoder and a decoder, and Dovetail needs a decoder alone"
    if config.get("model_type") == "falcon" and config.get("alibi"):
        return "adds ALiBi to its attention, which OpenVINO's paged attention computes wrongly for Falcon"
    return UNPAGED.get(str(config.get("model_type")))


def _numbers(version: str) -> tuple[int, ...]:
    """The first three numbers of a version: 5.0.0rc1 -> (5, 0, 0), 5.1 -> (5, 1, 0)."""
    parts = []
    for part in version.split(".")[:3]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        parts.append(int(digits or 0))
    return tuple(parts + [0] * (3 - len(parts)))
