"""Dovetail's own format: `config.json` (DrafterConfig) and `drafter.safetensors`.

The weights file holds only what was trained, and `d2t`; embedding and head rows are the target's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from dovetail.models.checkpoint import (
    CheckpointError,
    Stored,
    check_draft_ids,
    check_exact,
    load_exactly,
    read_safetensors,
    unreadable,
)
from dovetail.models.config import DrafterConfig
from dovetail.models.drafter import Drafter
from dovetail.models.formats.format import Config, Format, Needs, Shapes, TargetParts
from dovetail.runtime.pair.files import write_atomically

WEIGHTS = "drafter.safetensors"


def save_checkpoint(drafter: Drafter, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write config, trained tensors (`dtype`) and `d2t` (int32), the weights file atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in drafter.named_parameters()}
    tensors["d2t"] = drafter.d2t.to("cpu", torch.int32)
    drafter.config.save(folder)
    write_atomically(folder / WEIGHTS, save(tensors))  # not save_file: its files are for their owner alone


def load_checkpoint(folder: Path, embed_tokens: Tensor, lm_head: Tensor) -> Drafter:
    """The drafter on the target's rows. embed_tokens, lm_head: [V, H] float32.

    Raises CheckpointError when a file is missing or unreadable, or a name or shape does not fit.
    """
    config, tensors = read_checkpoint(folder)
    d2t = tensors.pop("d2t").long()
    check_draft_ids(d2t, config.draft_vocab_size, config.vocab_size, folder)
    if lm_head.shape != (config.vocab_size, config.hidden_size):
        raise CheckpointError(
            f"the target's lm_head is {tuple(lm_head.shape)}, the drafter in {folder} was trained for "
            f"{(config.vocab_size, config.hidden_size)}: use the target that it was trained for"
        )
    head = lm_head[d2t].contiguous()
    with torch.device("meta"):  # shapes alone: a config may ask for more than there is memory
        check_exact(Drafter(config, embed_tokens, head, d2t), tensors, folder)
    drafter = Drafter(config, embed_tokens, head, d2t)
    load_exactly(drafter, tensors, folder)
    return drafter


def read_checkpoint(folder: Path) -> tuple[DrafterConfig, dict[str, Tensor]]:
    """Config and raw tensors of a checkpoint folder. Raises CheckpointError."""
    config = _config(folder)
    tensors = read_safetensors(folder, WEIGHTS)
    if "d2t" not in tensors:
        raise CheckpointError(f"checkpoint {folder} has no d2t table: it is not a Dovetail drafter")
    return config, tensors


def _config(folder: Path) -> DrafterConfig:
    try:
        return DrafterConfig.load(folder)
    except (OSError, ValueError) as error:
        raise unreadable(folder, error) from error


def _matches(config: Config, shapes: Shapes) -> bool:
    """No other format has a feature size, and none of Dovetail's has the markers of a Hub model."""
    return {"feature_size", "draft_vocab_size"} <= config.keys() and not {"architectures", "model_type"} & config.keys()


def _describe(config: Config) -> str:
    return f"Dovetail's drafter with {config.get('fusion', DrafterConfig.fusion)} fusion"


def _read(stored: Stored, target: TargetParts) -> Drafter:
    return load_checkpoint(stored.folder, target.embed_tokens, target.lm_head)


def _needs(stored: Stored, target: Config) -> Needs:
    config = _config(stored.folder)
    return Needs(
        kind=_describe(stored.config),
        target_size=config.feature_size,
        vocab_size=config.vocab_size,
        draft_vocab_size=config.draft_vocab_size,
        layers=config.feature_layers,
        max_context=config.max_position_embeddings,
        rope=f"theta {config.rope_theta:g}",
    )


FORMAT = Format("dovetail", _matches, _describe, _read, _needs)
