"""A drafter checkpoint: `config.json` and `drafter.safetensors` with only what was trained, and `d2t`.

Embedding and head rows belong to the target and are sliced from it when the drafter is built.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dovetail.models.config import DrafterConfig
from dovetail.models.drafter import Drafter
from dovetail.runtime.system.files import check_regular

WEIGHTS = "drafter.safetensors"


class CheckpointError(ValueError):
    """A checkpoint folder is incomplete, unreadable, or its tensors do not fit its config."""


def save_checkpoint(drafter: Drafter, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write config and trained tensors (`dtype`) plus `d2t` (int32); the weights file is replaced atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in drafter.named_parameters()}
    tensors["d2t"] = drafter.d2t.to("cpu", torch.int32)
    drafter.config.save(folder)
    temporary = folder / (WEIGHTS + ".tmp")
    temporary.write_bytes(save(tensors))  # not save_file: its files are for their owner alone
    os.replace(temporary, folder / WEIGHTS)


def load_checkpoint(folder: Path, embed_tokens: Tensor, lm_head: Tensor) -> Drafter:
    """Build the drafter on the target's rows.  embed_tokens, lm_head: [V, H] float32.

    Raises CheckpointError when a file is missing or unreadable or any key or shape is left over: weights
    of another architecture would load and silently draft nonsense.
    """
    config, tensors = read_checkpoint(folder)
    d2t = tensors.pop("d2t").long()
    if d2t.shape != (config.draft_vocab_size,) or int(d2t.min()) < 0 or int(d2t.max()) >= config.vocab_size:
        raise CheckpointError(f"d2t in {folder} does not map {config.draft_vocab_size} ids into the target vocabulary")
    if lm_head.shape != (config.vocab_size, config.hidden_size):
        raise CheckpointError(
            f"the target's lm_head is {tuple(lm_head.shape)}, the drafter in {folder} was trained for "
            f"{(config.vocab_size, config.hidden_size)}: use the target that it was trained for"
        )
    head = lm_head[d2t].contiguous()
    with torch.device("meta"):  # shapes alone: a config may ask for more than there is memory
        expected = {name: tuple(p.shape) for name, p in Drafter(config, embed_tokens, head, d2t).named_parameters()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if wrong := sorted(set(expected.items()) ^ set(found.items())):
        raise CheckpointError(f"checkpoint {folder} does not fit its config: first difference at {wrong[0][0]!r}")
    drafter = Drafter(config, embed_tokens, head, d2t)
    drafter.load_state_dict({name: t.float() for name, t in tensors.items()})
    return drafter


def read_checkpoint(folder: Path) -> tuple[DrafterConfig, dict[str, Tensor]]:
    """Config and raw tensors of a checkpoint folder."""
    try:
        config = DrafterConfig.load(folder)
        check_regular(folder / WEIGHTS)
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot read drafter checkpoint {folder}: {error}: copy or download it again") from error
    if "d2t" not in tensors:
        raise CheckpointError(f"checkpoint {folder} has no d2t table: it is not a Dovetail drafter")
    return config, tensors
