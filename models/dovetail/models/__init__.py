"""Torch modules: what is trained.  Drafter, gated fusion, checkpoint format."""

from .checkpoint import CheckpointError, load_checkpoint, read_checkpoint, save_checkpoint
from .config import DrafterConfig
from .drafter import Drafter

__all__ = ["CheckpointError", "Drafter", "DrafterConfig", "load_checkpoint", "read_checkpoint", "save_checkpoint"]
