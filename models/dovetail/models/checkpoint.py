"""What the readers of all checkpoint formats share: errors, `config.json`, names and exact tensors."""

from __future__ import annotations

import pickle
import struct
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dovetail.runtime.errors import SourceError
from dovetail.runtime.system.files import open_regular, read_json

CONFIG = "config.json"
_PATTERNS = ("*.safetensors", "pytorch_model*.bin", "*.pt", "*.pth")  # in the order of preference
_LFS = b"version https://git-lfs"  # how a pointer begins, which a clone without Git LFS leaves in place of a file
# What torch raises for a damaged pickle.
# Kinds by safetensors' names. Whole numbers are tables of ids, which have at most one axis.
_FLOATS = {"F64", "F32", "F16", "BF16"}
_IDS = {"I64", "I32", "I16", "U8", "BOOL"}
_KINDS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_UNPICKLING = (
    OSError, ValueError, RuntimeError, EOFError, LookupError, AttributeError, TypeError, AssertionError,
    ArithmeticError, MemoryError, struct.error, pickle.UnpicklingError,
)  # fmt: skip


class CheckpointError(SourceError):
    """A checkpoint folder is incomplete or unreadable, or its tensors do not fit its config."""


class UnknownFormat(CheckpointError):
    """No format that Dovetail reads recognises the folder's config and tensors."""


@dataclass(frozen=True)
class Stored:
    """A checkpoint folder whose config and shapes are known. Its weights are not read.

    shapes: of all tensors, by name. files: names of config.json and the files of weights.
    """

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    files: tuple[str, ...]

    def tensors(self) -> dict[str, Tensor]:
        """Read all tensors. Raises CheckpointError, also for values that are no numbers."""
        tensors = {name: tensor for file in self.files[1:] for name, tensor in _load(self.folder, file).items()}
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise CheckpointError(f"{name} in {self.folder} holds values that are no numbers: download it again")
        return tensors


def read_stored(folder: Path, *, allow_pickle: bool = False) -> Stored:
    """Read config.json and the names and shapes of all tensors. Raises CheckpointError.

    allow_pickle: read PyTorch's pickled files where there are no safetensors, weights alone.
    """
    config = read_config(folder)
    names = weight_files(folder, allow_pickle=allow_pickle)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        found = _shapes(folder, name)
        if twice := sorted(shapes.keys() & found.keys()):
            raise CheckpointError(f"{folder} has the tensor {twice[0]!r} in two files: remove one of them")
        shapes |= found
    return Stored(folder, config, shapes, (CONFIG, *names))


def weight_files(folder: Path, *, allow_pickle: bool = False) -> tuple[str, ...]:
    """Names of a folder's files of weights; with an index, the files that it lists.

    Raises CheckpointError: no such file, several without an index, a pickle that is not allowed.
    """
    for pattern in _PATTERNS:
        files = sorted(file.name for file in folder.glob(pattern))
        if not files:
            continue
        if pattern != _PATTERNS[0] and not allow_pickle:
            raise CheckpointError(
                f"{folder / files[0]} is a pickle, which can run code when it is read: convert it to safetensors, or "
                "give --allow-pickle to read its weights alone"
            )
        index = folder / ("model.safetensors.index.json" if pattern == _PATTERNS[0] else "pytorch_model.bin.index.json")
        if index.is_file():
            return _listed(folder, index, files)
        if len(files) > 1:
            raise CheckpointError(f"{folder} holds {len(files)} files of weights and no {index.name}: keep one")
        return tuple(files)
    raise CheckpointError(f"{folder} holds no *.safetensors: name the folder of a trained drafter")


def _listed(folder: Path, index: Path, files: list[str]) -> tuple[str, ...]:
    """The files that an index lists, which must be files of the folder itself."""
    try:
        content = read_json(index, ValueError, "download it again")
        names = sorted(set(content["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(folder, error) from error
    if missing := [name for name in names if name not in files]:
        raise CheckpointError(f"{folder} lacks {missing[0]!r}, which {index.name} lists: download it again")
    return tuple(names)


def unreadable(folder: Path, error: Exception) -> CheckpointError:
    """The error for a checkpoint whose files cannot be read."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return CheckpointError(f"cannot read drafter checkpoint {folder}: {reason:.300}: copy or download it again")


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


def _check_file(folder: Path, name: str) -> None:
    """Raise OSError if a file is not regular, and CheckpointError if Git LFS has not fetched it."""
    with open_regular(folder / name) as file:
        if file.read(len(_LFS)) == _LFS:
            raise CheckpointError(
                f"{folder / name} is a Git LFS pointer and not the weights: run git lfs pull in {folder}, or download "
                "the file"
            )


def read_safetensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one file. Raises CheckpointError."""
    try:
        _check_file(folder, name)
        return load_file(folder / name)
    except (OSError, ValueError, SafetensorError) as error:
        raise unreadable(folder, error) from error


def _shapes(folder: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of one file. Raises CheckpointError."""
    if not name.endswith(".safetensors"):
        return {key: tuple(tensor.shape) for key, tensor in _unpickled(folder, name, "meta").items()}
    try:
        _check_file(folder, name)
        with safe_open(folder / name, "pt") as file:
            found = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            for key, tensor in found.items():
                check_kind(key, tensor.get_dtype(), tensor.get_shape(), folder)
            return {key: tuple(tensor.get_shape()) for key, tensor in found.items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise unreadable(folder, error) from error


def check_kind(name: str, kind: str, shape: Sequence[int], folder: Path) -> None:
    """Raise CheckpointError for numbers that are no weights and no ids. kind: by safetensors' name."""
    if kind not in _FLOATS and not (kind in _IDS and len(shape) <= 1):
        raise CheckpointError(
            f"{name!r:.80} in {folder} is {kind}: give a drafter that is not quantised, with weights in float16, "
            "bfloat16 or float32"
        )


def _load(folder: Path, name: str) -> dict[str, Tensor]:
    return read_safetensors(folder, name) if name.endswith(".safetensors") else _unpickled(folder, name, "cpu")


def _unpickled(folder: Path, name: str, device: str) -> dict[str, Tensor]:
    """The tensors of a pickled file; nothing in the file is executed. Raises CheckpointError."""
    try:
        _check_file(folder, name)
        with warnings.catch_warnings(action="ignore"):  # about protocols of pickles
            tensors = torch.load(folder / name, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:  # its text advises to execute the file
        raise CheckpointError(
            f"{folder / name} is damaged, or holds code or objects beside weights: ask its owner for safetensors"
        ) from error
    except _UNPICKLING as error:
        raise unreadable(folder, error) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise unreadable(folder, ValueError(f"{name} holds more than named tensors"))
    for key, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_meta != (device == "meta"):
            raise unreadable(folder, ValueError(f"{str(key)!r:.80} is no dense tensor"))
        check_kind(str(key), _KINDS.get(tensor.dtype, str(tensor.dtype)), tensor.shape, folder)
    return {str(key): tensor for key, tensor in tensors.items()}


def without_prefixes(names: Iterable[str], prefixes: tuple[str, ...], folder: Path) -> dict[str, str]:
    """The given name of each tensor, by its name without a prefix. Raises CheckpointError."""
    found: dict[str, str] = {}
    for name in names:
        short = name
        while prefix := next((prefix for prefix in prefixes if short.startswith(prefix)), None):
            short = short.removeprefix(prefix)
        if short in found:
            raise CheckpointError(f"{folder} has the tensor {short!r} twice, as {found[short]!r} and {name!r}")
        found[short] = name
    return found


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
    for name in expected.keys() & tensors.keys():
        _check_floating(name, tensors[name], folder)
    check_shapes(expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, folder)


def as_float(name: str, tensor: Tensor, folder: Path) -> Tensor:
    """The tensor in float32. Raises CheckpointError for a tensor of whole numbers."""
    _check_floating(name, tensor, folder)
    return tensor.float()


def _check_floating(name: str, tensor: Tensor, folder: Path) -> None:
    """Raise CheckpointError for whole numbers, which lack the scale of the weights that they stand for."""
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(f"{name} in {folder} is {kind}: give a checkpoint that is not quantised")


def check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Raise CheckpointError, which lists the first differences, unless all names and shapes are equal."""
    wrong = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    wrong += [f"{name} is left over" for name in sorted(found.keys() - expected.keys())]
    wrong += [
        f"{name} is {list(found[name])}, not {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"checkpoint {folder} does not fit its config: {', '.join(wrong[:3])}{more}: use the files that belong "
            "together"
        )


def check_draft_ids(d2t: Tensor, size: int, vocab_size: int, folder: Path) -> None:
    """Raise CheckpointError unless `d2t` holds `size` ids of the target's vocabulary."""
    if d2t.shape != (size,) or int(d2t.min()) < 0 or int(d2t.max()) >= vocab_size:
        raise CheckpointError(f"d2t in {folder} does not map {size} ids into the target vocabulary of {vocab_size}")
