"""DFlash checkpoints: the layout of z-lab, SpecForge, JetSpec and NeMo, and that of the speculators library.

Both have the same layers. z-lab's `target_layer_ids` count outputs of the target's layers,
speculators' `aux_hidden_state_layer_ids` count inputs. z-lab's files borrow embedding and head from
the target. Those of speculators may have their own, and a draft vocabulary.
"""

from __future__ import annotations

from typing import Any

from dovetail.models.checkpoint import Stored
from dovetail.models.dflash import DFlash, DFlashConfig, Sight
from dovetail.models.formats.eagle3 import names_of
from dovetail.models.formats.format import Config, Format, Needs, Shapes
from dovetail.models.formats.layout import Settled, load, needs_of
from dovetail.models.formats.reading import (
    ANOTHER,
    block_sizes,
    check_kind_of_block,
    check_vocabulary,
    flag,
    layer_config,
    layer_list,
    outputs_of_inputs,
    target_sizes,
    whole,
)
from dovetail.models.formats.speculators import verifier_name
from dovetail.models.rope import Rope
from dovetail.runtime.system.bounds import TOKEN_MOST, check_whole

_AGAIN = "correct config.json"
_BLOCKS = ("qwen3", "llama")
_FULL, _SLIDING = "full_attention", "sliding_attention"
# transformers leaves a size out of a file if it is the default of the model type.
_QWEN3 = {"head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 32}
BLOCK_MOST = 32  # tokens
_CAUSAL = ("causal", "is_causal", "causal_head")  # one setting; the last is JetSpec's name
# Keys of z-lab's dflash_config that Dovetail reads or that say nothing about the drafter.
_KNOWN = {
    "target_layer_ids", "mask_token_id", "mask_token", "block_size", "sample_from_anchor", "num_target_layers",
    "target_hidden_size", *_CAUSAL,
}  # fmt: skip
# Values that change nothing. Any other key of dflash_config must be absent or empty.
_NEUTRAL = {"input_embedding_scale": 1, "output_multiplier": 1, "attention_mode": "gqa"}
_SCALES = ("input_embedding_scale", "output_multiplier", "final_logit_softcapping")


_Settled = Settled[DFlashConfig, DFlash]


def _settle_z_lab(stored: Stored, target: Config) -> _Settled:
    """Read a config of z-lab's or SpecForge's kind. Raises ValueError."""
    config: Config = {**_QWEN3, **stored.config}
    nested = config.get("dflash_config")
    if not isinstance(nested, dict):
        raise ValueError(f"dflash_config {nested!r:.60} is no object: {_AGAIN}")
    for name in sorted(nested.keys() - _KNOWN):
        if nested[name] and nested[name] != _NEUTRAL.get(name):
            raise ValueError(
                f"dflash_config has {name} {nested[name]!r:.60}, which is not supported: use another drafter"
            )
    both = {**config, **nested}  # a key of dflash_config counts before the same key beside it
    for name in _SCALES:
        if both.get(name) and both[name] != _NEUTRAL.get(name):
            raise ValueError(f"{name} {both[name]!r:.60} is not supported: use another drafter")
    marks = [(each, name) for each in (config, nested) for name in _CAUSAL if each.get(name) is not None]
    said = {flag(each, name) for each, name in marks}
    if len(said) > 1:
        raise ValueError(f"{' and '.join(dict.fromkeys(name for _, name in marks))} contradict each other: {_AGAIN}")
    causal = said.pop() if said else None
    taps = layer_list("target_layer_ids", both.get("target_layer_ids"))
    choices = [f"target_layer_ids {list(taps)} count outputs of layers, as in z-lab's code"]
    sights = tuple(
        Sight(causal is True or (causal is None and window is not None), _relative(window, block))
        for block, window in _windows(config, both)
    )
    depth = both.get("num_target_layers")
    if depth is not None and depth != target_sizes(target)[1]:
        raise ValueError(f"it reads a target of {depth!r:.40} layers, not {target_sizes(target)[1]}: {ANOTHER}")
    settings = _config(stored, config, both, taps, sights, target)
    return Settled(settings, DFlash, names_of(stored), tuple(choices))


def _settle_speculators(stored: Stored, target: Config) -> _Settled:
    """Read a config of speculators. Raises ValueError."""
    config, layer = stored.config, layer_config(stored.config, _BLOCKS, "qwen3")
    layer = {"rms_norm_eps": 1e-6, **(_QWEN3 if layer.get("model_type", "qwen3") == "qwen3" else {}), **layer}
    ids = layer_list("aux_hidden_state_layer_ids", config.get("aux_hidden_state_layer_ids"))
    taps = outputs_of_inputs("aux_hidden_state_layer_ids", ids)
    two_ways = flag(config, "sliding_window_non_causal")
    sights = tuple(
        Sight(window is not None and not two_ways, None if window is None else (window,) * block)
        for block, window in _windows(layer, config)
    )
    choices = (f"the config's layers {list(ids)} count inputs, as in speculators",)
    settings = _config(stored, layer, config, taps, sights, target)
    return Settled(settings, DFlash, names_of(stored), choices)


def _windows(layer: Config, settings: Config) -> list[tuple[int, int | None]]:
    """The block size and the sliding window of each layer, None for full attention. Raises ValueError."""
    block, count = _block_size(settings), whole(layer, "num_hidden_layers")
    kinds = layer.get("layer_types")
    if kinds is None:
        if layer.get("use_sliding_window") is True:
            raise ValueError(f"use_sliding_window is true and layer_types is missing: {_AGAIN}")
        kinds = [_FULL] * count
    if not isinstance(kinds, list) or len(kinds) != count or not set(map(str, kinds)) <= {_FULL, _SLIDING}:
        raise ValueError(
            f"layer_types {kinds!r:.80} does not list {count} layers of full or sliding attention: {_AGAIN}"
        )
    if _SLIDING not in kinds:
        return [(block, None)] * count
    if layer.get("model_type", "qwen3") == "qwen3" and layer.get("use_sliding_window") is not True:
        raise ValueError(f"layer_types has {_SLIDING} and use_sliding_window is not true: {_AGAIN}")
    window = whole(layer, "sliding_window")
    if window < block:
        raise ValueError(f"sliding_window {window} is shorter than the block of {block}: use another drafter")
    return [(block, window if kind == _SLIDING else None) for kind in kinds]


def _relative(window: int | None, block: int) -> tuple[int, ...] | None:
    """Reach of each row: in z-lab's code a row sees the window - 1 positions before its own."""
    return None if window is None else tuple(window - 1 - row for row in range(block))


def _block_size(settings: Config) -> int:
    size = whole(settings, "block_size")
    if not 2 <= size <= BLOCK_MOST:
        raise ValueError(f"block_size {size} is out of range: 2 to {BLOCK_MOST} are supported")
    return size


def _config(
    stored: Stored, layer: Config, settings: Config, taps: tuple[int, ...], sights: tuple[Sight, ...], target: Config
) -> DFlashConfig:
    """Settings from the config of the layers, `layer`, and of the block. Raises ValueError."""
    check_kind_of_block(layer, _BLOCKS, "qwen3")
    names = names_of(stored)
    sizes = block_sizes(layer, {name: stored.shapes[given] for name, given in names.items()})
    width, depth, vocab = target_sizes(target)
    for what, value in (("hidden_size", sizes.hidden_size), ("target_hidden_size", settings.get("target_hidden_size"))):
        if value not in (None, width):
            raise ValueError(f"its {what} is {value!r:.40}, the target is {width} wide: {ANOTHER}")
    check_vocabulary(whole(layer, "vocab_size", vocab), target)
    if max(taps) >= depth:
        raise ValueError(f"it reads the output of layer {max(taps)} of a target that has {depth}: {ANOTHER}")
    if max(taps) == depth - 1:
        raise ValueError(
            f"it reads the output of the last layer, {depth - 1}, which training code norms and serving code does not: "
            "use a drafter that reads earlier layers"
        )
    mask: Any = settings.get("mask_token_id")
    check_whole("mask_token_id", mask, ValueError, _AGAIN, least=0, most=TOKEN_MOST)
    if mask >= vocab:
        raise ValueError(
            f"mask_token_id {mask} is outside the target's vocabulary of {vocab}: use a drafter whose mask token the "
            "target has"
        )
    positions = whole(layer, "max_position_embeddings", 32768)
    return DFlashConfig(
        block=sizes,
        vocab_size=vocab,
        draft_vocab_size=whole(settings, "draft_vocab_size", vocab),
        block_size=_block_size(settings),
        mask_token=mask,
        taps=taps,
        sights=sights,
        rope=Rope.from_config(layer, sizes.head_dim, positions),
        max_position_embeddings=positions,
        from_anchor=flag(settings, "sample_from_anchor"),
    )


def _needs(stored: Stored, settled: _Settled, kind: str) -> Needs:
    return needs_of(kind, stored, settled, verifier_name(stored.config))


def _matches_z_lab(config: Config, shapes: Shapes) -> bool:
    marks = config.get("architectures")
    known = isinstance(marks, list) and ("DFlashDraftModel" in marks or "Qwen3DFlashDraftModel" in marks)
    return known and "speculators_model_type" not in config


def _describe_z_lab(config: Config) -> str:
    return "a DFlash drafter"


def _describe_speculators(config: Config) -> str:
    return "a DFlash drafter of speculators"


Z_LAB = Format(
    "dflash",
    _matches_z_lab,
    _describe_z_lab,
    lambda stored, target: load(stored, _settle_z_lab(stored, target.config), target),
    lambda stored, target: _needs(stored, _settle_z_lab(stored, target), _describe_z_lab(stored.config)),
)
SPECULATORS = Format(
    "speculators-dflash",
    lambda config, shapes: config.get("speculators_model_type") == "dflash",
    _describe_speculators,
    lambda stored, target: load(stored, _settle_speculators(stored, target.config), target),
    lambda stored, target: _needs(stored, _settle_speculators(stored, target), _describe_speculators(stored.config)),
)
