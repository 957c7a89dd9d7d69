"""Dovetail's drafter in training: a fusion over blocks and last feature, with the target's head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dovetail.exporter.train.drafters.trained import Trainee
from dovetail.exporter.train.plan import TrainPlan
from dovetail.models.checkpoint import CONFIG, CheckpointError
from dovetail.models.config import DrafterConfig
from dovetail.models.drafter import Drafter, DraftModel
from dovetail.models.formats import dovetail as own
from dovetail.models.formats.format import Config, TargetParts
from dovetail.models.formats.registry import find_checkpoint
from dovetail.runtime.errors import TrainError, one_line


class OwnFormat:
    """Dovetail's format, a TrainedFormat."""

    files: tuple[str, ...] = (own.WEIGHTS, CONFIG)

    def __init__(self, plan: TrainPlan, target: Config, name: str):
        self.plan = plan
        config = self._config(target, plan.draft_vocab)
        self.layers, self.intermediate_size = config.feature_layers, config.intermediate_size
        if plan.init:
            self._read_initial(plan.init)

    def make(self, target: TargetParts, d2t: Tensor) -> Trainee:
        config = self._config(target.config, len(d2t))
        torch.manual_seed(self.plan.fit.seed)
        drafter = Drafter(config, target.embed_tokens, target.lm_head[d2t], d2t)
        if self.plan.init:
            self._load_initial(drafter, self.plan.init)
        return Trainee(drafter, drafter.head)

    def save(self, drafter: DraftModel, folder: Path, log: Mapping[str, Any]) -> None:
        assert isinstance(drafter, Drafter)
        own.save_checkpoint(drafter, folder)

    def _config(self, target: Config, vocabulary: int) -> DrafterConfig:
        plan = self.plan
        try:
            return DrafterConfig.for_target(
                dict(target),
                vocabulary,
                plan.fusion,
                plan.blocks,
                layers=plan.feature_layers,
                intermediate_size=plan.intermediate_size,
            )
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise TrainError(f"cannot shape a drafter after this target: {error}") from error

    def _read_initial(self, folder: Path) -> dict[str, Tensor]:
        """The weights in `folder`. Its draft vocabulary may differ, and it may read fewer blocks.

        Raises TrainError if the checkpoint cannot be read or has another fusion, other blocks or another width.
        """
        plan = self.plan
        try:
            if (format := find_checkpoint(folder).format) is not own.FORMAT:
                raise CheckpointError(
                    f"its format is {format.name}: give a drafter in Dovetail's format, or --format eagle3 for EAGLE-3"
                )
            config, tensors = own.read_checkpoint(folder)
        except CheckpointError as error:
            raise TrainError(f"cannot start from {folder}: {error}") from error
        for name, found, asked in (
            ("--fusion", config.fusion, plan.fusion),
            ("--blocks", config.blocks, plan.blocks),
            ("--intermediate-size", config.intermediate_size, self.intermediate_size),
        ):
            if found != asked:
                raise TrainError(
                    f"cannot start from {folder}: its {name[2:]} is {found}, not {asked}: give {name} {found}"
                )
        if config.feature_layers and not plan.feature_layers:
            raise TrainError(f"cannot start from {folder}, which reads blocks of the target: leave out --last-feature")
        return {name: tensor.float() for name, tensor in tensors.items() if name != "d2t"}

    def _load_initial(self, drafter: Drafter, folder: Path) -> None:
        try:
            missing, unknown = drafter.load_state_dict(self._read_initial(folder), strict=False)
        except RuntimeError as error:
            reason = one_line(error)[:200]
            raise TrainError(f"cannot start from {folder}: {reason}: give a checkpoint for this target") from error
        if odd := [*unknown, *(name for name in missing if not name.startswith("mix."))]:
            raise TrainError(f"cannot start from {folder}: {odd[0]} does not fit: give a checkpoint for this target")
