"""Torch modules: what is trained.  Drafter, gated fusion, checkpoint format."""

from dovetail.models.checkpoint import CheckpointError, load_checkpoint, read_checkpoint, save_checkpoint
from dovetail.models.config import DrafterConfig
from dovetail.models.drafter import Drafter

__all__ = ["CheckpointError", "Drafter", "DrafterConfig", "load_checkpoint", "read_checkpoint", "save_checkpoint"]
