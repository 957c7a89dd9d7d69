"""EAGLE-3 checkpoints: SafeAILab's layout, which SpecForge and AngelSlim share, ModelOpt's, DeepSpec's.

All have the same parts under slightly different names. Their configs say different things about the
target's layers: without a list they are EAGLE's three, in SafeAILab's code the inputs of layers 2,
L / 2 and L - 3 (L layers). The ids in `eagle_config` (ModelOpt, SGLang) and in DeepSpec's
`target_layer_ids` count outputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from dovetail.models.checkpoint import CONFIG, Stored, without_prefixes
from dovetail.models.config import DEFAULT_FUSION, DrafterConfig
from dovetail.models.eagle3 import Eagle3Config, Eagle3Drafter
from dovetail.models.formats.format import Config, Format, Needs, Shapes, TargetParts
from dovetail.models.formats.layout import Settled, flat_parameters, load, needs_of
from dovetail.models.formats.reading import (
    AGAIN,
    FIRST,
    block_sizes,
    context_of,
    flag,
    layer_list,
    outputs_of_inputs,
    target_sizes,
    whole,
)
from dovetail.models.rope import Rope
from dovetail.runtime.pair.files import write_atomically

WEIGHTS = "model.safetensors"
LEAST_DEPTH = 7  # of a target with three different layers 2, L / 2 and L - 3
_PREFIXES = ("model.", "draft_model.")
# Tensors that say nothing about the drafter: RoPE tables of old checkpoints, the target's own parts.
_IGNORED = ("inv_freq", "verifier_norm.weight", "verifier_lm_head.weight")


Eagle3 = Settled[Eagle3Config, Eagle3Drafter]


def names_of(stored: Stored) -> dict[str, str]:
    """The checkpoint's name of each tensor, by its name in the module. Raises CheckpointError."""
    names = without_prefixes(stored.shapes, _PREFIXES, stored.folder)
    renamed = {name.replace("midlayer.", FIRST, 1) if name.startswith("midlayer.") else name: name for name in names}
    return {name: names[short] for name, short in renamed.items() if not name.endswith(_IGNORED)}


def eagle_layers(depth: int) -> tuple[int, ...]:
    """The blocks whose outputs EAGLE-3 reads if its config lists none, of `depth` layers. Raises ValueError."""
    if depth < 4:
        raise ValueError(
            f"its config lists no layers, and EAGLE-3's own need a target of 4 layers, not {depth}: {AGAIN}"
        )
    return outputs_of_inputs("EAGLE-3's default", (2, depth // 2, depth - 3))


def settle(stored: Stored, target: Config) -> Eagle3:
    """Read an EAGLE-3 config of SafeAILab's, SpecForge's, AngelSlim's, ModelOpt's or DeepSpec's kind.

    Raises ValueError for a setting out of range, or one that Dovetail's EAGLE-3 does not have.
    """
    config, names = stored.config, names_of(stored)
    shapes = {name: stored.shapes[given] for name, given in names.items()}
    width, depth, vocab = target_sizes(target)
    nested = config.get("eagle_config") or {}
    if not isinstance(nested, dict):
        raise ValueError(f"eagle_config {nested!r:.60} is no object: {AGAIN}")
    choices = []
    if "target_layer_ids" in config:
        taps = layer_list("target_layer_ids", config["target_layer_ids"])
        choices.append(f"target_layer_ids {list(taps)} count outputs of layers, as in DeepSpec")
    elif ids := nested.get("eagle_aux_hidden_state_layer_ids"):
        taps = layer_list("eagle_aux_hidden_state_layer_ids", ids)
        choices.append(f"eagle_config's layers {list(taps)} count outputs, as in ModelOpt and SGLang")
    elif ids := config.get("eagle_aux_hidden_state_layer_ids"):
        given = layer_list("eagle_aux_hidden_state_layer_ids", ids)
        taps = outputs_of_inputs("eagle_aux_hidden_state_layer_ids", given)
        choices.append(f"the config's layers {list(given)} count inputs, as in vLLM")
    else:
        taps = eagle_layers(depth)
        choices.append(f"the config lists no layers: EAGLE's, the outputs of {', '.join(map(str, taps))}")
    for name, expected in (
        ("use_aux_hidden_state", True), ("use_input_layernorm_in_first_layer", True), ("use_last_layernorm", True),
        ("use_mtp_layernorm", False),
    ):  # fmt: skip
        if nested.get(name) not in (None, expected):
            raise ValueError(f"eagle_config has {name} {nested[name]!r:.20}: Dovetail's EAGLE-3 has {expected} alone")
    if nested.get("parallel_draft_step") not in (None, 1):
        raise ValueError(f"parallel_draft_step {nested['parallel_draft_step']!r:.20} is not supported: only 1 is")
    each = flag(config, "fc_norm")
    output = flag(config, "norm_output")
    if "norm_output" not in config:
        choices.append("norm_output is missing: the feature before the norm goes on, as in EAGLE-3")
    layers = 1 if any(name.startswith("midlayer.") for name in stored.shapes) else whole(config, "num_hidden_layers", 1)
    if "target_layer_ids" in config and layers > 1:
        raise ValueError(f"{layers} layers of DeepSpec's kind are not supported: only one layer is")
    return Settled(
        _config(config, shapes, width, vocab, taps, layers, tap_norm="each" if each else "none", norm_output=output),
        Eagle3Drafter,
        names,
        tuple(choices),
    )


def _config(
    config: Config, shapes: Shapes, width: int, vocab: int, taps: tuple[int, ...], layers: int, **settings: object
) -> Eagle3Config:
    """Settings from a Llama config and the tensors' shapes. width, vocab: the target's, as defaults."""
    sizes, positions, vocab = block_sizes(config, shapes), context_of(config), whole(config, "vocab_size", vocab)
    return Eagle3Config(
        block=sizes,
        vocab_size=vocab,
        draft_vocab_size=whole(config, "draft_vocab_size", vocab),
        target_size=whole(config, "target_hidden_size", width if "target_hidden_size" in config else sizes.hidden_size),
        taps=taps,
        rope=Rope.from_config(config, sizes.head_dim, positions),
        max_position_embeddings=positions,
        blocks=layers,
        **settings,  # type: ignore[arg-type]  # settings of Eagle3Config
    )


def new_config(target: Config, draft_vocab_size: int) -> dict[str, Any]:
    """config.json of a new drafter in SafeAILab's layout: the target's sizes, EAGLE's layers, plain RoPE.

    openvino-genai reads no ids and takes EAGLE's layers, vLLM reads the ids at the top as inputs,
    SGLang those in `eagle_config` as outputs. target: its config.json. Raises ValueError for a
    target with too few layers, and what DrafterConfig raises.
    """
    sizes = DrafterConfig.for_target(dict(target), draft_vocab_size, DEFAULT_FUSION, 1)
    if (depth := int(target["num_hidden_layers"])) < LEAST_DEPTH:
        raise ValueError(f"it has {depth} layers, EAGLE-3 needs {LEAST_DEPTH}: use Dovetail's format")
    taps = eagle_layers(depth)
    special = {name: target[name] for name in ("bos_token_id", "eos_token_id") if name in target}
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "target_hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": sizes.num_attention_heads,
        "num_key_value_heads": sizes.num_key_value_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": sizes.max_position_embeddings,
        "rms_norm_eps": sizes.rms_norm_eps,
        "rope_theta": sizes.rope_theta,
        "vocab_size": sizes.vocab_size,
        "draft_vocab_size": sizes.draft_vocab_size,
        "tie_word_embeddings": False,
        **special,
        "eagle_aux_hidden_state_layer_ids": [tap + 1 for tap in taps],
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(taps), "use_aux_hidden_state": True},
    }


def settings_of(config: Config, target: Config) -> Eagle3Config:
    """The settings that a new drafter's config means."""
    return settle(Stored(Path(), config, {}, ()), target).config


def save_checkpoint(
    drafter: Eagle3Drafter, folder: Path, config: Config, names: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:  # fmt: skip
    """Write `config` and the tensors (`dtype`), the weights file last and atomically.

    names: the checkpoint's name of each tensor to write, by its name in the module, as names_of
    gives; without it SafeAILab's names of all. optimum-intel needs the embedding in the file.
    """
    ids = drafter.d2t.cpu()
    tensors = flat_parameters(drafter) | {"embed_tokens.weight": drafter.embed_tokens, "lm_head.weight": drafter.head}
    stored = {name: value.detach().to("cpu", dtype).contiguous() for name, value in tensors.items()}
    stored["d2t"] = ids - torch.arange(len(ids))
    stored["t2d"] = torch.zeros(drafter.shape.vocab_size, dtype=torch.bool).index_fill(0, ids, True)
    if names is None:
        names = {name: name.replace(FIRST, "midlayer.") for name in stored}
    names = {"lm_head.weight": "lm_head.weight", **names}  # a checkpoint may leave the head to the target
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    kind = str(dtype).removeprefix("torch.")
    write_atomically(folder / CONFIG, (json.dumps({**settings, "torch_dtype": kind}, indent=2) + "\n").encode())
    content = save({given: stored[name] for name, given in names.items()}, {"format": "pt"})
    write_atomically(folder / WEIGHTS, content)


def _matches(config: Config, shapes: Shapes) -> bool:
    """A first layer over [embedding; feature], and none of speculators' markers."""
    names = {name.removeprefix("draft_model.").removeprefix("model.") for name in shapes}
    first = any(name.startswith("midlayer.") or name == f"{FIRST}hidden_norm.weight" for name in names)
    return first and "fc.weight" in names and "speculators_model_type" not in config


def _describe(config: Config) -> str:
    if "target_layer_ids" in config:
        return "an EAGLE-3 drafter of DeepSpec"
    nested: Mapping = config.get("eagle_config") or {}
    if "use_last_layernorm" in nested:
        return "an EAGLE-3 drafter of ModelOpt"
    return "an EAGLE-3.1 drafter" if config.get("fc_norm") or config.get("norm_output") else "an EAGLE-3 drafter"


def _read(stored: Stored, target: TargetParts) -> Eagle3Drafter:
    return load(stored, settle(stored, target.config), target)


def _needs(stored: Stored, target: Config) -> Needs:
    name = stored.config.get("target_model_name_or_path")
    trained_for = name if isinstance(name, str) else None
    return needs_of(_describe(stored.config), stored, settle(stored, target), trained_for)


FORMAT = Format("eagle3", _matches, _describe, _read, _needs)
