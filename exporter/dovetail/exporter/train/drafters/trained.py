"""The seam between a training run and the format of the drafter that the run trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dovetail.models.drafter import DraftModel
from dovetail.models.formats.format import TargetParts


@dataclass(frozen=True)
class Trainee:
    """A drafter in training. All its parameters are trained.

    teacher: [K, H] the target's head rows of the draft tokens. Times the target's last feature they
    give the distribution to learn.
    """

    drafter: DraftModel
    teacher: Tensor

    def to(self, device: str) -> Trainee:
        return replace(self, drafter=self.drafter.to(device), teacher=self.teacher.to(device))


class TrainedFormat(Protocol):
    """One run's drafter in one checkpoint format. Its construction checks the plan and the target.

    layers: blocks of the target that the drafter reads. files: what `save` writes, weights first.
    """

    layers: tuple[int, ...]
    files: tuple[str, ...]

    def make(self, target: TargetParts, d2t: Tensor) -> Trainee:
        """The drafter on the target's rows, random or with the initial checkpoint's weights.

        d2t: [K] the text's most frequent tokens. Raises TrainError.
        """

    def save(self, drafter: DraftModel, folder: Path, log: Mapping[str, Any]) -> None:
        """Write the checkpoint, its weights last and atomically. log: the content of training.json."""
