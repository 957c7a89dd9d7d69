"""What a checkpoint format says about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dovetail.models.checkpoint import Stored
from dovetail.models.drafter import DraftBase

Config = Mapping[str, Any]  # the content of a checkpoint's config.json
Shapes = Mapping[str, tuple[int, ...]]  # of a checkpoint's tensors, by name


@dataclass(frozen=True)
class TargetParts:
    """What a drafter may take from its target.

    config: the text part of the target's config.json. embed_tokens, lm_head: [V, H] float32, V
    target vocabulary.
    """

    config: Config
    embed_tokens: Tensor
    lm_head: Tensor


@dataclass(frozen=True)
class Needs:
    """What a drafter asks of its target, as its config and shapes say it. None: it does not say.

    target_size: width of the target's layers, 0 for any. layers: the layers that it reads. choices: how each
    ambiguous setting was settled, one line each. target: the model that it was trained for.
    """

    kind: str
    target_size: int
    vocab_size: int
    draft_vocab_size: int
    layers: tuple[int, ...] = ()
    max_context: int | None = None
    rope: str = ""
    target: str | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """How Dovetail recognises and reads the checkpoints of one format.

    matches: whether a config and the shapes of its tensors are of this format. The names of folders
    and files say nothing. describe: one line about the drafter, which the manifest keeps.
    read: builds the module that the exporter exports; its `mix` says which of the target's features
    it reads. Raises CheckpointError, or ValueError if the checkpoint is for another target.
    needs: what it asks of a target with this config, without reading weights; raises like `read`.
    reads_tokens: its drafters read tokens alone, have rows of their own, and need the target's
    tokenizer. `read` then uses the target's config only.
    """

    name: str
    matches: Callable[[Config, Shapes], bool]
    describe: Callable[[Config], str]
    read: Callable[[Stored, TargetParts], DraftBase]
    needs: Callable[[Stored, Config], Needs]
    reads_tokens: bool = False
