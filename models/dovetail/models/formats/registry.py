"""The formats that Dovetail reads, and which of them a folder is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dovetail.models.checkpoint import CONFIG, CheckpointError, UnknownFormat, read_config
from dovetail.models.drafter import DraftModel
from dovetail.models.formats import dovetail
from dovetail.models.formats.format import Config, Format, TargetParts

# A new format is a file beside this one and an entry here. The first format that matches reads.
FORMATS = {format.name: format for format in (dovetail.FORMAT,)}
_MARKERS = ("speculators_model_type", "architectures", "model_type")  # keys by which projects mark a format


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose format is known. files: the names of its config and weights."""

    folder: Path
    format: Format
    config: Config
    files: tuple[str, ...]

    @property
    def description(self) -> str:
        return self.format.describe(self.config)

    def read(self, target: TargetParts) -> DraftModel:
        """The module on the target's rows. Raises CheckpointError, ValueError; see Format."""
        return self.format.read(self.folder, target)


def find_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, by the content of its config.json; reads no weights.

    Raises CheckpointError (missing or unreadable file) or UnknownFormat.
    """
    config = read_config(folder)
    format = next((format for format in FORMATS.values() if format.matches(config)), None)
    if format is None:
        raise UnknownFormat(
            f"{folder} is no drafter that Dovetail reads: its {CONFIG} says {_claim(config)}: "
            f"known formats are {', '.join(sorted(FORMATS))}"
        )
    files = (CONFIG, *format.weights(folder))
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder / missing[0]} is missing: name the folder of a trained drafter")
    return Checkpoint(folder, format, config, files)


def _claim(config: Config) -> str:
    """What a config says it is: its markers, else its first keys."""
    markers = [f"{name} {config[name]!r:.80}" for name in _MARKERS if name in config]
    return ", ".join(markers or [f"keys {', '.join(sorted(config)[:6])!r:.120}" if config else "nothing"])
