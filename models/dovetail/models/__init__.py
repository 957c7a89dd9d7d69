"""Torch modules: what is trained. Drafters, their layers, and the formats of their checkpoints.

Names are loaded when used, so that `dovetail.models.config` can be read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dovetail.models.checkpoint import CheckpointError, UnknownFormat
    from dovetail.models.config import DrafterConfig
    from dovetail.models.drafter import Drafter, DraftModel, DraftShape
    from dovetail.models.formats.dovetail import load_checkpoint, read_checkpoint, save_checkpoint
    from dovetail.models.formats.format import Format, TargetParts
    from dovetail.models.formats.registry import FORMATS, Checkpoint, find_checkpoint

_MODULE = {
    "FORMATS": "formats.registry",
    "Checkpoint": "formats.registry",
    "CheckpointError": "checkpoint",
    "DraftModel": "drafter",
    "DraftShape": "drafter",
    "Drafter": "drafter",
    "DrafterConfig": "config",
    "Format": "formats.format",
    "TargetParts": "formats.format",
    "UnknownFormat": "checkpoint",
    "find_checkpoint": "formats.registry",
    "load_checkpoint": "formats.dovetail",
    "read_checkpoint": "formats.dovetail",
    "save_checkpoint": "formats.dovetail",
}

__all__ = [
    "FORMATS",
    "Checkpoint",
    "CheckpointError",
    "DraftModel",
    "DraftShape",
    "Drafter",
    "DrafterConfig",
    "Format",
    "TargetParts",
    "UnknownFormat",
    "find_checkpoint",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE[name]}", __name__), name)
    globals()[name] = value
    return value
