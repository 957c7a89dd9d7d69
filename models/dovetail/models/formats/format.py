"""What a checkpoint format says about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dovetail.models.drafter import DraftModel

Config = Mapping[str, Any]  # the content of a checkpoint's config.json


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
class Format:
    """How Dovetail recognises and reads the checkpoints of one format.

    matches: whether a config.json is of this format. Folder and file names say nothing.
    weights: names of the files that a folder must hold beside config.json; exports digest them.
    describe: one line about the drafter, which the manifest keeps as provenance.
    read: builds the module that the exporter exports; its `mix` says which of the target's features
    it reads. Raises CheckpointError, or ValueError if the checkpoint is for another target.
    """

    name: str
    matches: Callable[[Config], bool]
    weights: Callable[[Path], tuple[str, ...]]
    describe: Callable[[Config], str]
    read: Callable[[Path, TargetParts], DraftModel]
