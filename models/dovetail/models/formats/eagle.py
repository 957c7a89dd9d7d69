"""EAGLE and EAGLE-2 checkpoints: SafeAILab's layout, which HASS shares, and speculators' "eagle".

speculators renames the tensors, and with `layernorms` has three norms more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from dovetail.models.checkpoint import CheckpointError, Stored, as_float, check_shapes, load_exactly
from dovetail.models.eagle import EagleConfig, EagleDrafter
from dovetail.models.formats.format import Config, Format, Needs, Shapes, TargetParts
from dovetail.models.formats.reading import (
    ANOTHER,
    block_sizes,
    check_vocabulary,
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
_ROWS = ("embed_tokens.weight", "lm_head.weight")  # the target's own, which some checkpoints repeat
_CHOICE = "layernorms: the feature before the last norm goes on, as in EAGLE-3"


@dataclass(frozen=True)
class Layout:
    """A checkpoint's settings and tensors.

    names: the checkpoint's name of each tensor, by its name in the module. transposed: names, in
    the module, of matrices that the checkpoint stores as (in, out).
    """

    config: EagleConfig
    names: Mapping[str, str]
    transposed: Collection[str] = ()


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


def settle(stored: Stored, target: Config) -> Layout:
    """Read a config of EAGLE's or speculators' kind. Raises CheckpointError, ValueError (out of range)."""
    config, names = stored.config, names_of(stored, _RENAMED)
    shapes = {name: stored.shapes[given] for name, given in names.items()}
    bias = flag(config, "fusion_bias" if _converted(config) else "bias", "fusion.fc.bias" in names)
    norms = flag(config, "layernorms", "norm.weight" in names)
    if not _converted(config):
        blocks = whole(config, "num_hidden_layers", 1)
        return Layout(settings(config, shapes, target, blocks=blocks, bias=bias, norms=norms), names)
    layer = layer_config(config, ("llama",), "llama")
    return Layout(settings(layer, shapes, target, blocks=1, bias=bias, norms=norms), names)


def load(stored: Stored, layout: Layout, target: TargetParts) -> EagleDrafter:
    """The module with the checkpoint's weights. Raises CheckpointError, ValueError (another target)."""
    width = target_sizes(target.config)[0]
    check_vocabulary(layout.config.vocab_size, target.config)
    if (size := layout.config.block.hidden_size) != width:
        raise ValueError(f"it reads a feature of width {size}, the target's is {width} wide: {ANOTHER}")
    check_layout(stored, layout)
    raw = stored.tensors()
    tensors = {name: raw[given] for name, given in layout.names.items()}
    embed, head = (tensors.pop(name, None) for name in _ROWS)
    module = EagleDrafter(
        layout.config,
        target.embed_tokens if embed is None else as_float("embed_tokens", embed, stored.folder),
        target.lm_head if head is None else as_float("lm_head", head, stored.folder),
    )
    for name in layout.transposed:
        tensors[name] = tensors[name].T
    load_exactly(module, tensors, stored.folder)
    return module


def check_layout(stored: Stored, layout: Layout) -> None:
    """Raise CheckpointError unless the tensors' names and shapes are those of the settings' drafter."""
    shapes = {name: stored.shapes[given] for name, given in layout.names.items()}
    rows = layout.config.vocab_size, layout.config.block.hidden_size
    with torch.device("meta"):  # shapes alone: a config may ask for more than there is memory
        module = EagleDrafter(layout.config, torch.zeros(rows), torch.zeros(rows))
    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    expected |= {name: expected[name][::-1] for name in layout.transposed}
    check_shapes(expected | {name: rows for name in _ROWS if name in shapes}, shapes, stored.folder)


def needs_of(kind: str, stored: Stored, layout: Layout) -> Needs:
    """What the settings ask of a target. Raises CheckpointError."""
    check_layout(stored, layout)
    config = layout.config
    return Needs(
        kind=kind,
        target_size=config.block.hidden_size,
        vocab_size=config.vocab_size,
        draft_vocab_size=config.vocab_size,
        max_context=config.max_position_embeddings,
        rope=config.rope.text,
        target=verifier_name(stored.config),
        choices=(_CHOICE,) if config.norms else (),
    )


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
    return needs_of(_describe(stored.config), stored, settle(stored, target))


FORMAT = Format("eagle", _matches, _describe, _read, _needs)
