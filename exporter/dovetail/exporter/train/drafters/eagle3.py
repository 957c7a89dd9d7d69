"""EAGLE-3's drafter in training (arXiv 2503.01840): three blocks of the target, a head of its own.

A new drafter has SafeAILab's layout, which vLLM, SGLang and openvino-genai load. A drafter that
goes on from a checkpoint keeps that checkpoint's config and names of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.exporter.train.drafters.card import model_card
from dovetail.exporter.train.drafters.trained import Trainee
from dovetail.exporter.train.plan import TrainPlan
from dovetail.models.checkpoint import CONFIG, CheckpointError
from dovetail.models.drafter import DraftModel
from dovetail.models.eagle3 import Eagle3Drafter
from dovetail.models.formats import eagle3, speculators
from dovetail.models.formats.format import Config, TargetParts
from dovetail.models.formats.registry import Checkpoint, find_checkpoint
from dovetail.runtime.errors import TrainError
from dovetail.runtime.pair.files import write_atomically

CARD = "README.md"


class Eagle3Format:
    """EAGLE-3's format, a TrainedFormat. name: of the target, for the model card."""

    files: tuple[str, ...] = (eagle3.WEIGHTS, CONFIG, CARD)

    def __init__(self, plan: TrainPlan, target: Config, name: str):
        self.plan, self.name = plan, name
        self.config: Config = _new_config(target, plan.draft_vocab)
        self.layers = eagle3.settings_of(self.config, target).taps
        self.initial: Checkpoint | None = None
        if plan.init:
            # One zero stands for all of the target's rows: the checkpoint alone is checked here.
            rows = torch.zeros(1, 1).expand(int(target["vocab_size"]), int(target["hidden_size"]))
            self.initial, drafter = _open(plan.init, TargetParts(target, rows, rows))
            self.config, self.layers = self.initial.stored.config, drafter.config.taps

    def make(self, target: TargetParts, d2t: Tensor) -> Trainee:
        """The initial checkpoint, which keeps its own draft tokens, or a random drafter over `d2t`."""
        torch.manual_seed(self.plan.fit.seed)
        if self.initial:
            _, drafter = _open(self.initial.folder, target)
        else:
            self.config = _new_config(target.config, len(d2t))
            settings = eagle3.settings_of(self.config, target.config)
            drafter = Eagle3Drafter(settings, target.embed_tokens, target.lm_head[d2t], d2t)
        rows = drafter.head
        del drafter.head  # a buffer
        drafter.head = nn.Parameter(rows.clone())
        return Trainee(drafter, target.lm_head[drafter.d2t])

    def save(self, drafter: DraftModel, folder: Path, log: Mapping[str, Any]) -> None:
        assert isinstance(drafter, Eagle3Drafter)
        names = eagle3.names_of(self.initial.stored) if self.initial else None
        write_atomically(folder / CARD, model_card(self.name, drafter, log).encode())
        eagle3.save_checkpoint(drafter, folder, self.config, names)


def _new_config(target: Config, vocabulary: int) -> dict[str, Any]:
    try:
        return eagle3.new_config(target, vocabulary)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise TrainError(f"cannot shape an EAGLE-3 drafter after this target: {error}") from error


def _open(folder: Path, target: TargetParts) -> tuple[Checkpoint, Eagle3Drafter]:
    """The checkpoint to start from. Raises TrainError unless it is EAGLE-3 and for this target."""
    try:
        found = find_checkpoint(folder)
        if found.format not in (eagle3.FORMAT, speculators.EAGLE3):
            raise CheckpointError(f"its format is {found.format.name}: give an EAGLE-3 drafter, or --format dovetail")
        drafter = found.read(target)
    except (CheckpointError, ValueError) as error:
        raise TrainError(f"cannot start from {folder}: {error}") from error
    assert isinstance(drafter, Eagle3Drafter)  # what both formats read
    return found, drafter
