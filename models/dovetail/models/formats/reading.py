"""What the formats read alike in a config: sizes, flags and layers of Llama's and Qwen3's kind."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from dovetail.models.eagle3 import BlockSizes
from dovetail.models.formats.format import Config, Shapes
from dovetail.runtime.system.bounds import LARGEST, check_number, check_whole

AGAIN = "correct config.json"
ANOTHER = "use the target that it was trained for"
FIRST = "layers.0."  # the first block's tensors, by the module's names
_READERS = {"fc", "fusion_fc", "W_z", "hidden_norm"}
_MOST = {**LARGEST, "num_hidden_layers": LARGEST["blocks"]}


def block_sizes(config: Config, shapes: Shapes, first: str = FIRST) -> BlockSizes:
    """Sizes of a Llama or Qwen3 block. shapes: by the module's names. Raises ValueError.

    Biases and norms of heads are there if the first layer's tensors have them.
    """
    if (act := config.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"hidden_act {act!r:.40} is not supported: Dovetail's drafters have silu")
    sizes = {name: whole(config, name) for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    groups = whole(config, "num_key_value_heads", sizes["num_attention_heads"])
    head_dim = whole(config, "head_dim", sizes["hidden_size"] // sizes["num_attention_heads"])
    if sizes["num_attention_heads"] % groups or head_dim % 2:
        raise ValueError(f"{sizes['num_attention_heads']} heads of {head_dim} over {groups} are no layout: {AGAIN}")
    eps = config.get("rms_norm_eps", 1e-6)
    check_number("rms_norm_eps", eps, ValueError, AGAIN, most=1)
    return BlockSizes(
        **sizes,
        num_key_value_heads=groups,
        head_dim=head_dim,
        rms_norm_eps=float(eps),
        qkv_bias=f"{first}self_attn.q_proj.bias" in shapes,
        o_bias=f"{first}self_attn.o_proj.bias" in shapes,
        mlp_bias=f"{first}mlp.down_proj.bias" in shapes,
        qk_norm=f"{first}self_attn.q_norm.weight" in shapes,
    )


def architectures(config: Config) -> list[str]:
    """The architectures that a config names."""
    given = config.get("architectures")
    return [name for name in given if isinstance(name, str)] if isinstance(given, list) else []


def reads_features(names: Collection[str]) -> bool:
    """Whether one of the tensors is of a layer that reads a feature of a target."""
    return any(not _READERS.isdisjoint(name.split(".")) for name in names)


def whole(config: Config, name: str, default: int | None = None) -> int:
    """A size in a config. Raises ValueError."""
    value = config.get(name)
    value = default if value is None else value
    check_whole(name, value, ValueError, AGAIN, most=_MOST.get(name, 2**24))
    return int(value)  # type: ignore[arg-type]  # a number by now


def flag(config: Config, name: str, default: bool = False) -> bool:
    """A switch in a config. Raises ValueError."""
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name} {value!r:.40} is neither true nor false: {AGAIN}")
    return value


def layer_list(name: str, ids: object) -> tuple[int, ...]:
    """Layer ids of a config. Raises ValueError."""
    if not isinstance(ids, list) or not ids:
        raise ValueError(f"{name} {ids!r:.60} is no list of layers: {AGAIN}")
    for layer in ids:
        check_whole(name, layer, ValueError, AGAIN, least=0, most=LARGEST["num_layers"])
    if len(set(ids)) < len(ids):
        raise ValueError(f"{name} {ids!r:.60} names a layer twice: {AGAIN}")
    return tuple(ids)


def outputs_of_inputs(name: str, ids: tuple[int, ...]) -> tuple[int, ...]:
    """The blocks whose outputs are the inputs of layers `ids`. Raises ValueError for layer 0."""
    if 0 in ids:
        raise ValueError(f"{name} {list(ids)} reads the input of layer 0, the embedding, which Dovetail does not tap")
    return tuple(layer - 1 for layer in ids)


def check_full_attention(config: Config, positions: int) -> None:
    """Raise ValueError for a sliding window that is shorter than the drafter's context."""
    window = config.get("sliding_window")
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list):
        raise ValueError(f"layer_types {kinds!r:.60} is no list: {AGAIN}")
    used = "sliding_attention" in kinds or config.get("use_sliding_window") is True
    if used and isinstance(window, int) and window < positions:
        raise ValueError(f"sliding_window {window} is not supported: use a drafter with full attention")


def context_of(config: Config) -> int:
    """The pairs that a drafter was made for. Raises ValueError for a sliding window that is shorter."""
    positions = whole(config, "max_position_embeddings", 2048)
    check_full_attention(config, positions)
    return positions


def target_sizes(target: Config) -> tuple[int, int, int]:
    """Width, layers and vocabulary of the target. Raises ValueError if its config lacks one."""
    names = ("hidden_size", "num_hidden_layers", "vocab_size")
    if lacking := [name for name in names if not isinstance(target.get(name), int)]:
        raise ValueError(f"the target's config.json has no {lacking[0]}: use another target")
    width, depth, vocab = (int(target[name]) for name in names)
    return width, depth, vocab


def layer_config(config: Config, kinds: Collection[str], default: str) -> dict[str, Any]:
    """The config of a drafter's blocks in a config of speculators, of one of `kinds`. Raises ValueError."""
    layer = config.get("transformer_layer_config")
    if not isinstance(layer, dict):
        raise ValueError(f"transformer_layer_config {layer!r:.60} is no object: {AGAIN}")
    check_kind_of_block(layer, kinds, default)
    return layer


def check_kind_of_block(layer: Config, kinds: Collection[str], default: str) -> None:
    """Raise ValueError unless blocks are of one of `kinds`. default: of a config without a model type."""
    if (kind := layer.get("model_type", default)) not in kinds:
        raise ValueError(f"blocks of {kind!r:.40} are not supported: known are {', '.join(kinds)}")


def check_vocabulary(size: int, target: Config) -> None:
    """Raise ValueError unless the target has a vocabulary of `size`."""
    if size != (theirs := target_sizes(target)[2]):
        raise ValueError(f"its vocabulary of {size} is not the target's of {theirs}: {ANOTHER}")
