"""Torch modules: what is trained. Drafter, gated fusion, checkpoint format.

Names are loaded when used, so that `dovetail.models.config` can be read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dovetail.models.checkpoint import CheckpointError, load_checkpoint, read_checkpoint, save_checkpoint
    from dovetail.models.config import DrafterConfig
    from dovetail.models.drafter import Drafter

_MODULE = {
    "CheckpointError": "checkpoint",
    "Drafter": "drafter",
    "DrafterConfig": "config",
    "load_checkpoint": "checkpoint",
    "read_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
}

__all__ = ["CheckpointError", "Drafter", "DrafterConfig", "load_checkpoint", "read_checkpoint", "save_checkpoint"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE[name]}", __name__), name)
    globals()[name] = value
    return value
