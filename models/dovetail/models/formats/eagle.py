"""EAGLE and EAGLE-2 checkpoints: SafeAILab's layout, which HASS shares, and speculators' "eagle".

speculators renames the tensors, and with `layernorms` has three norms more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from dovetail.models.checkpoint import CheckpointError, Stored
from dovetail.models.eagle import EagleConfig, EagleDrafter
from dovetail.models.formats.format import Config, Format, Needs, Shapes, TargetParts
from dovetail.models.formats.layout import Settled, load, needs_of
from dovetail.models.formats.reading import (
    block_sizes,
    context_of,
    flag,
    layer_config,
    target_sizes,
    whole,
)
from dovetail.models.formats.speculators import verifier_name
from dovetail.models.rope import Rope

_RENAMED = {
    "fc.": "fusion.fc.",
    "fusion_fc.": "fusion.fc.",
    "transformer.": "layers.0.",
    "embedding_layernorm.": "fusion.embedding_layernorm.",
    "pre_lm_head_layernorm.": "norm.",
    # the same norms in checkpoints that speculators has not converted
    "embed_layernorm.": "fusion.embedding_layernorm.",
    "hidden_layernorm.": "layers.0.input_layernorm.",
    "lm_head_layernorm.": "norm.",
}
_CHOICE = "layernorms: the feature before the last norm goes on, as in EAGLE-3"


Eagle = Settled[EagleConfig, EagleDrafter]


def names_of(stored: Stored, renamed: Mapping[str, str]) -> dict[str, str]:
    """The checkpoint's name of each tensor, by its name in the module. Raises CheckpointError.

    renamed: beginnings of names, and what the module has instead.
    """
    names: dict[str, str] = {}
    for given in stored.shapes:
        short = given.removeprefix("model.")
        start = next((start for start in renamed if short.startswith(start)), "")
        name = renamed.get(start, "") + short.removeprefix(start)
        if name in names:
            raise CheckpointError(f"{stored.folder} has one tensor twice, as {names[name]!r} and {given!r}: remove one")
        if not name.endswith("inv_freq"):  # RoPE tables of old checkpoints
            names[name] = given
    return names


def settings(
    config: Config, shapes: Shapes, target: Config, *, blocks: int, fusion: str = "fc", bias: bool = False,
    norms: bool = False,
) -> EagleConfig:  # fmt: skip
    """Settings from the config of Llama blocks. shapes: by the module's names. Raises ValueError."""
    sizes, positions = block_sizes(config, shapes), context_of(config)
    vocab = whole(config, "vocab_size", target_sizes(target)[2])
    rope = Rope.from_config(config, sizes.head_dim, positions)
    return EagleConfig(sizes, vocab, rope, positions, blocks, fusion, bias, norms)


def settled(config: EagleConfig, names: Mapping[str, str], transposed: Collection[str] = ()) -> Eagle:
    """The settings and tensors of a drafter."""

    def build(config: EagleConfig, embed_tokens: Tensor, head: Tensor, _: Tensor) -> EagleDrafter:
        return EagleDrafter(config, embed_tokens, head)

    return Settled(config, build, names, (_CHOICE,) if config.norms else (), transposed)


def settle(stored: Stored, target: Config) -> Eagle:
    """Read a config of EAGLE's or speculators' kind. Raises CheckpointError, ValueError (out of range)."""
    config, names = stored.config, names_of(stored, _RENAMED)
    shapes = {name: stored.shapes[given] for name, given in names.items()}
    bias = flag(config, "fusion_bias" if _converted(config) else "bias", "fusion.fc.bias" in names)
    norms = flag(config, "layernorms", "norm.weight" in names)
    if not _converted(config):
        blocks = whole(config, "num_hidden_layers", 1)
        return settled(settings(config, shapes, target, blocks=blocks, bias=bias, norms=norms), names)
    layer = layer_config(config, ("llama",), "llama")
    return settled(settings(layer, shapes, target, blocks=1, bias=bias, norms=norms), names)


def _converted(config: Config) -> bool:
    return config.get("speculators_model_type") == "eagle"


def _matches(config: Config, shapes: Shapes) -> bool:
    """A linear layer, and a first block that is as wide as its result; EAGLE-3's is twice as wide."""
    if "speculators_model_type" in config:
        return _converted(config)
    found = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    fc, queries = found.get("fc.weight", ()), found.get("layers.0.self_attn.q_proj.weight", ())
    return len(fc) == len(queries) == 2 and fc[0] == queries[1] and "hidden_norm.weight" not in found


def _describe(config: Config) -> str:
    return "an EAGLE drafter of speculators" if _converted(config) else "an EAGLE drafter"


def _read(stored: Stored, target: TargetParts) -> EagleDrafter:
    return load(stored, settle(stored, target.config), target)


def _needs(stored: Stored, target: Config) -> Needs:
    return needs_of(_describe(stored.config), stored, settle(stored, target), verifier_name(stored.config))


FORMAT = Format("eagle", _matches, _describe, _read, _needs)
