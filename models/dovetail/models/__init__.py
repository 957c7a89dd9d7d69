"""Torch modules: what is trained. Drafters, their layers, and the formats of their checkpoints."""

from dovetail.models.checkpoint import CheckpointError, UnknownFormat
from dovetail.models.config import DrafterConfig
from dovetail.models.drafter import Drafter, DraftModel, DraftShape
from dovetail.models.formats.dovetail import load_checkpoint, read_checkpoint, save_checkpoint
from dovetail.models.formats.format import Format, TargetParts
from dovetail.models.formats.registry import FORMATS, Checkpoint, find_checkpoint

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
