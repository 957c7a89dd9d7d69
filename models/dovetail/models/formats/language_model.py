"""Language models of Llama's, Mistral's, Qwen2's and Qwen3's architecture, as drafters.

Such a drafter reads tokens and no feature of the target. Its tokens must be the target's, by id. Its
vocabulary may have another padding: the rows of ids that only one of the two has are left out.

Axes: V target vocabulary, U own vocabulary, K = min(U, V) draft vocabulary, d model width.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from dovetail.models.checkpoint import (
    CheckpointError,
    Stored,
    as_float,
    check_shapes,
    load_exactly,
    without_prefixes,
)
from dovetail.models.eagle3 import BlockSizes
from dovetail.models.formats.format import Config, Format, Needs, TargetParts
from dovetail.models.formats.reading import (
    architectures,
    block_sizes,
    flag,
    reads_features,
    target_sizes,
    whole,
)
from dovetail.models.language import LanguageConfig, LanguageDrafter
from dovetail.models.rope import Rope
from dovetail.runtime.system.machine import ram_mb

OTHERWISE = "give the model to dovetail-run --draft-model"
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_FULL, _SLIDING = "full_attention", "sliding_attention"
_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"
_MODELS = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
_LAST_NORMS = ("norm.weight", "norm_f.weight", "ln_f.weight", "final_layernorm.weight", "final_layer_norm.weight")
_DEFAULTS = {  # transformers'
    "MistralForCausalLM": {"sliding_window": 4096},
    "Qwen2ForCausalLM": {"sliding_window": 4096},
    "Qwen3ForCausalLM": {"sliding_window": 4096, "head_dim": 128},
}
_EXPORT_BYTES = 16  # of memory for each parameter: the 0.5B of Qwen2.5 took 8.2 GB to convert


def is_language_model(config: Config, names: Collection[str]) -> bool:
    """A model's architecture, blocks and last norm, and no layer that reads a feature."""
    model = any(name.endswith(_MODELS) for name in architectures(config))
    blocks = any(re.search(r"(^|\.)(layers|h|blocks)\.0\.", name) for name in names)
    last = any(name.endswith(_LAST_NORMS) and not re.search(r"\.\d+\.", name) for name in names)
    return model and blocks and last and not reads_features(names)


def is_read(config: Config, names: Collection[str]) -> bool:
    """A language model of an architecture that Dovetail reads as a drafter."""
    return is_language_model(config, names) and _architecture(config) in ARCHITECTURES


def _architecture(config: Config) -> str:
    return next(iter(architectures(config)), "")


def _names(stored: Stored) -> dict[str, str]:
    """The checkpoint's name of each tensor, by its name in the module. Raises CheckpointError."""
    names = without_prefixes(stored.shapes, ("model.",), stored.folder)
    return {name: given for name, given in names.items() if not name.endswith("inv_freq")}  # tables of old checkpoints


def _settings(stored: Stored, vocab: int) -> tuple[LanguageConfig, int, bool]:
    """The settings, the rows U of the embedding, and whether they are the head's too. Raises ValueError.

    vocab: V.
    """
    kind = _architecture(stored.config)
    config = {**_DEFAULTS.get(kind, {}), **stored.config}
    positions = whole(config, "max_position_embeddings", 2048)
    _check_attention(config, kind, positions)
    rows, sizes = whole(config, "vocab_size"), _sizes(config, kind)
    return (
        LanguageConfig(
            block=sizes,
            vocab_size=vocab,
            draft_vocab_size=min(rows, vocab),
            rope=Rope.from_config(config, sizes.head_dim, positions),
            max_position_embeddings=positions,
            blocks=whole(config, "num_hidden_layers"),
        ),
        rows,
        flag(config, "tie_word_embeddings"),
    )


def _check_attention(config: Config, kind: str, positions: int) -> None:
    """Raise ValueError for layers that do not attend to the whole context."""
    kinds = config.get("layer_types") or [_FULL]
    if not isinstance(kinds, list) or not {*map(str, kinds)} <= {_FULL, _SLIDING}:
        raise ValueError(f"layer_types {kinds!r:.60} are not supported: {OTHERWISE}")
    slides = kind == "MistralForCausalLM" or _SLIDING in kinds or config.get("use_sliding_window") is True
    if slides and config.get("sliding_window") is not None and whole(config, "sliding_window") < positions:
        raise ValueError(f"sliding_window {config['sliding_window']} is not supported: {OTHERWISE}")


def _sizes(config: Config, kind: str) -> BlockSizes:
    """Sizes of the blocks. The architecture and its config decide about biases and norms, as in transformers."""
    bias = flag(config, "attention_bias") and kind in ("LlamaForCausalLM", "Qwen3ForCausalLM")
    return replace(
        block_sizes(config, {}),
        qkv_bias=bias or kind == "Qwen2ForCausalLM",
        o_bias=bias,
        mlp_bias=flag(config, "mlp_bias") and kind == "LlamaForCausalLM",
        qk_norm=kind == "Qwen3ForCausalLM",
    )


def _settle(stored: Stored, target: Config) -> tuple[LanguageConfig, Mapping[str, str], bool]:
    """The settings, the name of each tensor, and whether the embedding is the head too.

    Raises ValueError, and CheckpointError unless the tensors are those of the settings.
    """
    vocab = target_sizes(target)[2]
    try:
        (config, rows, tied), names = _settings(stored, vocab), _names(stored)
    except ValueError as error:  # the remedies of other formats do not help here
        raise ValueError(f"{str(error).rpartition(': ')[0] or error}: {OTHERWISE}") from error
    size, draft = config.block.hidden_size, config.draft_vocab_size
    with torch.device("meta"):  # shapes alone: a config may ask for more than there is memory
        module = LanguageDrafter(config, torch.zeros(vocab, size), torch.zeros(draft, size), torch.zeros(draft))
    expected = {name: tuple(value.shape) for name, value in module.named_parameters()}
    expected[_EMBEDDING] = (rows, size)
    if not tied or _HEAD in names:
        expected[_HEAD] = (rows, size)
    check_shapes(expected, {name: stored.shapes[given] for name, given in names.items()}, stored.folder)
    needed, (have, _) = _EXPORT_BYTES * sum(map(prod, expected.values())), ram_mb()
    if needed > have << 20:
        raise ValueError(
            f"{needed / _EXPORT_BYTES / 1e9:.1f} billion parameters take about {needed / 1e9:.0f} GB of memory to "
            f"convert, and this machine has {have / 1e3:.0f} GB: {OTHERWISE}"
        )
    return config, names, tied


def _read(stored: Stored, target: TargetParts) -> LanguageDrafter:
    config, names, tied = _settle(stored, target.config)
    raw = stored.tensors()
    tensors = {name: raw[given] for name, given in names.items()}
    own = as_float("embed_tokens", tensors.pop(_EMBEDDING), stored.folder)
    head = as_float("lm_head", tensors.pop(_HEAD), stored.folder) if _HEAD in tensors else own
    if tied and not torch.equal(head, own):
        raise CheckpointError(
            f"lm_head in {stored.folder} differs from embed_tokens, and config.json has tie_word_embeddings: correct "
            "config.json"
        )
    embed, draft = _resized(own, config.vocab_size), config.draft_vocab_size
    head = embed[:draft] if tied else head[:draft].contiguous()  # a tied head takes no memory
    module = LanguageDrafter(config, embed, head, torch.arange(draft))
    load_exactly(module, tensors, stored.folder)
    return module


def _resized(rows: Tensor, count: int) -> Tensor:
    """The first `count` of rows [U, d]; zeros follow if there are fewer."""
    return F.pad(rows[:count], (0, 0, 0, max(count - len(rows), 0)))


def _describe(config: Config) -> str:
    return f"a language model ({_architecture(config)})"


def _needs(stored: Stored, target: Config) -> Needs:
    config, _, _ = _settle(stored, target)
    rows, choices = whole(stored.config, "vocab_size"), list[str]()
    if rows != config.vocab_size:
        choices.append(
            f"vocab_size {rows} is not the target's {config.vocab_size}: it drafts the first {config.draft_vocab_size} "
            "tokens"
        )
    return Needs(
        kind=_describe(stored.config),
        target_size=0,
        vocab_size=config.vocab_size,
        draft_vocab_size=config.draft_vocab_size,
        max_context=config.max_position_embeddings,
        rope=config.rope.text,
        choices=tuple(choices),
    )


FORMAT = Format("language-model", is_read, _describe, _read, _needs, reads_tokens=True)
