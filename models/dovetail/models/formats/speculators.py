"""EAGLE-3 checkpoints of the speculators library: llama and qwen3 blocks, and more settings."""

from __future__ import annotations

from typing import Any

from dovetail.models.checkpoint import Stored
from dovetail.models.eagle3 import Eagle3Config, Eagle3Drafter
from dovetail.models.formats.eagle3 import Eagle3, eagle_layers, names_of
from dovetail.models.formats.format import Config, Format, Needs, Shapes, TargetParts
from dovetail.models.formats.layout import Settled, load, needs_of
from dovetail.models.formats.reading import (
    block_sizes,
    context_of,
    flag,
    layer_config,
    layer_list,
    outputs_of_inputs,
    target_sizes,
    whole,
)
from dovetail.models.rope import Rope

_BLOCKS = ("llama", "qwen3")
_IDS = "eagle_aux_hidden_state_layer_ids"


def settle(stored: Stored, target: Config) -> Eagle3:
    """Read a config of speculators. Raises ValueError for a setting out of range or not supported."""
    config, names = stored.config, names_of(stored)
    shapes = {name: stored.shapes[given] for name, given in names.items()}
    layer = layer_config(config, _BLOCKS, "qwen3")
    _, depth, vocab = target_sizes(target)
    sizes = block_sizes(_with_defaults(layer), shapes)
    choices = []
    if ids := config.get(_IDS):
        given = layer_list(_IDS, ids)
        taps = outputs_of_inputs(_IDS, given)
        choices.append(f"the config's layers {list(given)} count inputs, as in speculators")
    else:
        taps = eagle_layers(depth)
        choices.append(f"the config lists no layers: EAGLE's, the outputs of {', '.join(map(str, taps))}")
    if "norm_before_residual" not in config:
        choices.append("norm_before_residual is missing: the residual is not normed, as in speculators (vLLM norms it)")
    each, together = flag(config, "fc_norm"), flag(config, "norm_before_fc")
    if each and together:
        raise ValueError("fc_norm and norm_before_fc exclude each other: correct config.json")
    positions, vocab = context_of(layer), whole(layer, "vocab_size", vocab)
    target_size = config.get("target_hidden_size") or sizes.hidden_size
    settings = Eagle3Config(
        block=sizes,
        vocab_size=vocab,
        draft_vocab_size=whole(config, "draft_vocab_size", vocab),
        target_size=whole({"hidden_size": target_size}, "hidden_size"),
        taps=taps,
        rope=Rope.from_config(layer, sizes.head_dim, positions),
        max_position_embeddings=positions,
        blocks=whole(layer, "num_hidden_layers", 1),
        tap_norm="each" if each else "all" if together else "none",
        norm_before_residual=flag(config, "norm_before_residual"),
        norm_output=flag(config, "norm_output"),
    )
    return Settled(settings, Eagle3Drafter, names, tuple(choices))


def _with_defaults(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer config with the sizes that transformers leaves out of files when they are its defaults."""
    qwen3 = layer.get("model_type", "qwen3") == "qwen3"
    return {"rms_norm_eps": 1e-6, **({"head_dim": 128} if qwen3 else {}), **layer}


def verifier_name(config: Config) -> str | None:
    """The model that speculators trained a drafter for."""
    nested = config.get("speculators_config")
    verifier = nested.get("verifier") if isinstance(nested, dict) else None
    name = verifier.get("name_or_path") if isinstance(verifier, dict) else None
    return name if isinstance(name, str) else None


def _matches(config: Config, shapes: Shapes) -> bool:
    return config.get("speculators_model_type") == "eagle3"


def _describe(config: Config) -> str:
    return "an EAGLE-3 drafter of speculators"


def _read(stored: Stored, target: TargetParts) -> Eagle3Drafter:
    return load(stored, settle(stored, target.config), target)


def _needs(stored: Stored, target: Config) -> Needs:
    return needs_of(_describe(stored.config), stored, settle(stored, target), verifier_name(stored.config))


EAGLE3 = Format("speculators-eagle3", _matches, _describe, _read, _needs)
