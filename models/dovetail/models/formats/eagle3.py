"""EAGLE-3 checkpoints: SafeAILab's layout, which SpecForge and AngelSlim share, ModelOpt's, DeepSpec's.

All have the same parts under slightly different names. Their configs say different things about the
target's layers: without a list they are EAGLE's three, in SafeAILab's code the inputs of layers 2,
L / 2 and L - 3 (L layers). The ids in `eagle_config` (ModelOpt, SGLang) and in DeepSpec's
`target_layer_ids` count outputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from dovetail.models.checkpoint import (
    CONFIG,
    CheckpointError,
    Stored,
    as_float,
    check_draft_ids,
    check_shapes,
    load_exactly,
    without_prefixes,
)
from dovetail.models.config import DEFAULT_FUSION, DrafterConfig
from dovetail.models.eagle3 import Eagle3Config, Eagle3Drafter
from dovetail.models.formats.format import Config, Format, Needs, Shapes, TargetParts
from dovetail.models.formats.reading import (
    AGAIN,
    ANOTHER,
    FIRST,
    block_sizes,
    check_vocabulary,
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
_ROWS = ("embed_tokens.weight", "lm_head.weight", "d2t", "t2d")  # vocabulary, outside the module's parameters


@dataclass(frozen=True)
class Settled:
    """A drafter's settings, and how each ambiguous one was decided."""

    config: Eagle3Config
    choices: tuple[str, ...]


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


def settle(stored: Stored, target: Config) -> Settled:
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


def check_target(config: Eagle3Config, target: Config) -> None:
    """Raise ValueError unless the target has the drafter's vocabulary, width and layers."""
    width, depth, _ = target_sizes(target)
    check_vocabulary(config.vocab_size, target)
    if config.target_size != width:
        raise ValueError(f"it reads layers of width {config.target_size}, the target's are {width} wide: {ANOTHER}")
    if beyond := [tap for tap in config.taps if tap >= depth]:
        raise ValueError(f"it reads layer {beyond[0]} of a target that has {depth}: {ANOTHER}")


def check_layout(stored: Stored, config: Eagle3Config) -> None:
    """Raise CheckpointError unless the tensors' names and shapes are those of the config's drafter."""
    names = names_of(stored)
    shapes = {name: stored.shapes[given] for name, given in names.items()}
    size, vocab, draft = config.block.hidden_size, config.vocab_size, config.draft_vocab_size
    rows = {"embed_tokens.weight": (vocab, size), "lm_head.weight": (draft, size), "d2t": (draft,), "t2d": (vocab,)}
    required = {"d2t"} if draft != vocab else set()
    if size != config.target_size:
        required |= {"embed_tokens.weight", "lm_head.weight"}
    expected = {name: shape for name, shape in rows.items() if name in shapes or name in required}
    with torch.device("meta"):
        module = Eagle3Drafter(config, torch.zeros(vocab, size), torch.zeros(draft, size), torch.zeros(draft))
    expected |= {name: tuple(value.shape) for name, value in flat_parameters(module).items()}
    check_shapes(expected, shapes, stored.folder)


def flat_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters but the head by the checkpoints' names, where the mix's stand beside the layers'."""
    return {name.removeprefix("mix."): value for name, value in module.named_parameters() if name != "head"}


def load(stored: Stored, settled: Settled, target: TargetParts) -> Eagle3Drafter:
    """The module with the checkpoint's weights. Raises CheckpointError, ValueError (another target)."""
    config = settled.config
    check_target(config, target.config)
    check_layout(stored, config)
    names, raw = names_of(stored), stored.tensors()
    tensors = {name: raw[given] for name, given in names.items()}
    embed, head, d2t, t2d = (tensors.pop(name, None) for name in _ROWS)
    ids = draft_ids(d2t, t2d, config.draft_vocab_size, config.vocab_size, stored)
    embed_tokens = target.embed_tokens if embed is None else as_float("embed_tokens", embed, stored.folder)
    rows = target.lm_head[ids].contiguous() if head is None else as_float("lm_head", head, stored.folder)
    module = Eagle3Drafter(config, embed_tokens, rows, ids)
    mixed = {f"mix.{name}" if name.startswith(("fc", "input_norm")) else name: value for name, value in tensors.items()}
    load_exactly(module, mixed, stored.folder)
    return module


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


def draft_ids(d2t: Tensor | None, t2d: Tensor | None, size: int, vocab: int, stored: Stored) -> Tensor:
    """Target ids [K] int64 from the offsets `d2t` [K]; without offsets all ids. Raises CheckpointError.

    The target id of draft token i is i + d2t[i]. `t2d` [V] must mark the same tokens.
    """
    if d2t is None:
        return torch.arange(size)
    if d2t.is_floating_point() or d2t.dtype == torch.bool:
        raise CheckpointError(f"d2t in {stored.folder} is {d2t.dtype}, not whole numbers: use another checkpoint")
    ids = torch.arange(len(d2t)) + d2t.long()
    check_draft_ids(ids, size, vocab, stored.folder)
    if len(ids.unique()) < size:
        raise CheckpointError(f"d2t in {stored.folder} names a token twice: use another checkpoint")
    if t2d is not None and not torch.equal(torch.nonzero(t2d.bool()).flatten(), ids.sort().values):
        raise CheckpointError(f"d2t and t2d in {stored.folder} mark different tokens: use another checkpoint")
    return ids


def needs_of(kind: str, settled: Settled, target: str | None) -> Needs:
    """What settled settings ask of a target."""
    config = settled.config
    return Needs(
        kind=kind,
        target_size=config.target_size,
        vocab_size=config.vocab_size,
        draft_vocab_size=config.draft_vocab_size,
        layers=config.taps,
        max_context=config.max_position_embeddings,
        rope=config.rope.text,
        target=target,
        choices=settled.choices,
    )


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
    settled = settle(stored, target)
    check_layout(stored, settled.config)
    name = stored.config.get("target_model_name_or_path")
    return needs_of(_describe(stored.config), settled, name if isinstance(name, str) else None)


FORMAT = Format("eagle3", _matches, _describe, _read, _needs)
