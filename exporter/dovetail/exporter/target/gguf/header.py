"""Reads the header of a GGUF file: its metadata and the place of each tensor.

gguf.GGUFReader makes numpy views of every string: 9 s for a vocabulary of 262,144 tokens, and no
end for an array that claims 2**60 items. This reader takes 0.2 s, limited by the file's size.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, dequantize
from numpy.typing import NDArray

from dovetail.exporter.target.sources import check_fetched
from dovetail.runtime.errors import SourceError, one_line

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_ITEMS = 1 << 23  # sum of array strings, keys and tensors; vocabularies have less than 2**20 strings
_MOST_DIMENSIONS = 4  # as in ggml
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")  # as llama.cpp names the parts of a split model
_SCALARS = {
    GGUFValueType.UINT8: "u1", GGUFValueType.UINT16: "<u2", GGUFValueType.UINT32: "<u4", GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT8: "i1", GGUFValueType.INT16: "<i2", GGUFValueType.INT32: "<i4", GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4", GGUFValueType.FLOAT64: "<f8", GGUFValueType.BOOL: "?",
}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """The place of one tensor. shape: in numpy's order, the longest stride first."""

    file: Path
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    byte_shape: tuple[int, ...]

    def read(self) -> NDArray[np.float32]:
        """The values, dequantised. Raises NotImplementedError for a kind unknown to `gguf`."""
        raw = np.memmap(self.file, np.uint8, "r", self.offset, self.byte_shape)
        return dequantize(raw, self.kind)


@dataclass(frozen=True)
class GgufHeader:
    """A GGUF file before its weights, in order. parts: the files of a split model, or the file."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    parts: tuple[Path, ...] = field(default=())

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture. Raises SourceError without a name."""
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str) or not name:
            raise SourceError(f"{self.path} names no architecture: give a language model")
        return name

    def error(self, what: str) -> SourceError:
        """Return the error for a model that Dovetail cannot take from this file."""
        return SourceError(f"{self.path}: {what}: use the checkpoint's Hub id or its folder instead")


def read_model(path: Path) -> GgufHeader:
    """The header of a whole model with all its parts; `path` is any part.

    Raises SourceError as read_header does, and for parts that are missing or do not fit together.
    """
    header = read_header(path)
    count = header.metadata.get("split.count", 1)
    if type(count) is int and count < 2:
        return header
    name = _PART.fullmatch(path.name)
    if name is None or int(name[3]) != count:
        raise SourceError(
            f"{path} is a part of a model in {count} files, but its name does not say so: name the parts "
            "NAME-00001-of-00002.gguf and so on, as llama.cpp does, in one folder"
        )
    paths = tuple(path.with_name(f"{name[1]}-{index:05}-of-{name[3]}.gguf") for index in range(1, count + 1))
    for part in paths:
        if not part.is_file():
            raise SourceError(f"{part} is missing, and the model is in {count} files: put all files into one folder")
    headers = [read_header(part) for part in paths]
    tensors = {name: tensor for part in headers for name, tensor in part.tensors.items()}
    numbers = [(part.metadata.get("split.no"), part.metadata.get("split.count")) for part in headers]
    whole = len(tensors) == sum(len(part.tensors) for part in headers) == headers[0].metadata.get("split.tensors.count")
    if numbers != [(index, count) for index in range(count)] or not whole:
        raise SourceError(f"{paths[0]} and the other {count - 1} parts do not belong together: download them again")
    return replace(headers[0], tensors=tensors, parts=paths)


def name_of_split(path: Path) -> tuple[str, str] | None:
    """The part of the name that all files of a split model share; None for other files."""
    name = _PART.fullmatch(path.name)
    return (name[1], name[3]) if name else None


def read_header(path: Path) -> GgufHeader:
    """The header of one GGUF file. Raises SourceError: unreadable, not GGUF, damaged, truncated."""
    try:
        with path.open("rb") as file:
            if (magic := file.read(len(MAGIC))) != MAGIC:
                check_fetched(path)
                raise SourceError(f"{path} is not a GGUF file (it starts with {magic!r}): give another file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).header()
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}): name a GGUF file that you may read") from error
    except (struct.error, ValueError, KeyError) as error:  # past the end, not UTF-8, an unknown type
        raise SourceError(
            f"{path} is a damaged or truncated GGUF file ({one_line(error)}): download it again"
        ) from error


class _Reader:
    """Reads one file from start to end; every failure is a ValueError, struct.error or KeyError."""

    def __init__(self, path: Path, data: mmap.mmap):
        self._path, self._data, self._at, self._items = path, data, len(MAGIC), 0

    def header(self) -> GgufHeader:
        version = self._number("<I")
        if version not in _VERSIONS:
            raise SourceError(f"{self._path} has unknown GGUF version {version}: convert the model again")
        tensor_count, key_count = self._number("<Q"), self._number("<Q")
        self._count(tensor_count + key_count)
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string()
            if key in metadata:
                raise ValueError(f"{key} occurs twice")
            metadata[key] = self._value(key)
        found = [self._tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        tensors = {name: replace(tensor, offset=start + tensor.offset) for name, tensor in found}
        if len(tensors) != len(found):
            raise ValueError("two tensors have the same name")
        for name, tensor in tensors.items():
            if tensor.offset + int(np.prod(tensor.byte_shape, dtype=object)) > len(self._data):
                raise ValueError(f"{name} lies beyond the end of the file")
        return GgufHeader(self._path, metadata, tensors, (self._path,))

    def _number(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return int(value)

    def _count(self, items: int) -> None:
        self._items += items
        if self._items > _MOST_ITEMS:
            raise ValueError(f"more than {_MOST_ITEMS} items")

    def _string(self) -> str:
        return str(self._bytes(self._number("<Q")), "utf-8")

    def _bytes(self, size: int) -> bytes:
        start, self._at = self._at, self._at + size
        if self._at > len(self._data):
            raise ValueError("the file ends too early")
        return self._data[start : self._at]

    def _value(self, key: str) -> Any:
        kind = GGUFValueType(self._number("<I"))
        if kind != GGUFValueType.ARRAY:
            return self._string() if kind == GGUFValueType.STRING else self._numbers(kind, 1)[0]
        kind, count = GGUFValueType(self._number("<I")), self._number("<Q")
        if kind == GGUFValueType.ARRAY:
            raise ValueError(f"{key} is an array of arrays")
        if kind == GGUFValueType.STRING:
            self._count(count)
            return [self._string() for _ in range(count)]
        return self._numbers(kind, count)

    def _numbers(self, kind: GGUFValueType, count: int) -> list[Any]:
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self._bytes(count * dtype.itemsize), dtype).tolist()

    def _tensor(self) -> tuple[str, GgufTensor]:
        """A tensor's name and place; its offset counts from the end of the header."""
        name, dimensions = self._string(), self._number("<I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(reversed([self._number("<Q") for _ in range(dimensions)]))
        kind = GGMLQuantizationType(self._number("<I"))
        block, size = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            raise ValueError(f"{name} has shape {shape}")
        byte_shape = (*shape[:-1], shape[-1] // block * size)
        return name, GgufTensor(self._path, kind, shape, self._number("<Q"), byte_shape)
