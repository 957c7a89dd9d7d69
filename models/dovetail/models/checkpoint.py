"""What the readers of all checkpoint formats share: errors, `config.json`, exact tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dovetail.runtime.errors import SourceError
from dovetail.runtime.system.files import check_regular, read_json

CONFIG = "config.json"


class CheckpointError(SourceError):
    """A checkpoint folder is incomplete or unreadable, or its tensors do not fit its config."""


class UnknownFormat(CheckpointError):
    """No format that Dovetail knows recognises the folder's `config.json`."""


def unreadable(folder: Path, error: Exception) -> CheckpointError:
    """The error for a checkpoint whose files cannot be read."""
    return CheckpointError(f"cannot read drafter checkpoint {folder}: {error}: copy or download it again")


def read_config(folder: Path) -> dict[str, Any]:
    """The object in `config.json`. Raises CheckpointError."""
    try:
        config = read_json(folder / CONFIG, ValueError, "correct it")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder / CONFIG} is missing: name the folder of a trained drafter") from None
    except ValueError as error:
        raise unreadable(folder, error) from error
    if not isinstance(config, dict):
        raise unreadable(folder, ValueError(f"{CONFIG} holds a {type(config).__name__}, not an object"))
    return config


def read_safetensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one file. Raises CheckpointError."""
    try:
        check_regular(folder / name)
        return load_file(folder / name)
    except (OSError, ValueError, SafetensorError) as error:
        raise unreadable(folder, error) from error


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Load `tensors`, as float32, into the parameters of `module`.

    Raises CheckpointError for any name or shape that is left over on either side: weights of
    another architecture would load and silently draft nonsense.
    """
    check_exact(module, tensors, folder)
    module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})


def check_exact(module: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raise CheckpointError unless names and shapes are those of the module's parameters."""
    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wrong := sorted(set(expected.items()) ^ set(found.items())):
        raise CheckpointError(f"checkpoint {folder} does not fit its config: first difference at {wrong[0][0]!r}")


def check_draft_ids(d2t: Tensor, size: int, vocab_size: int, folder: Path) -> None:
    """Raise CheckpointError unless `d2t` holds `size` ids of the target's vocabulary."""
    if d2t.shape != (size,) or int(d2t.min()) < 0 or int(d2t.max()) >= vocab_size:
        raise CheckpointError(f"d2t in {folder} does not map {size} ids into the target vocabulary")
