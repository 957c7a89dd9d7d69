"""The formats that Dovetail reads, and which of them a folder is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dovetail.models.checkpoint import CONFIG, CheckpointError, Stored, UnknownFormat, read_config, read_stored
from dovetail.models.drafter import DraftBase
from dovetail.models.formats import dflash, dovetail, eagle, eagle3, language_model, research, speculators
from dovetail.models.formats.format import Config, Format, Needs, TargetParts
from dovetail.models.formats.refused import check_not_refused

# A new format is a file beside this one and an entry here. The first format that matches reads.
_KNOWN = (
    dovetail.FORMAT, dflash.Z_LAB, dflash.SPECULATORS, speculators.EAGLE3, eagle3.FORMAT, eagle.FORMAT, research.FORMAT,
    language_model.FORMAT,
)  # fmt: skip
FORMATS = {format.name: format for format in _KNOWN}
_MARKERS = ("speculators_model_type", "architectures", "model_type")  # keys by which projects mark a format


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose format is known."""

    stored: Stored
    format: Format

    @property
    def folder(self) -> Path:
        return self.stored.folder

    @property
    def files(self) -> tuple[str, ...]:
        """The names of its config and weights."""
        return self.stored.files

    @property
    def description(self) -> str:
        return self.format.describe(self.stored.config)

    def needs(self, target: Config) -> Needs:
        """What it asks of a target with this config; reads no weights. Raises CheckpointError, ValueError."""
        return self.format.needs(self.stored, target)

    def read(self, target: TargetParts) -> DraftBase:
        """The module on the target's rows. Raises CheckpointError, ValueError; see Format."""
        return self.format.read(self.stored, target)


def find_checkpoint(folder: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint in `folder`, by its config and the names of its tensors; reads no weights.

    Raises CheckpointError (missing or unreadable file) or UnknownFormat, also for a known format
    that Dovetail does not read.
    """
    config = read_config(folder)
    try:
        stored = read_stored(folder, allow_pickle=allow_pickle)
    except CheckpointError:  # of less use than the reason why Dovetail does not read the format
        check_not_refused(folder, config)
        raise
    return recognised(stored)


def recognised(stored: Stored) -> Checkpoint:
    """The checkpoint whose config and shapes are known. Raises UnknownFormat."""
    folder = stored.folder
    check_not_refused(folder, stored.config, stored.shapes)
    format = next((format for format in FORMATS.values() if format.matches(stored.config, stored.shapes)), None)
    if format is None:
        raise UnknownFormat(
            f"{folder} is no drafter that Dovetail reads: its {CONFIG} says {_claim(stored.config)}: "
            f"known formats are {', '.join(sorted(FORMATS))}"
        )
    return Checkpoint(stored, format)


def _claim(config: Config) -> str:
    """What a config says it is: its markers, else its first keys."""
    markers = [f"{name} {config[name]!r:.80}" for name in _MARKERS if name in config]
    return ", ".join(markers or [f"keys {', '.join(sorted(config)[:6])!r:.120}" if config else "nothing"])
